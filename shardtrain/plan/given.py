"""What a user gives to a Plan, checked before anything is compiled: batch, groups, loss."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import ConfigError, DataError, ShardingError, ShardTrainError, suggestion
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.groups import Loss, as_loss
from shardtrain.parallel.remat import uses_remat
from shardtrain.plan.lines import naming_lines
from shardtrain.plan.model import FROZEN, VARIABLES, Model
from shardtrain.plan.traffic import uses
from shardtrain.sharding import Rules, context
from shardtrain.tree import flatten


def batch_spec(**fields: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch: `batch_spec(x=(256, 512), y=((256,), "int32"))`.

    Args:
        fields: name -> shape (float32), or (shape, dtype), or anything with `.shape` and `.dtype`.
            The first dim of every field is the rows of the global batch.
    """
    result = {}
    for name, value in fields.items():
        if hasattr(value, "shape"):
            result[name] = jax.ShapeDtypeStruct(tuple(value.shape), device_dtype(value.dtype))
        elif len(value) == 2 and isinstance(value[0], tuple | list):
            result[name] = jax.ShapeDtypeStruct(tuple(value[0]), jnp.dtype(value[1]))
        else:
            result[name] = jax.ShapeDtypeStruct(tuple(value), jnp.float32)
    return result


def device_dtype(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(
        np.dtype(dtype) if not hasattr(dtype, "numpy") else str(dtype).split(".")[-1]
    )


def group_count(
    batch: Any, mesh: AnyMesh, rules: Rules, microbatches: int, groups: int | None
) -> tuple[int, int]:
    named = flatten(batch)
    if not named:
        raise DataError("no fields", where="batch", fix="st.batch_spec(x=(rows, ...), ...)")
    for name, leaf in named.items():
        if not leaf.shape:
            raise DataError("a scalar has no rows", where=f"batch field '{name}'", fix="one value per row")
    sizes = {name: leaf.shape[0] for name, leaf in named.items()}
    rows = next(iter(sizes.values()))
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"fields have different numbers of rows: {sizes}",
            where="batch",
            fix="the same first dim in every field",
        )
    axes = rules.batch_axes(mesh)
    shards = math.prod(mesh.shape[a] for a in axes)
    over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes) or "one batch shard"
    if microbatches < 1:
        raise ConfigError(f"{microbatches}", where="microbatches", fix="1 or more")
    count = groups if groups is not None else shards * microbatches
    if microbatches > 1 and shards * microbatches > count:
        raise ConfigError(
            f"{microbatches} on {shards} batch shards ({over}) are more calls than the {count} groups",
            where="microbatches",
            why="a group is what one call of the loss sees, and is not split",
            fix=f"microbatches={max(1, count // shards)}, or groups={shards * microbatches} for a new run",
        )
    if count < 1 or count % shards:
        raise ConfigError(
            f"{count} groups cannot be divided over {shards} batch shards ({over})",
            where="groups",
            why="a group is what one call of the loss sees, and is not split over devices",
            fix=f"a mesh whose batch axes multiply to a divisor of {count}, with the rest on tensor",
        )
    if rows % count:
        raise ConfigError(
            f"{rows} rows are not divisible by {count} groups ({over}, {count // shards} microbatches)",
            where="global batch",
            fix=f"{-(-rows // count) * count} rows, or fewer microbatches or batch shards",
        )
    return rows, count


