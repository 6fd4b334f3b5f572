"""Short texts of all processes, kept by JAX's coordination service."""

from __future__ import annotations

from typing import Any

import jax


class ServiceBoard:
    """One text for each process (`watch.Board`), over hosts. Costs the coordinator a few hundred bytes a process and look.

    Args:
        subject: what the texts are about; boards of one subject are one.

    Raises:
        RuntimeError: by its methods, when the coordinator does not answer.
    """

    def __init__(self, client: Any, subject: str):
        self._client, self._prefix = client, f"shardtrain/{subject}/"

    def put(self, process: int, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}{process}", text, allow_overwrite=True)

    def all(self) -> list[str]:
        return [text for _, text in self._client.key_value_dir_get(self._prefix)]


def service_board(subject: str) -> ServiceBoard | None:
    """The board of the processes that have joined; None where there is only one."""
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # no public name gives the client

    client = distributed.global_state.client
    return None if client is None else ServiceBoard(client, subject)
