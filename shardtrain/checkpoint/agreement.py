"""What several processes must see alike; on one process, its own view. All of them call these together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from shardtrain.errors import CheckpointError, RunError

TEXT = 1024  # bytes of a message that travels


def number(mine: int) -> int:
    """Process 0's number."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def text(mine: str) -> str:
    """Process 0's text."""
    return complaint(mine if jax.process_index() == 0 else "")


def complaint(mine: str) -> str:
    """The first text that is not empty, so that all raise where one must; else empty."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    own = np.zeros(TEXT, np.uint8)
    data = mine.encode()[:TEXT]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    texts = [
        bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(own)
    ]
    return next((text for text in texts if text), "")


def on_first[T](action: Callable[[], T]) -> T | None:
    """Do it on process 0, its result there. Where it raises, all raise: one that went on alone would wait for ever."""
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except (OSError, CheckpointError, RunError) as error:
            failure = error
    kind = RunError if isinstance(failure, RunError) else CheckpointError
    told = complaint("" if failure is None else f"{kind.__name__} {failure}")
    if failure is not None:
        raise failure
    if told:
        name, _, said = told.partition(" ")
        raise (RunError if name == RunError.__name__ else CheckpointError)(
            "process 0 could not go on", why=said, fix="see there"
        )
    return result
