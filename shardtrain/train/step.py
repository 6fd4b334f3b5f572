"""The step: gradients -> reduce -> update.

Gradients are taken where the batch axes are manual (`shard_map`): each device runs the plain loss on
its own groups of rows, gathers weights where it uses them, and reduces once. The tensor axis stays
automatic inside. The update runs outside, on global arrays, so any optax transform is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.parallel.fsdp import reduce_leaf, varying
from shardtrain.parallel.groups import Loss, group_key
from shardtrain.parallel.precision import wide, widen
from shardtrain.parallel.remat import remat
from shardtrain.parallel.stages import STAGE
from shardtrain.train import guard as guards
from shardtrain.train.parts import (
    StepParts,
    by_path,
    field_spec,
    group_rows,
    held_tree,
    in_pipeline,
    manual_part,
    merge,
    merges,
    on_devices,
    over_groups,
    whole_tree,
)
from shardtrain.train.state import TrainState, advance
from shardtrain.tree import flatten


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
            loss, new = parts.loss(
                whole_tree(parts, params), whole_tree(parts, frozen), variables, group_rng, rows
            )
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
        params, frozen = held_tree(parts, params), held_tree(parts, model_state.get("frozen", {}))
        variables = model_state.get("variables", {})
        if parts.pipeline is not None:
            grads, (scalars, new) = in_pipeline(
                parts, params, frozen, variables, (key, step, groups), batch, _named(names), train=True
            )
        else:
            grads, scalars, new = over_groups(
                lambda group, rows: one_group(params, frozen, variables, key, step, group, rows),
                groups,
                batch,
                parts,
                last=(False, False, by_path(lambda p, v: merges(p, v, parts) == "last", variables)),
            )
        grads = by_path(lambda p, g: reduce_leaf(g, parts.shards[p], parts.reduced[p], parts.axes), grads)
        old = flatten(variables)
        new = by_path(lambda p, n: merge(n, p, old[p], parts), new)
        return grads, scalars[None], new

    outs = (
        by_path(lambda p, _: manual_part(parts.reduced[p], parts.axes), params),
        PartitionSpec(parts.axes or None),
        jax.tree.map(lambda _: PartitionSpec(), model_state.get("variables", {})),
    )
    grads, scalars, new = on_devices(parts, local, outs)(params, model_state, key, step, batch)
    # Where the model left a gradient divided, it is gathered once, here, and not each part of its update.
    grads = by_path(
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
        params, frozen = held_tree(parts, params), held_tree(parts, model_state.get("frozen", {}))
        variables, count = model_state.get("variables", {}), groups.shape[0]

        def one(xs: Any) -> jax.Array:
            group_rng = group_key(jax.random.wrap_key_data(key), step, xs[0])
            whole = whole_tree(parts, params), whole_tree(parts, frozen)
            return parts.loss(*whole, variables, group_rng, xs[1])[0].metrics["choices"]

        def at(loss: Loss, i: jax.Array) -> jax.Array:
            made = loss.metrics["choices"]
            return varying(jnp.zeros((count, *made.shape), made.dtype), parts.axes).at[i].set(made)

        if parts.pipeline is not None:
            keys = key, step, groups
            found = in_pipeline(parts, params, frozen, variables, keys, batch, at, train=False)[1][0]
            made = jax.lax.psum(found, STAGE)  # the last stage has them
        else:
            made = jax.lax.map(one, (groups, group_rows(batch, parts)))
        return made.reshape(-1, *made.shape[2:])

    outs = field_spec(2, parts.batch_axes, parts.sequence_axes)
    run = on_devices(parts, local, outs)
    return run(state.params, state.model_state, state.key, state.step, batch)


def _named(names: list[tuple[str, ...]]) -> Callable[[Loss, jax.Array], jax.Array]:
    """The scalars of a loss; the names of its metrics go into the list."""

    def scalars(loss: Loss, _: jax.Array) -> jax.Array:
        vector, metric_names = _scalars(loss)
        names.append(metric_names)
        return vector

    return scalars


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
        params, frozen = held_tree(parts, params), held_tree(parts, model_state.get("frozen", {}))
        variables = model_state.get("variables", {})

        def one(group: jax.Array, rows: Any) -> jax.Array:
            group_rng = group_key(jax.random.wrap_key_data(key), step, group)
            loss, _ = parts.loss(
                whole_tree(parts, params), whole_tree(parts, frozen), variables, group_rng, rows
            )
            scalars, metric_names = _scalars(loss)
            names.append(metric_names)
            return scalars

        if parts.pipeline is not None:
            keys = key, step, groups
            return in_pipeline(parts, params, frozen, variables, keys, batch, _named(names), train=False)[1][
                0
            ][None]
        return over_groups(one, groups, batch, parts)[None]

    run = on_devices(parts, local, PartitionSpec(parts.axes or None))
    scalars = run(state.params, state.model_state, state.key, jnp.int32(0), batch).sum(axis=0)
    result = {"loss_sum": scalars[0], "loss_weight": scalars[1]}
    for i, name in enumerate(names[0]):
        result[f"{name}_sum"], result[f"{name}_weight"] = scalars[2 + 2 * i], scalars[3 + 2 * i]
    return result
