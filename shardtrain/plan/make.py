"""From what a user has to a Plan: everything decided and checked, nothing allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import ConfigError
from shardtrain.mesh import device_of
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.attention import MODES
from shardtrain.parallel.precision import dtype_of, wide
from shardtrain.parallel.presets import PRESETS, fsdp_tensor
from shardtrain.parallel.quantised import check_quant
from shardtrain.parallel.schedules import Schedule
from shardtrain.plan import layout as layouts
from shardtrain.plan.given import (
    check_sequence,
    check_stacks,
    device_dtype,
    group_count,
    group_loss,
    one_of,
    watch,
)
from shardtrain.plan.model import FROZEN, as_model, initial
from shardtrain.plan.plan import Plan
from shardtrain.plan.staged import as_pipeline, at_rest, with_layers
from shardtrain.sharding import Annotations, Rules, annotate
from shardtrain.train.guard import Guard, memory
from shardtrain.tree import flatten


def plan(
    model: Any,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    batch: Any,
    mesh: AnyMesh,
    rules: Rules | str = fsdp_tensor,
    microbatches: int = 1,
    groups: int | None = None,
    precision: str = "f32",
    quant: str | None = None,
    wire_dtype: Any = None,
    reduce_dtype: Any = None,
    param_dtype: str | None = None,
    trainable: Any = None,
    annotations: Annotations | Mapping[str, Any] | None = None,
    learning_rate: Any = None,
    attention: str = "ring",
    schedule: str | Schedule | Iterable[Any] = "1f1b",
    guard: Guard | None = None,
) -> Plan:
    """Decide where everything lives, and check it, without allocating anything.

    Args:
        model: a factory `rngs -> nnx.Module`, an `nnx.Module` with weights, `st.linen(...)`, or a
            pair `(init(key) -> params, apply(params, *args))`.
        loss_fn: `(model, batch[, rngs])` of one group's rows -> `st.Loss`, a scalar (the mean over
            the rows), or `(scalar, metrics)`. `rngs` is an `nnx.Rngs` of the group's key.
        optimizer: any optax transform; it sees global gradients, so norms are exact.
        batch: global shapes, see `batch_spec`; a pytree of anything with shape and dtype.
        mesh: see `make_mesh`.
        rules: see `st.rules`; a name or a value.
        microbatches: how many groups each device takes one after the other; a lever on memory.
        groups: number of groups G; default: batch shards x microbatches. A device takes G / shards
            groups, one after the other, so G may be more than `microbatches` asks for, never less.
        precision: of the loss: "f32", "bf16" (parameters are cast), or "f64" for everything, to compare (needs JAX's
            64 bits).
        quant: "int8" or "fp8": products of the weights of our models' blocks, forward and backward, with operands of 8 bits;
            see `parallel/quantised.py`. Needs the extra `quant`. None: in `precision`.
        wire_dtype: of gathered weights; default: the compute dtype, float32 on CPU.
        reduce_dtype: of the reduction of gradients; default: float32, float64 under "f64".
        param_dtype: "f32", "bf16" or "f64", of parameters at rest; default: as the model has them, "f64" under "f64". The
            optimizer sees them, and keeps its state, in float32: an update is rounded once, as it is added.
        trainable: an nnx filter; parameters it leaves out are kept but not trained.
        annotations: `st.annotate({...})`, logical axes by path for models that carry none.
        learning_rate: number or schedule of the step, only to report it as a metric.
        attention: under a `context` axis, how queries meet the keys of other devices: "ring", "gather" or "ulysses";
            see `st.attention`.
        schedule: under a `stage` axis, who works on which microbatch when: "gpipe", "1f1b", "interleaved:V" (V pieces of
            the model per device), "zb", a `Schedule`, or a table of your own; see `st.schedules`.
        guard: what becomes of steps whose loss or gradient is not finite, or a spike; see `st.Guard`. None: they are
            taken, and the loop stops after one that is not finite.

    Raises:
        ShardingError, ConfigError: see `Validation` in the README; each names path and numbers.
    """
    again = lambda mesh: plan(  # noqa: E731
        model,
        loss_fn,
        optimizer,
        batch=batch,
        mesh=mesh,
        rules=rules,
        microbatches=microbatches,
        groups=groups,
        precision=precision,
        quant=quant,
        wire_dtype=wire_dtype,
        reduce_dtype=reduce_dtype,
        param_dtype=param_dtype,
        trainable=trainable,
        annotations=annotations,
        learning_rate=learning_rate,
        attention=attention,
        schedule=schedule,
        guard=guard,
    )
    rules = one_of("rules", rules, PRESETS) if isinstance(rules, str) else rules
    compute = dtype_of("precision", precision)
    kept = _kept(precision, param_dtype)
    reduce_dtype = reduce_dtype or wide(jnp.dtype(compute))
    one_of("attention", attention, dict.fromkeys(MODES))
    layouts.check_mesh(mesh, rules)
    check_quant(quant, mesh.shape, rules.sequence_axes(mesh))
    guard = None if guard is None or guard.on_bad == "off" else guard
    abstract_batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(tuple(x.shape), device_dtype(x.dtype)),
        batch,
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    rows, groups = group_count(abstract_batch, mesh, rules, microbatches, groups)
    check_sequence(abstract_batch, mesh, rules)
    group_batch = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((rows // groups, *s.shape[1:]), s.dtype), abstract_batch
    )
    adapted = as_model(model, group_batch, trainable)
    if annotations is not None and not isinstance(annotations, Annotations):
        annotations = annotate(annotations)

    params, model_state = jax.eval_shape(lambda key: initial(adapted, key, kept), jax.random.key(0))
    named = {**flatten(params), **flatten(model_state.get(FROZEN, {}))}
    axes: dict[str, Any] = {path: adapted.axes.get(path) for path in named}
    if annotations is not None:
        axes = annotations.apply({p: leaf.shape for p, leaf in named.items()}, axes)

    calls = groups // math.prod(mesh.shape[a] for a in rules.batch_axes(mesh))
    pipe = as_pipeline(adapted, loss_fn, schedule, named, model_state, mesh, rules, calls)
    axes, placing = with_layers(pipe, axes, named), at_rest(pipe, rules)
    layouts.check_names(named, axes, placing, mesh)
    wire = wire_dtype or (wide(jnp.dtype(compute)) if device_of(mesh).platform == "cpu" else compute)
    loss = group_loss(adapted, loss_fn, rows // groups, train=True)
    seen = watch(loss, params, model_state, group_batch, rules, mesh, quant)
    check_stacks(seen, named)
    leaves = layouts.parameter_leaves(
        named,
        axes,
        rules=placing,
        mesh=mesh,
        stacks=seen.stacks,
        tables=frozenset(seen.lookups),
        dtypes=(jnp.dtype(compute), jnp.dtype(wire), jnp.dtype(reduce_dtype)),
    )
    return Plan(
        adapter=adapted,
        loss_fn=loss_fn,
        optimizer=optimizer,
        mesh=mesh,
        rules=rules,
        microbatches=calls,
        groups=groups,
        precision=precision,
        quant=quant,
        kept=kept,
        batch=abstract_batch,
        global_batch=rows,
        leaves=leaves,
        seen=seen,
        learning_rate=learning_rate,
        attention=attention,
        pipeline=pipe,
        guard=guard,
        abstract_state=layouts.abstract_state(
            params, model_state, optimizer, leaves, mesh, jax.eval_shape(lambda: memory(guard))
        ),
        again=again,
    )


def _kept(precision: str, param_dtype: str | None) -> Any:
    """Dtype of parameters at rest; None: as the model has them."""
    if precision == "f64" and param_dtype not in (None, "f64"):
        raise ConfigError(
            f"'{param_dtype}' under precision 'f64'",
            where="param_dtype",
            why="f64 is there to compare exactly; rounded parameters would not be",
            fix="param_dtype=None",
        )
    name = "f64" if precision == "f64" else param_dtype
    return None if name is None else dtype_of("param_dtype", name)
