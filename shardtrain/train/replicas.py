"""Do devices that hold the same block of the state hold the same bits? A checksum per leaf and device, compared."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import RunError
from shardtrain.mesh.build import AnyMesh
from shardtrain.tree import flatten

_WORDS = {1: jnp.uint8, 2: jnp.uint16}  # by bytes of an element; larger ones are words of 32 bits


class Replicas:
    """Compares replicas every so many steps, and before saves: a device that computes wrongly is found, and not saved.

    The checksum is the sum of the words of a block modulo 2^32: one flipped bit moves it, whichever. What one device
    alone holds has nothing to be compared with. A check reads the state once, and all-gathers 4 bytes per leaf and device.

    Args:
        state: abstract, with shardings on `mesh`. run: what `shardtrain resume` goes on with.
    """

    def __init__(self, state: Any, mesh: AnyMesh, every: int, run: str):
        self.every, self._run = every, run
        self._devices = list(mesh.devices.flat)
        place = {device: row for row, device in enumerate(self._devices)}
        self._blocks: list[
            tuple[str, int, list[int]]
        ] = []  # path, leaf, rows of the devices that hold one block
        for number, (path, leaf) in enumerate(flatten(state).items()):
            holders = collections.defaultdict(list)
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                holders[str(index)].append(place[device])
            self._blocks += [(path, number, sorted(rows)) for rows in holders.values() if len(rows) > 1]
        specs = tuple(leaf.sharding.spec for leaf in state.leaves)
        per_device = PartitionSpec(mesh.axis_names)
        local = jax.shard_map(_checksums, mesh=mesh, in_specs=specs, out_specs=per_device)
        self._program: Any = jax.jit(local, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def start(self, state: Any) -> jax.Array:
        """[devices, leaves], without waiting; the state may be donated at once."""
        checksums: jax.Array = self._program(*state.leaves)
        return checksums

    def judge(self, step: int, checksums: jax.Array) -> None:
        """Compare what `start` gave at a step.

        Raises:
            RunError: replicas differ; names leaf, device and process.
        """
        table = np.asarray(jax.device_get(checksums))
        found = [(path, _odd(table[rows, n], rows), len(rows)) for path, n, rows in self._blocks]
        found = [(path, odd, of) for path, odd, of in found if odd]
        if not found:
            return
        path, odd, of = found[0]
        names = ", ".join(
            f"{d.platform}:{d.id} of process {d.process_index}" for d in (self._devices[i] for i in odd)
        )
        why = (
            f"{names} has other bits than the other {of - len(odd)}"
            if 2 * len(odd) < of
            else (f"{names} differ, and no majority says which is right")
        )
        more = sorted({other for other, _, _ in found[1:]} - {path})
        raise RunError(
            f"replicas of {path} differ"
            + (f", and of {len(more)} more leaves ({', '.join(more[:4])})" if more else ""),
            where=f"step {step}",
            why=f"{why}; devices that hold the same block must hold the same bits: memory or a core is at fault",
            fix=f"shardtrain resume {self._run} goes on from the last commit, which was compared before it was written; "
            "leave out a device that is named again",
        )


def _odd(values: np.ndarray, rows: list[int]) -> list[int]:
    """Rows that disagree with most; all of them where there is no majority."""
    usual, count = collections.Counter(values.tolist()).most_common(1)[0]
    if count == len(rows):
        return []
    return [row for row, v in zip(rows, values, strict=True) if v != usual or 2 * count <= len(rows)]


def _checksums(*blocks: jax.Array) -> jax.Array:
    return jnp.stack([_sum(block) for block in blocks])[None]


def _sum(block: jax.Array) -> jax.Array:
    if block.dtype == jnp.bool_:
        block = block.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(block, _WORDS.get(block.dtype.itemsize, jnp.uint32))
    return words.sum(dtype=jnp.uint32)
