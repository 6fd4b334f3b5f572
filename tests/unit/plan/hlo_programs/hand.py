"""Small programs with their collectives and FLOPs counted by hand from the shapes of one device's shards.

Every program is a fully manual shard_map over 8 devices, so a compiler has no sharding left to choose. Every input and
output is divided along its first dimension by all mesh axes: the shapes below are those of one device. A row states
what the program asks for; `cpu`, `tpu`, ... replace the rows where that compiler legitimately asks for something else,
with the reason beside it. The two general ones:
- the CPU has no collectives of bf16: it sends f32;
- the TPU multiplies f32 at its default precision, which rounds operands to bf16: it rounds before it sends them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


class Row(NamedTuple):
    """Runs of one collective: payload bytes of one run, and bytes that one device sends in a step."""

    op: str
    axis: str
    dtype: str
    count: int
    bytes: float
    wire: float


@dataclass(frozen=True)
class Program:
    """`body` maps shards to shards; `shapes` are those of the shards; `flops` are of one device and step.

    `auto`: specs of the inputs and, last, of the output of a body on global arrays, which the partitioner divides.
    `options`: for the compiler. `partial`: groups cover a part of an axis.
    """

    mesh: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]
    body: Callable[..., Any]
    rows: tuple[Row, ...]
    dtypes: tuple[Any, ...] = (jnp.float32,)
    flops: float = 0
    other: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    other_flops: dict[str, float] = field(default_factory=dict)
    auto: tuple[PartitionSpec, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    partial: bool = False
    targets: tuple[str, ...] = ("cpu", "tpu", "gpu")

    def expected(self, target: str) -> tuple[Row, ...]:
        return self.other.get(target, self.rows)

    def lower(self, mesh: jax.sharding.Mesh) -> Any:
        """The lowered program on a mesh whose axes are those of `self.mesh`."""
        assert dict(mesh.shape) == self.mesh, (mesh.shape, self.mesh)
        if self.auto:
            return self._lower_auto(mesh, *self.auto)
        spec = PartitionSpec(mesh.axis_names)
        mapped = jax.shard_map(self.body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        divided = jax.sharding.NamedSharding(mesh, spec)
        dtypes = self.dtypes * len(self.shapes) if len(self.dtypes) == 1 else self.dtypes
        given = [
            jax.ShapeDtypeStruct((mesh.size * shape[0], *shape[1:]), dtype, sharding=divided)
            for shape, dtype in zip(self.shapes, dtypes, strict=True)
        ]
        return jax.jit(mapped).lower(*given)

    def _lower_auto(self, mesh: jax.sharding.Mesh, *specs: PartitionSpec) -> Any:
        *ins, out = (jax.sharding.NamedSharding(mesh, spec) for spec in specs)
        given = [
            jax.ShapeDtypeStruct(shape, self.dtypes[0], sharding=placed)
            for shape, placed in zip(self.shapes, ins, strict=True)
        ]
        return jax.jit(self.body, out_shardings=out).lower(*given)


M24 = {"data": 2, "tensor": 4}
M222 = {"data": 2, "fsdp": 2, "tensor": 2}
E8 = {"expert": 8}
P8 = {"pipe": 8}
F8 = {"fsdp": 8}

# The shard that most programs move: [256, 128].
S = (256, 128)
X = 256 * 128 * 4  # its bytes in f32
H = 256 * 128 * 2  # in bf16
B = 256 * 128 * 1  # in int8

AR, AG, RS, A2A, CP = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"

PROGRAMS: dict[str, Program] = {}


def define(
    name: str, mesh: dict[str, int], shapes: Any, body: Callable[..., Any], *rows: Row, **more: Any
) -> None:
    assert name not in PROGRAMS, name
    PROGRAMS[name] = Program(mesh, tuple(shapes), body, rows, **more)


def ring(axis: str, n: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def scan(times: int, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=times)[0]
