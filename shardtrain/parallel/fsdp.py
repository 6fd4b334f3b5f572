"""Weights kept as shards and made whole where they are used."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.mesh import device_of
from shardtrain.mesh.build import SLOW
from shardtrain.parallel.region import on_parts
from shardtrain.parallel.remat import GATHERED
from shardtrain.sharding import context
from shardtrain.sharding.rules import SMALL, spec_axes
from shardtrain.tree import path_name

RING = 8  # chips; see `_rings`


@dataclasses.dataclass(frozen=True)
class Shard:
    """How one parameter leaf arrives inside the manual region, and what it becomes.

    `dim`, `axes`: the dim that is a shard over these manual mesh axes (None: whole already).
    `kept`: (dim, manual mesh axes) of dims that stay divided: of experts, or layers, each device runs its own.
    `spec`: the remaining sharding of the whole leaf, over the automatic axes.
    `compute`, `wire`, `reduce`: dtypes of the whole leaf, of the gather, of the gradient's reduction.
    """

    dim: int | None
    axes: tuple[str, ...]
    spec: PartitionSpec
    compute: Any
    wire: Any
    reduce: Any
    kept: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def kept_axes(self) -> tuple[str, ...]:
        """Mesh axes over which a gradient is not reduced: each device has another part of the leaf."""
        return tuple(a for _, axes in self.kept for a in axes)

    def whole(self) -> Shard:
        """The same leaf once it has been gathered."""
        return dataclasses.replace(self, dim=None, axes=())

    def without_leading(self) -> Shard:
        """The same leaf inside a scan over its leading (layers) dim."""
        dim = None if self.dim is None else self.dim - 1
        kept = tuple((d - 1, axes) for d, axes in self.kept if d)
        return dataclasses.replace(self, dim=dim, spec=PartitionSpec(*self.spec[1:]), kept=kept)


def gather(tree: Any, path: str) -> Any:
    """Make the parameters of one layer whole, inside the layer that uses them.

    A model that scans over its own layers calls this once at the top of the scanned body, with the
    path of the stacked parameters in the model. Then FSDP gathers one layer at a time; without it
    the whole stack is gathered before the scan. Outside a Plan it returns `tree`.

    Args:
        tree: parameters of one layer as the scan slices them: an `nnx.State`, an `nnx.Module`, or a
            pytree of arrays.
        path: where the stack lives in the model, for instance `"blocks"`.

    Communicates: all-gather of f*X bytes forward and again in the backward, reduce-scatter of f*X,
    for X bytes of parameters in the wire dtype and f = (n-1)/n over the fsdp axis.
    """
    layout = context.current()
    if layout is None:
        return tree
    layout.gathered.add(path)
    if not layout.params:
        return tree
    from flax import nnx

    if isinstance(tree, nnx.Module):
        graph, state = nnx.split(tree)
        return nnx.merge(graph, gather(state, path))

    def whole(key_path: Any, leaf: Any) -> Any:
        shard = layout.params.get(f"{path}/{path_name(key_path)}".removesuffix("/value"))
        return leaf if shard is None else gather_leaf(leaf, shard.without_leading())

    return jax.tree_util.tree_map_with_path(whole, tree)


def meet(x: jax.Array, leaf: jax.Array, path: str) -> tuple[jax.Array, jax.Array]:
    """`x`, and a parameter outside of stacks that is made whole here, where `x` meets it, and not before the loss.

    Its gradient is a shard again before that of `x` goes on: without, the gradient of a head waits whole, in float32, until
    the backward of all layers is done. Outside a Plan, and where nothing divides it or it is held, nothing happens.

    Args:
        path: of the parameter in the model.

    Communicates: an all-gather of f*X bytes forward, a reduce-scatter of f*X, as it would before the loss.
    """
    layout = context.current()
    if layout is None:
        return x, leaf
    layout.met.add(path)
    if path not in layout.late:
        return x, leaf
    x, leaf = _together(x, leaf)
    return x, gather_leaf(leaf, layout.params[path])


@jax.custom_vjp
def _together(x: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both; their gradients leave together."""
    return x, leaf


