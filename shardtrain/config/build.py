"""From a config to the arguments of `st.fit`."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from shardtrain import data as data_room
from shardtrain.config.devices import use_no_devices
from shardtrain.config.load import load_name
from shardtrain.config.resolve import device_count, resolve
from shardtrain.config.schema import Custom, RunConfig
from shardtrain.errors import ConfigError
from shardtrain.mesh import AnyMesh, Target, make_mesh
from shardtrain.models import build_model, language_model_loss
from shardtrain.parallel.precision import dtype_of
from shardtrain.parallel.presets import PRESETS
from shardtrain.plan.make import plan
from shardtrain.plan.plan import Plan
from shardtrain.tree import path_name


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a config describes, ready for a Plan.

    `model`: factory of an nnx module. `loader`, `eval_loader`: see `shardtrain.data`; eval may be None.
    `text`: the tokenised text, None for a user's own data. `flops_per_row`: training FLOPs, None if unknown.
    `batch`: shapes of a global batch. Without data (`build(data=False)`) loaders and text are None.
    """

    mesh: AnyMesh
    model: Callable[..., Any]
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    loader: Any
    eval_loader: Any
    text: Any
    flops_per_row: float | None
    batch: Any


def build_mesh(config: RunConfig, target: Target | None = None) -> AnyMesh:
    """The mesh of the config over all devices of the run, or a target's; axes of size 1 are left out."""
    sizes = {a: n for a, n in dataclasses.asdict(config.mesh).items() if n != 1} or {"data": 1}
    dcn = config.dcn.named
    return make_mesh(dcn=dcn, **sizes) if target is None else target.mesh(dcn=dcn, **sizes)


def plan_for(name: str, flags: Sequence[str], target: str | None) -> tuple[Plan, Target, list[str]]:
    """The plan of a config on hardware that need not be here, and lines to say.

    Without a target: as many simulated CPU devices as the config asks for. Starts no device but this
    process's CPU, and reads no text.
    """
    use_no_devices()
    hardware = None if target is None else Target(target)
    config, notes = resolve(name, flags, hardware.size if hardware else None)
    if hardware is None:
        count = device_count(config)
        if count is None:
            raise ConfigError(
                "the mesh has a free axis, so the number of devices is not known",
                where=name,
                fix="--target cpu:8, or the hardware that it is for, such as --target h100:1x8",
            )
        hardware = Target(f"cpu:{count}")
    return make_plan(config, build(config, build_mesh(config, hardware), data=False)), hardware, notes


def build_text(config: RunConfig) -> Any:
    """The config's text, tokenised once and then read from its cache."""
    text = config.data
    if (pathlib.Path(text.source) / "manifest.json").is_file():
        return data_room.open_tokens(text.source)
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return data_room.prepare(
        text.source,
        text.cache or pathlib.Path(home) / "shardtrain" / "data",
        tokenizer=text.tokenizer,
        eval_fraction=text.eval_fraction,
        text_field=text.field,
        dtype=text.dtype,
    )


def build(config: RunConfig, mesh: AnyMesh | None = None, *, data: bool = True) -> Pieces:
    """Every piece, checked against the others before anything is compiled.

    Args:
        mesh: in place of the config's. data: False leaves out the text, of which only the shapes are known then.
    """
    mesh = build_mesh(config) if mesh is None else mesh
    schedule = learning_rate(config)
    if isinstance(config.model, Custom):
        factory, loss = load_name(config.model.model), load_name(config.model.loss)
        options = config.model.options
        model = lambda rngs: factory(rngs, **options)  # noqa: E731
        flops = None
    else:
        shape = config.model
        model, loss = lambda rngs: build_model(shape, rngs), language_model_loss
        flops = shape.flops_per_token(config.data.sequence) * config.data.sequence
        if config.data.sequence > shape.sequence:
            raise ConfigError(
                f"{config.data.sequence} tokens, the model has {shape.sequence} positions",
                where="data.sequence",
                fix=f"--data.sequence {shape.sequence} or --model.sequence {config.data.sequence}",
            )
    text: Any = None
    loader: Any
    eval_loader: Any
    if isinstance(config.model, Custom) and config.model.data:
        loader = data_room.as_loader(
            load_name(config.model.data)(config), config.global_batch, seed=config.seed
        )
        eval_loader, batch = None, loader.batch_spec
    elif not data:
        loader = eval_loader = None
        rows = (config.global_batch, config.data.sequence)
        fields = ("tokens", "int32"), ("targets", "int32"), ("weights", "float32")
        batch = {name: jax.ShapeDtypeStruct(rows, dtype) for name, dtype in fields}
    else:
        text = build_text(config)
        vocab = getattr(config.model, "vocab", text.vocab_size)
        if vocab < text.vocab_size:
            raise ConfigError(
                f"{vocab} entries, the tokenizer has {text.vocab_size}",
                where="model.vocab",
                fix=f"--model.vocab {-(-text.vocab_size // 128) * 128}, or --data.tokenizer bpe:{vocab}",
            )
        common: dict[str, Any] = dict(
            sequence=config.data.sequence,
            global_batch=config.global_batch,
            seed=config.seed,
            quarantine=config.data.quarantine,
        )
        loader = data_room.TokenLoader(text, split="train", **common)
        eval_loader = data_room.TokenLoader(text, split="eval", shuffle=False, **common)
        batch = loader.batch_spec
    return Pieces(
        mesh, model, loss, optimizer(config, schedule), schedule, loader, eval_loader, text, flops, batch
    )


