"""The step: gradients -> reduce -> update.

Gradients are taken where the batch axes are manual (`shard_map`): each device runs the plain loss on
its own groups of rows, gathers weights where it uses them, and reduces once. The tensor axis stays
automatic inside. The update runs outside, on global arrays, so any optax transform is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.fsdp import Shard, gather_leaf, reduce_leaf, varying
from shardtrain.parallel.groups import Loss, group_key
from shardtrain.parallel.pipeline import Pipeline
from shardtrain.parallel.precision import wide, widen
from shardtrain.parallel.remat import remat
from shardtrain.parallel.stages import STAGE
from shardtrain.sharding import context
from shardtrain.train import guard as guards
from shardtrain.train.pipelined import PartFunctions, pipelined
from shardtrain.train.state import TrainState, advance
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


def _by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    leaves = [function(path, leaf) for path, leaf in flatten(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _whole(parts: StepParts, tree: Any) -> Any:
    """Parameters as the loss sees them: whole, in the compute dtype, but for stacks gathered later and tables whose
    rows are exchanged."""

    def whole(path: str, leaf: Any) -> Any:
        if path in parts.layout.exchanged or any(path.startswith(f"{prefix}/") for prefix in parts.stacks):
            return leaf
        return gather_leaf(leaf, parts.shards[path])

    return _by_path(whole, tree)


def _held(parts: StepParts, tree: Any) -> Any:
    """The tree with those leaves gathered that stay whole for the step."""
    return _by_path(lambda p, leaf: gather_leaf(leaf, parts.held[p]) if p in parts.held else leaf, tree)


def _manual(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The part of a spec that the manual region sees: only the batch axes."""
    dims = [tuple(a for a in ((d,) if isinstance(d, str) else d or ()) if a in axes) for d in spec]
    return PartitionSpec(*[d[0] if len(d) == 1 else d or None for d in dims])


def _scalars(loss: Loss) -> tuple[jax.Array, tuple[str, ...]]:
    """`[sum, weight, then two of each metric]` as one vector, so that they travel together."""
    dtype = wide(loss.sum)
    weight = jnp.asarray(loss.weight, dtype)
    values = [jnp.asarray(loss.sum, dtype), weight]
    for value in loss.metrics.values():
        pair = value if isinstance(value, tuple) else (value * weight, weight)
        values += [jnp.asarray(v, dtype) for v in pair]
    return jnp.stack(values), tuple(loss.metrics)


