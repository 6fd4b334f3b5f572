"""What a mesh with a `stage` axis asks of a model and its loss, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import ConfigError, ShardingError, suggestion
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.groups import Loss, as_loss
from shardtrain.parallel.pipeline import Pipeline
from shardtrain.parallel.schedules import Schedule, named, table
from shardtrain.parallel.stages import STAGE, Deal, Stages
from shardtrain.plan.model import VARIABLES, Model
from shardtrain.sharding import Rules
from shardtrain.train.pipelined import PartFunctions
from shardtrain.tree import flatten

Logical = tuple[str | None, ...] | None


def as_pipeline(
    model: Model,
    loss_fn: Any,
    schedule: str | Schedule | Iterable[Any],
    shapes: Mapping[str, Any],
    model_state: Mapping[str, Any],
    mesh: AnyMesh,
    rules: Rules,
    microbatches: int,
) -> Pipeline | None:
    """How the loss goes through the stages of the mesh; None where it has none.

    Raises:
        ConfigError: the loss does not say its parts, or has state that it does not carry on; a schedule of other
            sizes. ShardingError: no such stack, or fewer layers than pieces.
    """
    axes = rules.stage_axes(mesh)
    if not axes:
        return None
    if axes != (STAGE,):
        raise ShardingError(
            f"layers are over {', '.join(axes)}",
            where="rules",
            fix=f"rules.override(params={{'layers': '{STAGE}'}})",
        )
    stages = mesh.shape[STAGE]
    _check_parts(model, loss_fn, model_state, stages)
    found = _schedule(schedule, stages, microbatches)
    deal = Deal(_layers(loss_fn, shapes), stages, found.chunks)
    if deal.layers < deal.pieces:
        per = "" if found.chunks == 1 else f" x {found.chunks} chunks of schedule '{found.name}'"
        raise ShardingError(
            f"{deal.layers} layers are fewer than {deal.pieces} pieces ({STAGE}={stages}{per})",
            where=loss_fn.blocks,
            why="each stage runs at least one layer",
            fix=f"{STAGE}={max(1, deal.layers // found.chunks)}, or more layers",
        )
    return Pipeline(loss_fn, found, deal)


def _check_parts(model: Model, loss_fn: Any, model_state: Mapping[str, Any], stages: int) -> None:
    if not isinstance(loss_fn, Stages):
        raise ConfigError(
            f"does not say which parts {STAGE}={stages} can divide it into",
            where="loss_fn",
            why="a pipeline runs the layers of a model on different devices, and a plain function hides them",
            fix="st.Stages(embed=lambda model, batch: x, block=lambda layer, x: x, head=lambda model, x, batch: "
            f"st.Loss(...), blocks='path of the stacked layers'), which is a loss function too; or {STAGE}=1",
        )
    streams = jax.tree.leaves(getattr(model, "rngs", ()))
    if (jax.tree.leaves(model_state.get(VARIABLES, {})) and loss_fn.begin is None) or streams:
        what = "random streams" if streams else "variables"
        raise ConfigError(
            f"the model keeps {what} of its own",
            where="model",
            why="a pipeline carries activations from stage to stage, and no other state",
            fix="dropout with the key that block gets: block=lambda layer, x, key: x"
            if streams
            else f"norms without running statistics, st.Stages(begin=...) whose head sets them, or {STAGE}=1",
        )


def _schedule(given: Any, stages: int, microbatches: int) -> Schedule:
    if isinstance(given, str):
        return named(given, stages, microbatches)
    if not isinstance(given, Schedule):
        return table(given, stages, microbatches)
    if (given.stages, given.microbatches) != (stages, microbatches):
        raise ConfigError(
            f"it is for {given.stages} stages and {given.microbatches} microbatches, "
            f"the mesh and the groups give {stages} and {microbatches}",
            where=f"schedule {given.name}",
            fix=f"microbatches={given.microbatches} on a mesh of {STAGE}={given.stages}, or the schedule's name",
        )
    return given


def _layers(stages: Stages, shapes: Mapping[str, Any]) -> int:
    stack = {path: leaf for path, leaf in shapes.items() if path.startswith(f"{stages.blocks}/")}
    counts = {path: leaf.shape[0] if leaf.shape else 0 for path, leaf in stack.items()}
    if not counts:
        tops = sorted({path.rpartition("/")[0] or path for path in shapes})
        raise ShardingError(
            "no parameter under this path",
            where=f"st.Stages(blocks='{stages.blocks}')",
            why=f"parameters are under {', '.join(tops[:6])}",
            fix=suggestion(stages.blocks, tops, "the path of the stack in the model"),
        )
    if len(set(counts.values())) > 1:
        raise ShardingError(
            f"leading dims differ: {dict(list(counts.items())[:4])}",
            where=f"st.Stages(blocks='{stages.blocks}')",
            why="every parameter of a stack has its layers as the leading dim",
            fix="one stack of equal layers",
        )
    return next(iter(counts.values()))


def with_layers(
    pipe: Pipeline | None, axes: Mapping[str, Logical], shapes: Mapping[str, Any]
) -> dict[str, Logical]:
    """Logical axes, with the leading dim of the stack called layers whether the model says so or not; of a stack that is no
    part of the pipeline it has no name, since every stage has all of it."""
    if pipe is None:
        return dict(axes)

    def named(path: str, names: Logical) -> Logical:
        if pipe.owns(path):
            return ("layers", *(names or (None,) * len(shapes[path].shape))[1:])
        return names if names is None else tuple(None if n == "layers" else n for n in names)

    return {path: named(path, names) for path, names in axes.items()}


def at_rest(pipe: Pipeline | None, rules: Rules) -> Rules:
    """Rules for parameters: a stack that does not divide into equal pieces is whole on every stage."""
    return rules if pipe is None or pipe.deal.equal else rules.override(name=rules.name, layers=None)


def part_functions(
    model: Model, pipe: Pipeline | None, stages: Any, rows: int, *, train: bool
) -> PartFunctions | None:
    """The loss of one group in parts, with the random keys that calling it whole would give them."""
    if pipe is None:
        return None
    if not isinstance(stages, Stages) or stages.blocks != pipe.stages.blocks:
        raise ConfigError(
            "does not say its parts as the training loss does",
            where="compile_eval(loss_fn)",
            fix=f"st.Stages(embed, block, head, blocks='{pipe.stages.blocks}')",
        )

    def bound(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        from flax import nnx

        module = model.bind(params, state, jax.random.fold_in(key, 0), train)
        if stages.begin is not None:
            stages.begin(module)
        return module, nnx.Rngs(jax.random.fold_in(key, 1))

    def embed(params: Any, state: Any, key: jax.Array, batch: Any) -> Any:
        module, rngs = bound(params, state, key)
        return stages.first(module, batch, rngs)

    def layers(params: Any, state: Any, key: jax.Array, batch: Any, x: Any, places: jax.Array) -> Any:
        variables = flatten(state.get(VARIABLES, {}))
        mine = [v[jnp.maximum(places, 0)] if pipe.owns(p) else v for p, v in variables.items()]
        mine = jax.tree.unflatten(jax.tree.structure(state.get(VARIABLES, {})), mine)
        module, rngs = bound(params, {**state, VARIABLES: mine}, key)
        key = stages.layer_key(module, rngs)
        keys = None if key is None else jax.random.split(key, pipe.deal.layers)[jnp.maximum(places, 0)]
        return stages.run(module, x, keys, batch, None if pipe.deal.equal else places >= 0)

    def head(params: Any, state: Any, key: jax.Array, batch: Any, x: Any) -> tuple[Loss, Any]:
        module, rngs = bound(params, state, key)
        loss = as_loss(stages.last(module, x, batch, stages.head_rngs(rngs)), rows)
        return loss, model.variables(module)

    return PartFunctions(embed, layers, head)
