"""Logical axes on values: `logical` for parameters, `constrain` for activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import ShardingError, suggestion
from shardtrain.sharding import context


def logical(initializer: Callable[..., jax.Array], *axes: str | None) -> Callable[..., Any]:
    """An nnx initializer whose parameter carries the logical axes of its dims.

    Args:
        initializer: `(key, shape, dtype) -> array`.
        axes: one logical axis (or None) per dim of the parameter.

    Returns:
        An initializer for `nnx.Linear(kernel_init=...)` and friends. Metadata only: the model
        constructs and runs the same with and without a mesh.
    """
    from flax import nnx

    return nnx.with_partitioning(initializer, axes, eager_sharding=False)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the sharding of an activation by the meaning of its dims.

    Outside a Plan this returns `x` and costs nothing. Inside, axes that an enclosing `shard_map`
    holds (the batch axes) are dropped, since those dims are local there already.

    Args:
        x: array of any dtype; leading dims not named are left alone, so that
            `constrain(x, "mlp")` names the last dim.
        axes: logical axis or None per trailing dim. `"batch"` first names the whole shape.

    Returns:
        `x` with the sharding of the Plan's activation rules.

    Raises:
        ShardingError: more axes than dims, an axis that no rule knows, a dim that does not divide,
            or two dims on one mesh axis.
    """
    spec = spec_of(x, *axes)
    return x if spec is None else place(x, spec, context.current())


def spec_of(x: jax.Array, *axes: str | None) -> PartitionSpec | None:
    """The spec that `constrain` would pin, over the mesh axes that are free; None where it would do nothing."""
    layout = context.current()
    if layout is None:
        return None
    if len(axes) > x.ndim:
        raise ShardingError(
            f"{len(axes)} logical axes {axes} for an array of {x.ndim} dims {x.shape}",
            where="constrain",
            fix="name at most one logical axis per dim",
        )
    dims: list[Any] = []
    used: dict[str, str] = {}
    offset = x.ndim - len(axes)
    sizes: Any = layout.sizes if layout.mesh is None else layout.mesh.shape
    # `constrain(h, "batch", "mlp")` on [batch, seq, mlp]: "batch" is always the leading dim.
    names: list[str | None] = [*[None] * offset, *axes]
    if offset and axes and axes[0] == "batch":
        names = ["batch", *[None] * offset, *axes[1:]]
    for dim, name in enumerate(names):
        if name is None:
            dims.append(None)
            continue
        if name not in layout.activations:
            raise ShardingError(
                f"no activation rule for logical axis '{name}'",
                where=f"constrain{axes}",
                why=f"known: {', '.join(sorted(layout.activations))}",
                fix=suggestion(name, layout.activations, f"rules.override(activations={{'{name}': None}})"),
            )
        free = tuple(a for a in layout.activations[name] if a not in layout.manual and sizes.get(a, 1) > 1)
        for axis in free:
            if axis in used:
                raise ShardingError(
                    f"dims '{used[axis]}' and '{name}' both claim mesh axis '{axis}'",
                    where=f"constrain{axes}",
                    why=f"shape {x.shape}",
                    fix=f"rules.override(activations={{'{name}': None}})",
                )
            used[axis] = name
        size = 1
        for axis in free:
            size *= sizes[axis]
        if x.shape[dim] % size:
            mesh = " ".join(f"{a}={sizes[a]}" for a in free)
            raise ShardingError(
                f"dim {dim} '{name}' = {x.shape[dim]} is not divisible by {size} (mesh {mesh})",
                where=f"constrain{axes}",
                why=f"shape {x.shape}",
                fix=f"a size that {size} divides, a smaller {free[-1]} axis, "
                f"or rules.override(activations={{'{name}': None}})",
            )
        dims.append(free[0] if len(free) == 1 else free or None)
    return None if layout.mesh is None else PartitionSpec(*dims)


def enter_block(x: jax.Array) -> jax.Array:
    """The residual stream as a block's matrices need it: `constrain(x, "batch", "seq_block", "embed")`.

    Where rules divide the stream along the sequence this is the all-gather into the block; its gradient, a partial
    sum, goes back divided: a reduce-scatter, where the transpose of a plain constraint would be an all-reduce.

    Args:
        x: [batch, seq, embed].

    Communicates: where `seq` and `seq_block` differ, f*X forward and f*X backward over the axes of `seq`.
    """
    return _onto(x, "seq_block", "seq")


def leave_block(y: jax.Array) -> jax.Array:
    """The sum that a block's last matrix leaves, as the residual stream: `constrain(y, "batch", "seq", "embed")`.

    The other side of `enter_block`: a reduce-scatter out of the block, and an all-gather of the gradient on its way
    back in. The transpose of a plain constraint would leave the partitioner to gather the matrix instead.

    Args:
        y: [batch, seq, embed].

    Communicates: where `seq` and `seq_block` differ, f*X forward and f*X backward over the axes of `seq`; where they do
    not, the all-reduce of the sum.
    """
    return _onto(y, "seq", "seq_block")


def join_stream(table: jax.Array) -> jax.Array:
    """What every row of the batch adds to the residual stream, such as positions, divided as the stream is.

    Args:
        table: [seq, embed], whole on every device.

    Communicates: where `seq` is divided, an all-gather of its gradient, in its dtype: f*X.
    """
    forward = spec_of(table, "seq", "embed")
    if forward is None or not any(forward):
        return table
    return _cross(table, forward, PartitionSpec())


def _onto(x: jax.Array, there: str, back: str) -> jax.Array:
    """[batch, seq, embed] with its sequence as the rules have it for `there`, and its gradient's as for `back`."""
    forward, backward = spec_of(x, "batch", there, "embed"), spec_of(x, "batch", back, "embed")
    if forward is None or backward is None:
        return x
    return place(x, forward, context.current()) if forward == backward else _cross(x, forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cross(x: jax.Array, there: PartitionSpec, back: PartitionSpec) -> jax.Array:
    """`x` placed, and its gradient placed otherwise."""
    return place(x, there, context.current())


def _cross_forward(x: jax.Array, there: PartitionSpec, back: PartitionSpec) -> tuple[jax.Array, tuple[()]]:
    return place(x, there, context.current()), ()


def _cross_backward(
    there: PartitionSpec, back: PartitionSpec, _: tuple[()], gradient: jax.Array
) -> tuple[jax.Array]:
    return (place(gradient, back, context.current()),)


_cross.defvjp(_cross_forward, _cross_backward)


def place(x: jax.Array, spec: PartitionSpec, layout: Any) -> jax.Array:
    """`with_sharding_constraint` that also works where some axes are manual."""
    mesh: Any = layout.mesh
    if layout.manual:
        mesh = jax.sharding.get_abstract_mesh()  # a concrete mesh is refused inside shard_map
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