_together.defvjp(
    lambda x, leaf: ((x, leaf), None), lambda _, gradients: tuple(jax.lax.optimization_barrier(gradients))
)


def gather_leaf(leaf: jax.Array, shard: Shard) -> jax.Array:
    """One leaf made whole in the compute dtype; its gradient comes back as a shard."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if shard.dim is None:
        return leaf.astype(shard.compute)
    return checkpoint_name(_gather(leaf, shard), GATHERED)


def _local(function: Callable[[jax.Array], jax.Array], shard: Shard) -> Callable[[jax.Array], jax.Array]:
    """`function` on what one device holds of the leaf."""
    return on_parts(function, shard.spec, shard.spec, spec_axes(shard.spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(leaf: jax.Array, shard: Shard) -> jax.Array:
    def whole(local: jax.Array) -> jax.Array:
        assert shard.dim is not None
        return _all_gather(local.astype(shard.wire), shard.axes, shard.dim)

    return _local(whole, shard)(leaf).astype(shard.compute)


def _gather_forward(leaf: jax.Array, shard: Shard) -> tuple[jax.Array, jax.Array]:
    return _gather(leaf, shard), jnp.zeros(0, leaf.dtype)


def _gather_backward(shard: Shard, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    def scatter(local: jax.Array) -> jax.Array:
        assert shard.dim is not None
        return reduce_scatter(_declared(local, shard), shard.axes, shard.dim)

    return (_local(scatter, shard)(gradient).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """Mark values as different on each device of `axes`, so that nothing is reduced behind our back."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All arrays varying over the manual mesh axes that any of them varies over.

    A scan's carry must start with the type it ends with, and inside `shard_map` the varying axes are part
    of the type. Outside it does nothing.
    """
    axes = sorted(set().union(*(jax.typeof(a).mat.varying for a in arrays)))
    return varying(arrays, tuple(axes))


def reduce_leaf(gradient: jax.Array, shard: Shard, target: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """The one reduction of a gradient over the batch axes that its gather has not reduced yet.

    Args:
        gradient: this device's sum, float32 or wider; a shard already along `shard.axes`.
        target: spec in which it is wanted; batch axes in it that `shard` lacks are scattered over.
        axes: all mesh axes over which gradients are sums.

    Communicates: all-reduce 2f*X, or reduce-scatter f*X where the target is divided further. Of an all-reduce over
    slice and others only 2(s-1)/s * X/n crosses slices, for n devices within one.
    """
    rest = tuple(a for a in axes if a not in shard.axes and a not in shard.kept_axes)
    scatter = [
        (dim, tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in rest))
        for dim, entry in enumerate(target)
    ]
    scatter = [(dim, over) for dim, over in scatter if over]

    def reduce(local: jax.Array) -> jax.Array:
        local = _declared(local, shard)
        for dim, over in scatter:
            local = reduce_scatter(local, over, dim)
        others = tuple(a for a in rest if not any(a in over for _, over in scatter))
        return _all_reduce(local, others) if others else local

    return _local(reduce, shard)(gradient).astype(gradient.dtype) if rest else gradient


def _declared(x: jax.Array, shard: Shard) -> jax.Array:
    """In the dtype of the reduction. The barrier keeps the TPU compiler from reducing in 16 bits what was only just
    converted from them; without need it would keep reductions from being combined."""
    x = x.astype(shard.reduce)
    return x if shard.compute == shard.reduce else jax.lax.optimization_barrier(x)


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """`psum_scatter` along `dim`, as a stack of matrices whose parts are at least 128 high where the shape has it.

    Of four dims and more, or of low parts, the TPU compiler makes an all-reduce (measured on stacks of heads). A dim and
    those right after it have the same parts. On a vector's low parts it gives up (seen at 2 over 64 chips of
    v5e:8x8, and at 8 over 16 of them): those are small, reduced whole and cut. The last dim of a larger leaf becomes the
    first one for as long.
    """
    before, after, height = x.shape[:dim], list(x.shape[dim + 1 :]), x.shape[dim]
    least = 128 * jax.lax.axis_size(axes)
    while len(after) > 1 and height < least:
        height *= after.pop(0)
    width = math.prod(after)
    if _on_tpu() and width == 1 and height < least:
        if height * math.prod(before[:-1]) >= least:
            return jnp.moveaxis(reduce_scatter(jnp.moveaxis(x, dim, 0), axes, 0), 0, dim)
        total = jax.lax.optimization_barrier(jax.lax.psum(x, axes))  # or the compiler makes the same of it
        part = x.shape[dim] // jax.lax.axis_size(axes)
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index(axes) * part, part, dim)
    flat = x.reshape(math.prod(before), height, width)
    (slow, within), left = across(axes), axes
    if (
        slow and within and tuple(axes) == (*slow, *within)
    ):  # within a slice first: what crosses is a part of a part
        flat = _scattered(flat.reshape(flat.shape[0] * jax.lax.axis_size(slow), -1, flat.shape[2]), within)
        flat, left = flat.reshape(math.prod(before), -1, flat.shape[2]), slow
    return _scattered(flat, left).reshape(*before, -1, *x.shape[dim + 1 :])


def _scattered(flat: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    for axis, groups in _rings(axes):
        flat = jax.lax.psum_scatter(flat, axis, scatter_dimension=1, axis_index_groups=groups, tiled=True)
    return flat


def across(axes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of mesh axes those across the slow network, and those within a slice."""
    return tuple(a for a in axes if a in SLOW), tuple(a for a in axes if a not in SLOW)


