"""The one module that knows Orbax. Import it where arrays are moved, not at the top of another module."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from shardtrain.checkpoint.manifest import paths
from shardtrain.mesh.board import ServiceBoard

Tree = dict[str, Any]
_LOOK = 0.5  # seconds between looks whether another process has failed
_BARRIERS = (  # of a save's background half, in order: operation, name. Where Orbax changes one, its waiters time out
    ("{}.state", "save_and_finalize_{}.state_commit_complete"),
    ("{}.state", "save_and_finalize_{}.state_finalize_complete"),
    ("{}", "save_checkpointables_async:finalize"),
)


class Pending(Protocol):
    """A write in the background."""

    def result(self, timeout: float | None = None) -> Any: ...


def start(path: Path, state: Any) -> Pending:
    """Begin to write the leaves of `state` under `path`, as nested dicts of their paths.

    Returns when every leaf has been copied off the device: the state may then be donated. Waits for the
    device to finish computing it. Every process calls it, in the same order.
    """
    # zstd made 64 MiB of float32 weights take 3.4 times the CPU time and hardly smaller
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        return ocp.save_async(path, nested({p: x for p, x in paths(state).items() if x.size}))


def finish(pending: Pending, board: ServiceBoard | None) -> None:
    """Wait until this process's part is written.

    Args:
        board: where processes say that they could not. Orbax's own barriers wait for those for up to twenty minutes.

    Raises:
        OSError: another process could not. Any: what Orbax met here.
    """
    if board is None:
        pending.result()
        return
    while True:
        began = time.monotonic()
        try:
            return pending.result(timeout=_LOOK)
        except TimeoutError:
            if time.monotonic() - began < _LOOK / 2:  # not ours: something in there took too long
                raise
        if told := board.all():
            raise OSError(told[0])


def release(pending: Pending) -> None:
    """Where a save has failed, on every process: once Orbax has given up here, come to its barriers in its place, where
    others would wait for minutes with their copy of the state.

    Beside all else: the first to come to a barrier decides how long it stands, which may be those minutes. And not before:
    who comes twice to one barrier waits for ever. Where one process failed, the first one's Orbax fails after it, as its
    folder is gone.
    """
    number = getattr(pending, "_operation_id", None)
    everyone = set(range(jax.process_count()))

    def come() -> None:
        try:
            pending.result()
        except Exception:
            for operation, name in _BARRIERS:
                with contextlib.suppress(Exception):  # one to which they will not come
                    meeting = ocp.multihost.sync_global_processes(
                        name.format(number),
                        operation_id=operation.format(number),
                        timeout=1,
                        processes=everyone,
                    )
                    asyncio.run(meeting)

    threading.Thread(target=come, name="release", daemon=True).start()


def load(path: Path, abstract: Mapping[tuple[str, ...], jax.ShapeDtypeStruct], *, partial: bool) -> Tree:
    """Read leaves straight into the shardings of `abstract` (path to ShapeDtypeStruct with a sharding).

    Args:
        partial: the checkpoint may hold more than `abstract`.

    Returns:
        The leaves as nested dicts, in the shapes, dtypes and shardings asked for.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in abstract.items()}
    with context:
        tree = ocp.load(path, nested({p: x for p, x in wanted.items() if x.size}))
    for p, x in wanted.items():
        if not x.size:  # Orbax refuses to write arrays without elements
            set_at(tree, p, jax.jit(lambda x=x: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)())
    return tree


def meet(name: str) -> None:
    """Wait until every process has come here; free of the devices, so that a background thread may."""
    asyncio.run(ocp.multihost.sync_global_processes(name, operation_id="shardtrain"))


def nested(leaves: Mapping[tuple[str, ...], Any]) -> Tree:
    tree: Tree = {}
    for path, leaf in leaves.items():
        set_at(tree, path, leaf)
    return tree


def set_at(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def at(tree: Tree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
