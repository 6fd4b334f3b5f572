"""Products at the edges of a block whose residual stream tensor divides along the sequence.

`column` opens a block and `row` closes it. Where the stream is divided, each device's copy of the gathered stream, and
its partial sum, are a dim of their own (`z`, divided over tensor), so that products stay local and the all-gather and
the reduce-scatter between are written by hand, each other's transpose. Left to the partitioner, the TPU compiler makes
all-reduces of the reduce-scatters over more than eight chips. Source: Korthikanti et al. (arXiv 2205.05198).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.parallel.fsdp import reduce_scatter
from shardtrain.parallel.quantised import COPIES, SUMS, product, quantised
from shardtrain.parallel.region import free_axes, on_parts
from shardtrain.parallel.remat import REDUCED, opaque
from shardtrain.sharding import context
from shardtrain.sharding.constrain import enter_block, leave_block, place, spec_of


def column(x: jax.Array, kernel: jax.Array, equation: str, *names: str | None) -> jax.Array:
    """`einsum(equation, x, kernel)` into a block, of a kernel whose other dims tensor may divide.

    Args:
        x: residual stream [batch, seq, embed]. equation: of letters other than z. names: logical axes of the kernel.

    Communicates: where the stream is divided, an all-gather forward (f*X, and again where the backward recomputes), a
    reduce-scatter backward; else what the partitioner makes of it, an all-reduce of the gradient of `x`.
        In 8 bits also what `product` says, here and in `row`.
    """
    dim = _divided(names)
    way = None if dim is None else _way(x, names[dim])
    if way is None or dim is None:
        return product(enter_block(x), kernel, equation)
    left, right, out = _letters(equation)
    letter = right[dim]
    y = product(
        _travel(x, way, True) if way.divided else _copies(x, way),
        split_dim(kernel, dim, way.parts),
        f"z{left},{right.replace(letter, 'z' + letter)}->{out.replace(letter, 'z' + letter)}",
        COPIES,
    )
    return _merged(y, out.index(letter))


def row(h: jax.Array, kernel: jax.Array, equation: str, *names: str | None) -> jax.Array:
    """`einsum(equation, h, kernel)` out of a block, summed over a dim that tensor may divide.

    Args:
        h: [batch, seq, ...]. names: logical axes of the kernel, contracted ones first.

    Returns:
        [batch, seq, embed] as the rules divide the residual stream. A sum over devices is named `REDUCED`, which every remat
        policy saves.

    Communicates: a reduce-scatter forward and an all-gather backward where the stream is divided, else an all-reduce.
    """
    left, right, out = _letters(equation)
    dim = _divided(names)
    way = None
    if dim is not None:
        way = _way(jax.ShapeDtypeStruct((*h.shape[:2], kernel.shape[-1]), h.dtype), names[dim])
    if dim is None:
        return leave_block(product(h, kernel, equation))
    if way is None:
        return checkpoint_name(leave_block(product(h, kernel, equation)), REDUCED)
    letter = right[dim]
    split = lambda letters: letters.replace(letter, "z" + letter)  # noqa: E731
    y = product(
        split_dim(h, left.index(letter), way.parts),
        split_dim(kernel, dim, way.parts),
        f"{split(left)},{split(right)}->z{out}",
        SUMS,
    )
    y = _travel(y, way, False) if way.divided else leave_block(jax.lax.reduce_sum(y, (0,)))
    return checkpoint_name(y, REDUCED)


def collect(y: jax.Array, spec: PartitionSpec, dim: int) -> jax.Array:
    """[parts, ...] partial sums, one of each device -> [...], summed and divided along `dim` as `spec` says."""
    return _travel(y, _along(spec, dim), False)


def split_dim(x: jax.Array, dim: int, parts: int) -> jax.Array:
    """A dim as two, (parts, rest)."""
    return x.reshape(*x.shape[:dim], parts, x.shape[dim] // parts, *x.shape[dim + 1 :])


@dataclasses.dataclass(frozen=True)
class _Way:
    """`stream`: spec of what is divided; `axes` of its `dim`, of `parts` devices.

    `divided`: False where it is whole on each of them, all the same."""

    stream: PartitionSpec
    dim: int
    axes: tuple[str, ...]
    parts: int
    divided: bool = True

    @property
    def copies(self) -> PartitionSpec:
        """Of one copy, or partial sum, for each device."""
        return PartitionSpec(self.axes, *[None if d == self.dim else e for d, e in enumerate(self.stream)])


def _way(x: Any, name: str | None) -> _Way | None:
    """How [batch, seq, embed] is divided between blocks; None where it is not, or not otherwise than in them.

    `name`: of the kernel's divided dim. Products that are rounded have their parts apart where the stream is whole too: a
    part is scaled, and is in the stream's dtype, before it is summed.
    """
    stream, inside = spec_of(x, "batch", "seq", "embed"), spec_of(x, "batch", "seq_block", "embed")
    if stream is None:
        return None
    if stream != inside:
        return _along(stream, 1)
    return None if quantised() is None else _over(stream, 1, _free(name), divided=False)


def _along(spec: PartitionSpec, dim: int) -> _Way:
    return _over(spec, dim, spec[dim] if isinstance(spec[dim], tuple) else (spec[dim],))


def _over(spec: PartitionSpec, dim: int, axes: tuple[str, ...], *, divided: bool = True) -> _Way:
    layout = context.current()
    assert layout is not None and layout.mesh is not None
    parts = math.prod(layout.mesh.shape[a] for a in axes)
    return _Way(spec, dim, axes, parts, divided)


def _divided(names: tuple[str | None, ...]) -> int | None:
    """The dim of a kernel that automatic mesh axes divide."""
    return next((dim for dim, name in enumerate(names) if _free(name)), None)


def _free(name: str | None) -> tuple[str, ...]:
    """The automatic mesh axes, of more than one device, that divide a logical axis."""
    layout = context.current()
    if layout is None or layout.mesh is None or name is None:
        return ()
    sizes = layout.mesh.shape
    return tuple(
        a for a in layout.activations.get(name, ()) if sizes.get(a, 1) > 1 and a not in layout.manual
    )


def _copies(x: jax.Array, way: _Way) -> jax.Array:
    """[parts, ...]: the whole stream once for each device, which has it already. The gradient is their sum."""
    copies = jnp.broadcast_to(enter_block(x), (way.parts, *x.shape))
    return place(copies, PartitionSpec(way.axes, *[None] * x.ndim), context.current())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _travel(x: jax.Array, way: _Way, spread: bool) -> jax.Array:
    """Spread: the divided stream to a copy on each device; else partial sums to the divided stream."""
    layout = context.current()
    assert layout is not None

    def there(local: jax.Array) -> jax.Array:
        if spread:
            return jax.lax.all_gather(local, way.axes, axis=way.dim, tiled=True)[None]
        return reduce_scatter(local[0], way.axes, way.dim)

    ins, outs = (way.stream, way.copies) if spread else (way.copies, way.stream)
    return opaque(on_parts(there, ins, outs, free_axes()))(place(x, ins, layout))


def _travel_back(way: _Way, spread: bool, _: tuple[()], gradient: jax.Array) -> tuple[jax.Array]:
    return (_travel(gradient, way, not spread),)


_travel.defvjp(lambda x, way, spread: (_travel(x, way, spread), ()), _travel_back)


def _letters(equation: str) -> tuple[str, str, str]:
    ins, out = equation.split("->")
    left, right = ins.split(",")
    return left, right, out


def _merged(x: jax.Array, dim: int) -> jax.Array:
    return x.reshape(*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])