def one_of(where: str, name: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for."""
    if name not in known:
        raise ConfigError(f"'{name}' is none", where=where, fix=suggestion(name, known, next(iter(known))))
    return known[name]


def check_sequence(batch: Any, mesh: AnyMesh, rules: Rules) -> None:
    """Whether dim 1 of every field divides into the pieces of a sequence that mesh axes share."""
    axes = rules.sequence_axes(mesh)
    pieces = 2 * math.prod(mesh.shape[a] for a in axes)
    for name, leaf in flatten(batch).items() if axes else ():
        if len(leaf.shape) > 1 and leaf.shape[1] % pieces:
            over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
            raise ShardingError(
                f"dim 1 = {leaf.shape[1]} is not divisible by {pieces}, two pieces for each device of {over}",
                where=f"batch field '{name}'",
                why=f"{over} divides the sequence, which is dim 1 of every field that has one",
                fix=f"{-(-leaf.shape[1] // pieces) * pieces} tokens, or a smaller {axes[0]} axis",
            )


def check_stacks(seen: Seen, parameters: Mapping[str, Any]) -> None:
    """Paths that the model gave to `st.gather`."""
    for prefix in sorted(seen.stacks):
        if not any(path.startswith(f"{prefix}/") for path in parameters):
            tops = sorted({path.rpartition("/")[0] for path in parameters if "/" in path})
            raise ShardingError(
                "no parameter under this path",
                where=f"st.gather(..., '{prefix}')",
                why=f"parameters are under {', '.join(tops[:6])}",
                fix=suggestion(prefix, tops, "the path of the stack in the model"),
            )


def group_loss(model: Model, loss_fn: Callable[..., Any], rows: int, *, train: bool) -> Any:
    """The user's loss on one group, as a pure function of arrays."""
    arity = _arity(loss_fn)

    def loss(params: Any, frozen: Any, variables: Any, key: jax.Array, batch: Any) -> tuple[Loss, Any]:
        from flax import nnx

        state = {FROZEN: frozen, VARIABLES: variables}
        bound = model.bind(params, state, jax.random.fold_in(key, 0), train)
        rngs = (nnx.Rngs(jax.random.fold_in(key, 1)),) if arity > 2 else ()
        result = as_loss(loss_fn(bound, batch, *rngs), rows)
        return result, model.variables(bound)

    return loss


def _arity(loss_fn: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return 3
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if count < 2:
        raise ConfigError(f"takes {count} arguments", where="loss_fn", fix="loss_fn(model, batch, rngs)")
    return count


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the first trace of a loss told: `stacks` that the model gathers itself, layer by layer; whether it
    recomputes anything itself; `lookups`: rows that one call takes from tables of which all uses are lookups;
    `scanned`: parameters of layers that a scan runs over -> its line; `lines`: where parameters are first used; `met`: others
    that the model makes whole where it uses them.
    """

    stacks: frozenset[str]
    own_remat: bool
    lookups: Mapping[str, int]
    scanned: Mapping[str, str]
    lines: Mapping[str, str]
    met: frozenset[str] = frozenset()


def watch(
    loss: Any,
    params: Any,
    model_state: Any,
    batch: Any,
    rules: Rules,
    mesh: AnyMesh | None = None,
    quant: str | None = None,
) -> Seen:
    """Trace the loss once on shapes alone; finds its mistakes early.

    Raises:
        ShardingError: a constraint that cannot be on this mesh, with the user's line.
        ConfigError: `quant`, and a model without a product that can be rounded.
    """
    sizes = {} if mesh is None else dict(mesh.shape)
    manual = frozenset() if mesh is None else frozenset(rules.manual_axes(mesh))
    seen = context.Layout(mesh=None, activations=rules.activations, manual=manual, sizes=sizes, quant=quant)
    with context.use(seen), naming_lines():
        jaxpr, (result, variables) = jax.make_jaxpr(loss, return_shape=True)(
            params, model_state.get(FROZEN, {}), model_state.get(VARIABLES, {}), jax.random.key(0), batch
        )
    before, after = flatten(model_state.get(VARIABLES, {})), flatten(variables)
    if {p: x.shape for p, x in before.items()} != {p: x.shape for p, x in after.items()}:
        raise ShardTrainError(
            "the loss changes the structure or shapes of the model's state",
            where="loss_fn",
            why=f"before: {sorted(before)[:6]}; after: {sorted(after)[:6]}",
            fix="create every variable in the module's __init__ (or during linen init)",
        )
    taken = {"loss", "grad_norm", "param_norm", "tokens", "learning_rate"} & set(result.metrics)
    if taken:
        raise ConfigError(f"metric names are taken: {sorted(taken)}", where="loss_fn", fix="other names")
    divided = rules.sequence_axes(mesh) if mesh is not None else ()
    if divided and not seen.attentions:
        raise ShardingError(
            f"mesh axis {divided[0]}={sizes[divided[0]]} divides the sequence, but the model has no attention for that",
            where="model",
            why="what mixes tokens in another way would see only the tokens of its own device",
            fix=f"st.attention(q, k, v) in the model, or {divided[0]}=1",
        )
    if quant is not None and not seen.products:
        raise ConfigError(
            f"'{quant}', and no product of this model can be rounded",
            where="quant",
            why="rounded are the attention and MLP of shardtrain.models; a product of your own is not seen as one",
            fix="no quant, and qwix inside the model itself",
        )
    used = uses(jaxpr.jaxpr, [*flatten(params), *flatten(model_state.get(FROZEN, {}))])
    rows = collections.Counter[str]()
    for taken in seen.lookups:
        rows[taken.path] += taken.rows
    return Seen(
        stacks=frozenset(seen.gathered),
        own_remat=uses_remat(jaxpr.jaxpr),
        lookups={path: count for path, count in rows.items() if path in used.looked_up},
        scanned=used.scanned,
        lines=used.lines,
        met=frozenset(seen.met),
    )
