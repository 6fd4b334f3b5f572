"""The best layouts of a config on hardware that is not here."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from shardtrain.config.build import build, make_plan
from shardtrain.config.devices import use_no_devices
from shardtrain.config.load import from_json, to_json
from shardtrain.config.planning import Layout, planned
from shardtrain.config.schema import Custom, RunConfig
from shardtrain.errors import ConfigError, ShardTrainError
from shardtrain.mesh import AXES, Target
from shardtrain.mesh.build import SLOW
from shardtrain.models import MoEConfig
from shardtrain.parallel.remat import HOSTED, POLICIES
from shardtrain.parallel.stages import STAGE
from shardtrain.plan.candidates import Candidate, space
from shardtrain.plan.cost import Constants
from shardtrain.plan.partitioned import partition
from shardtrain.plan.plan import Plan
from shardtrain.plan.search import Search, search
from shardtrain.plan.sketch import PROBES, Sketcher, probes_of


def search_config(
    config: RunConfig,
    target: Target,
    constants: Constants,
    *,
    axes: Sequence[str] = (),
    layouts: Sequence[tuple[Candidate, str | None]] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Search:
    """`plan.search.search` over the layouts that a config's model can have; `options` as there.

    `axes`: look at meshes of these alone (and across slices). `layouts`: at these alone.

    Meshes, rules, microbatches, schedules and what the backward recomputes change; global batch, sequence length,
    model, optimizer and precision do not.
    """
    use_no_devices()
    chosen = layouts_for(config, target, axes) if layouts is None else layouts
    sketchers = {
        remat: _sketcher(config, remat, target, constants, [c for c, r in chosen if r == remat])
        for remat in dict.fromkeys(r for _, r in chosen)
    }

    def make(candidate: Candidate, remat: str | None) -> tuple[Plan, float | None]:
        return planned(Layout(candidate, remat).of(config), target)

    return search(
        chosen, target, sketchers, make, constants=constants, notes=_notes(config), say=say, **options
    )


def layouts_for(
    config: RunConfig, target: Target, axes: Sequence[str] = ()
) -> list[tuple[Candidate, str | None]]:
    """All that a search looks at: layouts, each with every policy of what the backward recomputes.

    Raises:
        ConfigError: the model cannot be divided over one of `axes`.
    """
    able = _axes(config)
    for axis in axes:
        if axis not in able:
            fix = f"of {', '.join(a for a in AXES if a in able)}"
            raise ConfigError(f"this model cannot be divided over '{axis}'", where="axes", fix=fix)
    host = target.topology[-1] if target.platform == "cuda" else target.size
    found = space(target.size // target.slices, target.slices, able, config.global_batch, host)
    away = [HOSTED] if target.platform != "cpu" else []
    policies: list[str | None] = [None] if isinstance(config.model, Custom) else [*POLICIES, *away]
    # A stage's backward runs its layers again: no inputs of them wait for it.
    return [
        (c, remat)
        for c in found
        if not axes or set(c.mesh) <= {*SLOW, *axes}
        for remat in policies
        if remat != HOSTED or STAGE not in c.mesh
    ]


def _axes(config: RunConfig) -> set[str]:
    axes = {"data", "fsdp", "tensor"}
    if isinstance(config.model, MoEConfig):
        axes |= {"expert", "stage"} | ({"context"} if config.model.capacity == 0 else set())
    elif not isinstance(config.model, Custom):
        axes |= {"context", "stage"}
    return axes


def _sketcher(
    config: RunConfig, remat: str | None, target: Target, constants: Constants, of: Sequence[Candidate]
) -> Sketcher:
    """The model on few devices of the target, traced and partitioned: `PROBES`, as far as the layouts `of` need them."""

    def few(rows: int, candidate: Candidate) -> Plan:
        less = Layout(candidate, remat).of(dataclasses.replace(config, global_batch=rows, groups=None))
        return make_plan(less, build(less, target.some_devices(**candidate.mesh), data=False))

    papers = {}
    for kind in dict.fromkeys(["", *(kind for c in of for kind in probes_of(c))]):
        candidate, (two, three) = PROBES[kind]
        try:
            papers[kind] = partition(few(two, candidate), target), partition(few(three, candidate), target)
        except ShardTrainError:  # two do not divide it, or this JAX cannot: a guess will do
            if not kind:
                raise
    fields = build(config, target.one_device, data=False).batch
    return Sketcher(few(1, PROBES[""][0]), papers, fields, target, constants)


def _notes(config: RunConfig) -> tuple[str, ...]:
    """What a layout changes besides where things are."""
    model: Any = config.model
    if config.groups is None and (isinstance(model, MoEConfig) or getattr(model, "dropout", 0.0) > 0):
        return (
            "batch shards x microbatches are the groups of a new run, over which dropout is drawn and experts are balanced: "
            "set groups to keep them equal between layouts",
        )
    return ()


def winner(config: RunConfig, found: Search) -> RunConfig:
    """The config in the best layout.

    Raises:
        ConfigError: none fits.
    """
    if found.best is None:
        raise ConfigError(
            "no layout fits", where=f"target {found.target}", fix="more devices, or a smaller model"
        )
    return Layout(found.best.candidate, found.best.remat).of(config)


def write_winner(config: RunConfig, found: Search, file: str | os.PathLike[str]) -> None:
    """As a JSON file that `shardtrain train` takes.

    Raises:
        ConfigError: none fits, or the file cannot be written.
    """
    best = dataclasses.replace(winner(config, found), devices="auto")
    data = to_json(best)
    assert from_json(data) == best, "a config must survive its JSON"
    try:
        pathlib.Path(file).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(file), fix="another place"
        ) from error
