"""What each device does of a step: its own shards and its own groups of rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.fsdp import Shard, gather_leaf, varying
from shardtrain.parallel.groups import Loss, group_key
from shardtrain.parallel.pipeline import Pipeline
from shardtrain.parallel.precision import wide
from shardtrain.parallel.stages import STAGE
from shardtrain.sharding import context
from shardtrain.train.pipelined import PartFunctions, pipelined
from shardtrain.tree import flatten

LossFunction = Callable[[Any, Any, Any, jax.Array, Any], tuple[Loss, Any]]
"""`(params, frozen, variables, key, rows) -> (Loss, new variables)`: one group."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepParts:
    """What a step is made of; a Plan fills it in.

    `shards`: path -> `Shard` as the loss sees the leaf, for `params` and `frozen` alike; `held`: as it arrives,
    of leaves that are gathered once for the whole step. `reduced`: path -> the spec in which a
    gradient leaves the reduction. `stacks`: path prefixes that the model makes whole itself.
    `regather`: weights that were made whole before the loss are gathered again for the backward.
    `groups`: G of the run. `batch_axes`: mesh axes of more than one device that divide the rows; `sequence_axes`:
    those that divide dim 1 of every batch field that has one.
    `merges`: path of a variable -> mean, sum or last. `pipeline`: where `stage` divides the layers, with `functions`.
    """

    mesh: AnyMesh
    layout: context.Layout
    batch_axes: tuple[str, ...]
    sequence_axes: tuple[str, ...]
    shards: Mapping[str, Shard]
    held: Mapping[str, Shard]
    reduced: Mapping[str, PartitionSpec]
    stacks: frozenset[str]
    groups: int
    loss: LossFunction
    merges: Mapping[str, str]
    regather: bool
    pipeline: Pipeline | None = None
    functions: PartFunctions | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes held by hand, over which gradients and losses are sums."""
        return (*self.batch_axes, *self.sequence_axes, *((STAGE,) if self.pipeline else ()))

    def field_spec(self, leaf: Any) -> PartitionSpec:
        """Where a field of the batch lives: [rows, sequence, ...]."""
        return field_spec(leaf.ndim, self.batch_axes, self.sequence_axes)

    @property
    def shard_count(self) -> int:
        """Devices (or tensor groups of devices) that divide the batch."""
        return math.prod(self.mesh.shape[a] for a in self.batch_axes)


def field_spec(ndim: int, rows: tuple[str, ...], sequence: tuple[str, ...]) -> PartitionSpec:
    """Of a batch field: its rows over some axes, and dim 1 over others."""
    return PartitionSpec(rows or None, sequence) if sequence and ndim > 1 else PartitionSpec(rows or None)


def by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    leaves = [function(path, leaf) for path, leaf in flatten(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def whole_tree(parts: StepParts, tree: Any) -> Any:
    """Parameters as the loss sees them: whole, in the compute dtype, but for stacks and others gathered later, and tables
    whose rows are exchanged."""
    layout = parts.layout

    def whole(path: str, leaf: Any) -> Any:
        if (
            path in layout.exchanged
            or path in layout.late
            or any(path.startswith(f"{prefix}/") for prefix in parts.stacks)
        ):
            return leaf
        return gather_leaf(leaf, parts.shards[path])

    return by_path(whole, tree)


def held_tree(parts: StepParts, tree: Any) -> Any:
    """The tree with those leaves gathered that stay whole for the step."""
    return by_path(lambda p, leaf: gather_leaf(leaf, parts.held[p]) if p in parts.held else leaf, tree)


def manual_part(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The part of a spec that the manual region sees: only the batch axes."""
    dims = [tuple(a for a in ((d,) if isinstance(d, str) else d or ()) if a in axes) for d in spec]
    return PartitionSpec(*[d[0] if len(d) == 1 else d or None for d in dims])