def make_plan(config: RunConfig, pieces: Pieces, groups: int | None = None) -> Plan:
    """The Plan of a config. `groups`: of the run that it goes on with; a new run decides here."""
    microbatches = config.microbatches
    if groups is not None:
        microbatches = 1  # a group is not split: the run's groups say how many calls there are
    elif config.groups is not None:
        calls = math.prod(pieces.mesh.shape[a] for a in _batch_axes(config, pieces.mesh)) * max(
            1, microbatches
        )
        groups = -(-config.groups // calls) * calls
    return plan(
        pieces.model,
        pieces.loss,
        pieces.optimizer,
        batch=pieces.batch,
        mesh=pieces.mesh,
        rules=config.rules,
        microbatches=microbatches,
        schedule=config.schedule,
        groups=groups,
        attention=config.attention,
        precision=config.precision,
        quant=None if config.quant == "none" else config.quant,
        param_dtype=None if config.param_dtype == "model" else config.param_dtype,
        learning_rate=pieces.learning_rate,
        guard=config.guard,
    )


def _batch_axes(config: RunConfig, mesh: AnyMesh) -> tuple[str, ...]:
    rules = PRESETS.get(config.rules)
    return () if rules is None else rules.batch_axes(mesh)  # an unknown name is refused by the plan


def learning_rate(config: RunConfig) -> optax.Schedule:
    """Warm-up, then constant, cosine or linear to `final` of the peak at the last step.

    A run that is shorter than its warm-up ends inside it.
    """
    o = config.optimizer
    after = max(1, config.steps - o.warmup)
    if o.decay == "cosine":
        main = optax.cosine_decay_schedule(o.learning_rate, after, o.final)
    elif o.decay == "linear":
        main = optax.linear_schedule(o.learning_rate, o.learning_rate * o.final, after)
    else:
        main = optax.constant_schedule(o.learning_rate)
    if not o.warmup:
        return main
    # Step 0 already moves: a warm-up of n steps reaches the peak at step n.
    rise = optax.linear_schedule(o.learning_rate / o.warmup, o.learning_rate, o.warmup - 1 or 1)
    return optax.join_schedules([rise, main], [o.warmup])


def optimizer(config: RunConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The config's optimizer: clip by the global norm, then the update. Only kernels and tables decay."""
    o = config.optimizer
    narrow = None if o.state_dtype == "f32" else dtype_of("optimizer.state_dtype", o.state_dtype)
    if narrow is not None and (o.name == "adafactor" or (o.name == "sgd" and not o.momentum)):
        raise ConfigError(
            f"'{o.state_dtype}', and {o.name} keeps no average of gradients",
            where="optimizer.state_dtype",
            fix="--optimizer.state-dtype f32" + (", or a momentum" if o.name == "sgd" else ""),
        )
    if o.name == "adamw":
        main = optax.adamw(schedule, o.b1, o.b2, mu_dtype=narrow, weight_decay=o.weight_decay, mask=decays)
    elif o.name == "lion":
        main = optax.lion(schedule, o.b1, o.b2, mu_dtype=narrow, weight_decay=o.weight_decay, mask=decays)
    elif o.name == "adafactor":
        main = optax.adafactor(schedule, weight_decay_rate=o.weight_decay or None, weight_decay_mask=decays)
    else:
        main = optax.sgd(schedule, momentum=o.momentum or None, accumulator_dtype=narrow)
        if o.weight_decay:
            main = optax.chain(optax.add_decayed_weights(o.weight_decay, mask=decays), main)
    return optax.chain(optax.clip_by_global_norm(o.clip), main) if o.clip else main


def decays(params: Any) -> Any:
    """True for the leaves that weight decay applies to: by name, since stacked vectors look like matrices."""
    names = ("kernel", "embedding", "table")
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith(names), params)