def _all_gather(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Across slices first, while each device has its part alone; then within."""
    slow, within = across(axes)
    if not (slow and within) or axes != (*slow, *within):
        return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    parts = jax.lax.all_gather(jax.lax.all_gather(x, slow, axis=dim), within, axis=dim + 1, tiled=True)
    return parts.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def _on_tpu() -> bool:
    layout = context.current()
    return layout is not None and layout.mesh is not None and device_of(layout.mesh).platform == "tpu"


def _rings(axes: tuple[str, ...]) -> list[tuple[Any, Any]]:
    """Reduce-scatters that make up the one over `axes`: (axis, groups of its indices or None) each.

    One is the rule. The TPU compiler makes an all-reduce of one over more than a ring of eight chips (seen on v5e:4x4 and
    v5p:2x2x4), so there it is done in turn over rings of at most eight: the same bytes, (n-1)/n in all.
    """
    if not _on_tpu() or jax.lax.axis_size(axes) <= RING:
        return [(axes, None)]
    turns: list[tuple[Any, Any]] = []
    for axis in axes:
        done, left = 1, jax.lax.axis_size(axis)
        for ring in _factors(left):
            left //= ring
            # Members of a group differ in one digit of their index; those before it are done.
            groups = [
                [(high * ring + digit) * left + low for digit in range(ring)]
                for high in range(done)
                for low in range(left)
            ]
            turns.append((axis, groups if len(groups) > 1 else None))
            done *= ring
    return turns


def _factors(n: int) -> list[int]:
    """16 -> 4, 4; 32 -> 4, 8: each at most `RING`, where `n` has such factors."""
    low = max((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), default=n)
    return [n] if n <= RING or low == n else [*_factors(low), *_factors(n // low)]


def _all_reduce(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`psum`, of which only a part crosses slices: reduce-scatter within, all-reduce across, all-gather within.

    The bytes are those of one all-reduce over all axes, but the slow network carries an n-th of them.
    """
    slow, within = across(axes)
    size = jax.lax.axis_size(within) if within else 1
    dim = next((d for d, n in enumerate(x.shape) if n % size == 0), None)
    if within == axes or not within or dim is None or x.size < SMALL:
        return jax.lax.psum(x, axes)
    part = jax.lax.psum(reduce_scatter(x, within, dim), slow)
    return jax.lax.all_gather(part, within, axis=dim, tiled=True, to="invarying")
