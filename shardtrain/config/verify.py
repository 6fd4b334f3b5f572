"""A config's training, made unkind, on one device and on every layout."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shardtrain.config.build import build, learning_rate, optimizer
from shardtrain.config.schema import Custom, RunConfig
from shardtrain.errors import ConfigError
from shardtrain.plan.candidates import Candidate, candidates
from shardtrain.plan.verify import Compared, Verification, verify

CLIP = 0.1  # below the gradient norm of any model that is not trained out


def layouts_of(config: RunConfig, names: str, devices: int) -> list[Candidate]:
    """`all`: those that the config's model can have on so many devices; else names with commas between."""
    if names != "all":
        return [Candidate.parse(name) for name in names.split(",") if name.strip()]
    axes = ["data", "fsdp", "tensor"]
    if not isinstance(config.model, Custom):
        axes += ["context", "stage"]
        axes += ["expert"] if hasattr(config.model, "experts") else []
    return candidates(devices, axes)


def verify_config(
    config: RunConfig,
    layouts: Sequence[Candidate],
    *,
    steps: int,
    width: int = 0,
    tolerance: float | None = None,
    say: Callable[[Compared], None] | None = None,
) -> Verification:
    """`plan.verify.verify` for a config: its data, model and optimizer.

    Made unkind, so that faults have nowhere to hide: dropout is on, gradients are clipped below their norm, and rows of text
    end in padding of uneven length.

    Args:
        width: `embed` of the model in place of the config's, with its MLP in proportion; 0: as it is.
    """
    config = _narrow(config, width) if width else config
    model: Any = config.model
    if not isinstance(model, Custom) and model.dropout == 0:
        config = dataclasses.replace(config, model=dataclasses.replace(model, dropout=0.1))
    clip = min(config.optimizer.clip or CLIP, CLIP)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip=clip))
    one = dataclasses.replace(config, mesh=type(config.mesh)(), dcn=type(config.dcn)())
    import jax

    from shardtrain.mesh import make_mesh

    pieces = build(one, make_mesh(devices=jax.devices()[:1], data=1))
    loader = pieces.loader.for_rows(np.arange(config.global_batch))
    batches = [
        _padded(batch, i) for i, batch in enumerate(itertools.islice(loader.starting_at(0), min(steps, 8)))
    ]
    return verify(
        pieces.model,
        pieces.loss,
        optimizer(config, learning_rate(config)),
        batches,
        layouts=layouts,
        steps=steps,
        groups=config.groups or 1,
        seed=config.seed,
        precision=config.precision,
        quant=None if config.quant == "none" else config.quant,
        param_dtype=None if config.param_dtype == "model" else config.param_dtype,
        tolerance=tolerance,
        say=say,
    )


def _padded(batch: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Rows of text with padding of uneven length; one of them has no token that counts."""
    if "weights" not in batch or np.ndim(batch["weights"]) < 2:
        return batch
    rows, length = np.shape(batch["weights"])
    ends = np.random.default_rng(seed).integers(length // 4, length + 1, rows)
    ends[0] = 0
    return {**batch, "weights": batch["weights"] * (np.arange(length) < ends[:, None]).astype(np.float32)}


def _narrow(config: RunConfig, width: int) -> RunConfig:
    model: Any = config.model
    if isinstance(model, Custom):
        raise ConfigError("a model of your own", where="--width", fix="the model's own options")
    change = {"embed": width}
    for field in ("mlp", "expert_mlp"):
        if getattr(model, field, 0):
            change[field] = max(8, getattr(model, field) * width // model.embed // 8 * 8)
    return dataclasses.replace(config, model=dataclasses.replace(model, **change))