def gradients(
    parts: StepParts, params: Any, model_state: Mapping[str, Any], key: jax.Array, step: jax.Array, batch: Any
) -> tuple[Any, jax.Array, Any, tuple[str, ...]]:
    """Sum over all groups of the gradients of `Loss.sum`, the scalars, and the merged variables.

    Returns:
        Gradients (float32 or wider, not divided by the weight) in the specs `parts.reduced`; a vector
        `[sum, weight, ...]`; new variables; the names of the metrics in the vector.

    Communicates: per group, what `gather` says for sharded parameters; once per step, all-reduce
    (2f*X) or reduce-scatter (f*X) of the gradients in the reduce dtype over the batch axes.
    """
    names: list[tuple[str, ...]] = []

    def one_group(
        params: Any, frozen: Any, variables: Any, key: jax.Array, step: jax.Array, group: jax.Array, rows: Any
    ) -> Any:
        group_rng = group_key(jax.random.wrap_key_data(key), step, group)

        def objective(params: Any) -> Any:
            loss, new = parts.loss(_whole(parts, params), _whole(parts, frozen), variables, group_rng, rows)
            scalars, metric_names = _scalars(loss)
            names.append(metric_names)
            return jnp.asarray(loss.sum, scalars.dtype), (scalars, new)

        if parts.regather:
            objective = remat(objective, "none")
        (_, (scalars, new)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(widen, grads), scalars, new

    def local(
        params: Any, model_state: Any, key: jax.Array, step: jax.Array, groups: jax.Array, batch: Any
    ) -> Any:
        params, frozen = _held(parts, params), _held(parts, model_state.get("frozen", {}))
        variables = model_state.get("variables", {})
        if parts.pipeline is not None:
            grads, (scalars, new) = _pipelined(
                parts, params, frozen, variables, (key, step, groups), batch, _named(names), train=True
            )
        else:
            grads, scalars, new = _over_groups(
                lambda group, rows: one_group(params, frozen, variables, key, step, group, rows),
                groups,
                batch,
                parts,
                last=(False, False, _by_path(lambda p, v: _merges(p, v, parts) == "last", variables)),
            )
        grads = _by_path(lambda p, g: reduce_leaf(g, parts.shards[p], parts.reduced[p], parts.axes), grads)
        old = flatten(variables)
        new = _by_path(lambda p, n: _merge(n, p, old[p], parts), new)
        return grads, scalars[None], new

    outs = (
        _by_path(lambda p, _: _manual(parts.reduced[p], parts.axes), params),
        PartitionSpec(parts.axes or None),
        jax.tree.map(lambda _: PartitionSpec(), model_state.get("variables", {})),
    )
    grads, scalars, new = _on_devices(parts, local, outs)(params, model_state, key, step, batch)
    # Where the model left a gradient divided, it is gathered once, here, and not each part of its update.
    grads = _by_path(
        lambda p, g: jax.lax.with_sharding_constraint(g, NamedSharding(parts.mesh, parts.reduced[p])), grads
    )
    return grads, scalars.sum(axis=0), new, names[0]


def choices(parts: StepParts, state: TrainState, batch: Any) -> jax.Array:
    """The metric `choices` [rows, tokens, ...] of every group, in the forward of this step, as devices hold them.

    `parts.loss` and `parts.functions`: of `Stages.choices`.
    """

    def local(
        params: Any, model_state: Any, key: jax.Array, step: jax.Array, groups: jax.Array, batch: Any
    ) -> Any:
        params, frozen = _held(parts, params), _held(parts, model_state.get("frozen", {}))
        variables, count = model_state.get("variables", {}), groups.shape[0]

        def one(xs: Any) -> jax.Array:
            group_rng = group_key(jax.random.wrap_key_data(key), step, xs[0])
            whole = _whole(parts, params), _whole(parts, frozen)
            return parts.loss(*whole, variables, group_rng, xs[1])[0].metrics["choices"]

        def at(loss: Loss, i: jax.Array) -> jax.Array:
            made = loss.metrics["choices"]
            return varying(jnp.zeros((count, *made.shape), made.dtype), parts.axes).at[i].set(made)

        if parts.pipeline is not None:
            keys = key, step, groups
            found = _pipelined(parts, params, frozen, variables, keys, batch, at, train=False)[1][0]
            made = jax.lax.psum(found, STAGE)  # the last stage has them
        else:
            made = jax.lax.map(one, (groups, _rows(batch, parts)))
        return made.reshape(-1, *made.shape[2:])

    outs = field_spec(2, parts.batch_axes, parts.sequence_axes)
    run = _on_devices(parts, local, outs)
    return run(state.params, state.model_state, state.key, state.step, batch)


def _on_devices(parts: StepParts, local: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`local(params, model_state, key, step, group ids, rows)` on every device's own rows and shards."""

    def run(params: Any, model_state: Any, key: jax.Array, step: jax.Array, batch: Any) -> Any:
        def body(params: Any, model_state: Any, *rest: Any) -> Any:
            return local(*varying((params, model_state), parts.axes), *rest)

        mapped = body
        if parts.axes:
            rows, whole = PartitionSpec(parts.batch_axes or None), PartitionSpec()
            arrive = {**parts.shards, **parts.held}
            specs = _by_path(lambda p, _: _placed(arrive[p]), params)
            state_specs = {k: jax.tree.map(lambda _: whole, v) for k, v in model_state.items()}
            if "frozen" in model_state:
                state_specs["frozen"] = _by_path(lambda p, _: _placed(arrive[p]), model_state["frozen"])
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


def _named(names: list[tuple[str, ...]]) -> Callable[[Loss, jax.Array], jax.Array]:
    """The scalars of a loss; the names of its metrics go into the list."""

    def scalars(loss: Loss, _: jax.Array) -> jax.Array:
        vector, metric_names = _scalars(loss)
        names.append(metric_names)
        return vector

    return scalars


def _pipelined(
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
        whole=lambda tree: _whole(parts, tree),
        rng=lambda i: group_key(jax.random.wrap_key_data(key), step, groups[i]),
        rows=_rows(batch, parts),
        told=told,
        last=lambda path: _merges(path, flatten(variables)[path], parts) == "last",
        axes=parts.axes,
        train=train,
        masked=bool(parts.sequence_axes) and parts.layout.attention == "ring",
    )


def _placed(shard: Shard) -> PartitionSpec:
    dims = dict(shard.kept) if shard.dim is None else {**dict(shard.kept), shard.dim: shard.axes}
    return PartitionSpec(*[dims.get(d) for d in range(max(dims, default=-1) + 1)])


def _over_groups(
    function: Callable[..., Any], groups: jax.Array, batch: Any, parts: StepParts, last: Any = False
) -> Any:
    """Sum of `function(group, rows)` over the groups that this device holds, one after the other; of whole numbers, and
    where `last` (a prefix of the result) is true, that of the last group."""
    rows = _rows(batch, parts)
    if groups.shape[0] == 1:
        return function(groups[0], jax.tree.map(lambda x: x[0], rows))

    first = jax.eval_shape(function, groups[0], jax.tree.map(lambda x: x[0], rows))
    zeros = varying(jax.tree.map(lambda s: jnp.zeros(s.shape, _accumulator(s.dtype)), first), parts.axes)

    lasts = jax.tree.map(lambda s, flag: flag or _is_last(s), first, jax.tree.broadcast(last, first))

    def body(total: Any, xs: Any) -> Any:
        add = lambda flag, t, o: o.astype(t.dtype) if flag else t + o.astype(t.dtype)  # noqa: E731
        return jax.tree.map(add, lasts, total, function(*xs)), None

    return jax.lax.scan(body, zeros, (groups, rows))[0]


def _rows(batch: Any, parts: StepParts) -> Any:
    """[groups of this batch shard, rows of a group, ...]."""
    count = parts.groups // parts.shard_count
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def _accumulator(dtype: Any) -> Any:
    return wide(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _is_last(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating)


def _merges(path: str, variable: Any, parts: StepParts) -> str:
    return parts.merges.get(path, "last" if _is_last(variable) else "mean")


def _merge(total: jax.Array, path: str, old: jax.Array, parts: StepParts) -> jax.Array:
    """One variable from the copies of the groups (and of parts of a sequence): mean of floats, the last of all else."""
    how, axes = _merges(path, old, parts), parts.axes
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


def train_step(
    parts: StepParts,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Any, jax.Array], Any],
    state: TrainState,
    batch: Any,
    guard: guards.Guard | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on one global batch; under a `guard`, none on a bad one.

    theta <- theta - update(sum_g grad_g / sum_g weight_g): with equal weights and SGD this is
    theta - (eta/P) sum_i g_i. See `tests/parity/test_update_rule.py`.
    """
    grads, scalars, variables, names = gradients(
        parts, state.params, state.model_state, state.key, guards.updates(guard, state), batch
    )
    weight = jnp.maximum(scalars[1], jnp.finfo(scalars.dtype).tiny)
    grads = jax.tree.map(lambda g: g / weight, grads)
    params = state.params
    updates, opt_state = optimizer.update(grads, state.opt_state, jax.tree.map(widen, params))
    params = optax.apply_updates(params, updates)
    metrics = {
        "loss": scalars[0] / weight,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(jax.tree.map(widen, params)),
        "tokens": scalars[1],
    }
    grad_state, told = state.grad_state, dict[str, jax.Array]()
    if guard is not None:
        made = (params, opt_state, variables)
        made, grad_state, told = guards.guarded(guard, state, made, metrics)
        params, opt_state, variables = made
    rate = learning_rate(opt_state, state.step)
    if rate is not None:
        metrics["learning_rate"] = jnp.float32(rate)
    metrics.update(_ratios(scalars, names), **told)
    rows = jax.tree.leaves(batch)[0].shape[0]
    new = state.replace(
        step=state.step + 1,
        params=params,
        model_state={**state.model_state, "variables": variables} if variables else state.model_state,
        opt_state=opt_state,
        grad_state=grad_state,
        cursor=advance(state.cursor, rows),
    )
    return new, metrics


def _ratios(scalars: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    return {
        name: scalars[2 + 2 * i] / jnp.maximum(scalars[3 + 2 * i], jnp.finfo(scalars.dtype).tiny)
        for i, name in enumerate(names)
    }


def evaluate_step(parts: StepParts, state: TrainState, batch: Any) -> dict[str, jax.Array]:
    """Sums of the loss and its weight (and of each metric) over one batch; no gradients, nothing changed."""
    names: list[tuple[str, ...]] = []

    def local(
        params: Any, model_state: Any, key: jax.Array, step: jax.Array, groups: jax.Array, batch: Any
    ) -> Any:
        params, frozen = _held(parts, params), _held(parts, model_state.get("frozen", {}))
        variables = model_state.get("variables", {})

        def one(group: jax.Array, rows: Any) -> jax.Array:
            group_rng = group_key(jax.random.wrap_key_data(key), step, group)
            loss, _ = parts.loss(_whole(parts, params), _whole(parts, frozen), variables, group_rng, rows)
            scalars, metric_names = _scalars(loss)
            names.append(metric_names)
            return scalars

        if parts.pipeline is not None:
            keys = key, step, groups
            return _pipelined(parts, params, frozen, variables, keys, batch, _named(names), train=False)[1][
                0
            ][None]
        return _over_groups(one, groups, batch, parts)[None]

    run = _on_devices(parts, local, PartitionSpec(parts.axes or None))
    scalars = run(state.params, state.model_state, state.key, jnp.int32(0), batch).sum(axis=0)
    result = {"loss_sum": scalars[0], "loss_weight": scalars[1]}
    for i, name in enumerate(names[0]):
        result[f"{name}_sum"], result[f"{name}_weight"] = scalars[2 + 2 * i], scalars[3 + 2 * i]
    return result