def on_devices(parts: StepParts, local: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`local(params, model_state, key, step, group ids, rows)` on every device's own rows and shards."""

    def run(params: Any, model_state: Any, key: jax.Array, step: jax.Array, batch: Any) -> Any:
        def body(params: Any, model_state: Any, *rest: Any) -> Any:
            return local(*varying((params, model_state), parts.axes), *rest)

        mapped = body
        if parts.axes:
            rows, whole = PartitionSpec(parts.batch_axes or None), PartitionSpec()
            arrive = {**parts.shards, **parts.held}
            specs = by_path(lambda p, _: _placed(arrive[p]), params)
            state_specs = {k: jax.tree.map(lambda _: whole, v) for k, v in model_state.items()}
            if "frozen" in model_state:
                state_specs["frozen"] = by_path(lambda p, _: _placed(arrive[p]), model_state["frozen"])
            mapped = jax.shard_map(
                body,
                mesh=parts.mesh,
                in_specs=(specs, state_specs, whole, whole, rows, jax.tree.map(parts.field_spec, batch)),
                out_specs=out_specs,
                axis_names=set(parts.layout.manual),
            )
        with context.use(parts.layout):
            return mapped(
                params, dict(model_state), key, step, jnp.arange(parts.groups, dtype=jnp.uint32), batch
            )

    return run


def in_pipeline(
    parts: StepParts,
    params: Any,
    frozen: Any,
    variables: Any,
    keys: Any,
    batch: Any,
    told: Callable[[Loss, jax.Array], Any],
    *,
    train: bool,
) -> Any:
    """Gradients, and what is `told` of each loss and new variables, of this stage's part of all groups that its batch shard holds."""
    assert parts.pipeline is not None and parts.functions is not None
    key, step, groups = keys
    return pipelined(
        parts.pipeline,
        parts.functions,
        params,
        frozen,
        variables,
        whole=lambda tree: whole_tree(parts, tree),
        rng=lambda i: group_key(jax.random.wrap_key_data(key), step, groups[i]),
        rows=group_rows(batch, parts),
        told=told,
        last=lambda path: merges(path, flatten(variables)[path], parts) == "last",
        axes=parts.axes,
        train=train,
        masked=bool(parts.sequence_axes) and parts.layout.attention == "ring",
    )


def _placed(shard: Shard) -> PartitionSpec:
    dims = dict(shard.kept) if shard.dim is None else {**dict(shard.kept), shard.dim: shard.axes}
    return PartitionSpec(*[dims.get(d) for d in range(max(dims, default=-1) + 1)])


def over_groups(
    function: Callable[..., Any], groups: jax.Array, batch: Any, parts: StepParts, last: Any = False
) -> Any:
    """Sum of `function(group, rows)` over the groups that this device holds, one after the other; of whole numbers, and
    where `last` (a prefix of the result) is true, that of the last group."""
    rows = group_rows(batch, parts)
    if groups.shape[0] == 1:
        return function(groups[0], jax.tree.map(lambda x: x[0], rows))

    function = jax.jit(function, inline=True)  # traced once, for its shapes and in the loop
    first = jax.eval_shape(function, groups[0], jax.tree.map(lambda x: x[0], rows))
    zeros = varying(jax.tree.map(lambda s: jnp.zeros(s.shape, _accumulator(s.dtype)), first), parts.axes)

    lasts = jax.tree.map(lambda s, flag: flag or _is_last(s), first, jax.tree.broadcast(last, first))

    def body(total: Any, xs: Any) -> Any:
        add = lambda flag, t, o: o.astype(t.dtype) if flag else t + o.astype(t.dtype)  # noqa: E731
        return jax.tree.map(add, lasts, total, function(*xs)), None

    return jax.lax.scan(body, zeros, (groups, rows))[0]


def group_rows(batch: Any, parts: StepParts) -> Any:
    """[groups of this batch shard, rows of a group, ...]."""
    count = parts.groups // parts.shard_count
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def _accumulator(dtype: Any) -> Any:
    return wide(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _is_last(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating)


def merges(path: str, variable: Any, parts: StepParts) -> str:
    return parts.merges.get(path, "last" if _is_last(variable) else "mean")


def merge(total: jax.Array, path: str, old: jax.Array, parts: StepParts) -> jax.Array:
    """One variable from the copies of the groups (and of parts of a sequence): mean of floats, the last of all else."""
    how, axes = merges(path, old, parts), parts.axes
    copies = parts.groups * math.prod(parts.mesh.shape[a] for a in parts.sequence_axes)
    if how == "last":
        if parts.pipeline is not None:  # of the last stage; the others have none
            total, axes = jax.lax.psum(total, STAGE), tuple(a for a in axes if a != STAGE)
        return jax.lax.pmax(total, axes) if axes else total
    total = jax.lax.psum(total, axes) if axes else total
    if how == "sum":
        old = jax.lax.pmax(old, axes) if axes else old
        return (total - (copies - 1) * old).astype(old.dtype)
    return (total / copies).astype(old.dtype)
