"""A config on hardware that is not here: one forecast for each target, and the cheapest ways to make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from shardtrain.config.build import build, build_mesh, make_plan
from shardtrain.config.devices import use_no_devices
from shardtrain.config.resolve import resolve
from shardtrain.config.schema import Custom, MeshSizes, RunConfig
from shardtrain.errors import ShardTrainError
from shardtrain.mesh import Target
from shardtrain.parallel.remat import HOSTED
from shardtrain.parallel.stages import STAGE
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants
from shardtrain.plan.forecast import Forecast, forecast
from shardtrain.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Layout:
    """A candidate, and what the backward recomputes (None: the config's own, or nobody's to say)."""

    candidate: Candidate
    remat: str | None

    @property
    def name(self) -> str:
        return self.candidate.name + (f"+remat:{self.remat}" if self.remat else "")

    def of(self, config: RunConfig) -> RunConfig:
        """The config in this layout: what is trained stays as it is."""
        c, model = self.candidate, config.model
        if self.remat is not None and not isinstance(model, Custom):
            model = dataclasses.replace(model, remat=self.remat)
        options: dict[str, Any] = c.options
        return dataclasses.replace(
            config, model=model, mesh=MeshSizes(**c.mesh), dcn=type(config.dcn)(), **options
        )

    @classmethod
    def now(cls, config: RunConfig, target: Target) -> Layout:
        """The config's own on a target."""
        mesh = dict(build_mesh(config, target).shape)
        candidate = Candidate.of(
            mesh,
            rules=config.rules,
            microbatches=config.microbatches,
            attention=config.attention,
            schedule=config.schedule,
        )
        return cls(candidate, remat_of(config))


def remat_of(config: RunConfig) -> str | None:
    """What the model of a config recomputes; None for one of the user's own, which does as it likes."""
    return None if isinstance(config.model, Custom) else config.model.remat


def planned(config: RunConfig, target: Target) -> tuple[Plan, float | None]:
    """The plan on the target's abstract mesh, and the model's FLOPs of a step."""
    pieces = build(config, build_mesh(config, target), data=False)
    flops = pieces.flops_per_row * config.global_batch if pieces.flops_per_row else None
    return make_plan(config, pieces), flops


def forecast_config(
    config: RunConfig, target: Target, constants: Constants, *, compile: str = "no", timeout: float = 600
) -> tuple[Plan, Forecast]:
    """`plan.forecast.forecast` for a config."""
    plan, flops = planned(config, target)
    found = forecast(plan, target, constants=constants, model_flops=flops, compile=compile, timeout=timeout)
    return plan, found


def forecasts(
    name: str,
    flags: Sequence[str],
    targets: Sequence[str],
    constants: str | None,
    compile: str,
    timeout: float,
) -> Iterator[tuple[RunConfig, Plan, Forecast, list[str]]]:
    """A config on each target, with lines to say. The names are all checked before anything is traced."""
    use_no_devices()
    known = [Target(t) for t in targets]
    resolved = [(t, Constants.of(t, constants), *resolve(name, flags, t.size)) for t in known]
    for target, shares, config, notes in resolved:
        config, note = _over_slices(config, target)
        found = forecast_config(config, target, shares, compile=compile, timeout=timeout)
        yield config, *found, [*notes, *note]


def _over_slices(config: RunConfig, target: Target) -> tuple[RunConfig, list[str]]:
    """Data over the slices of a target, where the config says nothing of them; and a line that says so."""
    if target.slices == 1 or config.dcn.data > 1 or config.mesh.slice > 1:
        return config, []
    dcn = dataclasses.replace(config.dcn, data=target.slices)
    return dataclasses.replace(config, dcn=dcn), [
        f"data goes over the {target.slices} slices: --dcn.data {dcn.data}"
    ]


@dataclasses.dataclass(frozen=True)
class WayOut:
    """A change that makes a config fit, or comes nearest: what it is, the forecast with it, and against that of the config as
    it was what it saves (bytes of one device) and costs (seconds of a step)."""

    change: str
    layout: Layout
    forecast: Forecast
    saves: float
    costs: float | None

    def as_json(self) -> dict[str, Any]:
        f = self.forecast
        return {
            "change": self.change,
            "layout": self.layout.name,
            "fits": self.forecast.fits,
            "peak": f.bill.peak,
            "saves": self.saves,
            "step_seconds": f.seconds,
            "costs": self.costs,
            "source": f.source,
        }


def ways_to_fit(
    config: RunConfig,
    target: Target,
    constants: Constants,
    before: Forecast,
    most: int = 3,
    *,
    compile: str = "no",
    timeout: float = 600,
) -> list[WayOut]:
    """The cheapest changes of layout under which a config that does not fit does, each partitioned anew and, unless
    `compile` is "no", compiled.

    One change at a time, then two together. Global batch, sequence length and numerics stay. Where none of them fits, the one
    that comes nearest, by its peak. `before`: of the config as it is, what each is compared with.
    """

    def way(change: str, layout: Layout, found: Forecast) -> WayOut:
        slower = None if found.seconds is None or before.seconds is None else found.seconds - before.seconds
        return WayOut(change, layout, found, before.bill.peak - found.bill.peak, slower)

    here = Layout.now(config, target)
    ones = list(_changes(here, config, target))
    found: list[WayOut] = []
    rest: list[WayOut] = []
    for changes in ([(c,) for c in ones], [(a, b) for i, a in enumerate(ones) for b in ones[i + 1 :]]):
        for change in changes[:12]:
            layout = here
            for _, apply in change:
                layout = apply(layout)
            try:
                _, seen = forecast_config(layout.of(config), target, constants)
            except ShardTrainError:
                continue
            (found if seen.fits else rest).append(way(" and ".join(text for text, _ in change), layout, seen))
        if found:
            break
    found.sort(key=lambda way: way.forecast.seconds or 0.0)
    sure = found[:most]
    if compile != "no":
        sure = []
        for each in found[: 2 * most]:
            try:
                _, seen = forecast_config(
                    each.layout.of(config), target, constants, compile=compile, timeout=timeout
                )
            except ShardTrainError:
                continue
            (sure if seen.fits else rest).append(way(each.change, each.layout, seen))
            if len(sure) == most:
                break
    nearest = sorted(rest, key=lambda way: way.forecast.bill.peak)[:1]
    return sorted(sure, key=lambda way: way.forecast.seconds or 0.0) or nearest


def _changes(here: Layout, config: RunConfig, target: Target) -> Iterator[tuple[str, Any]]:
    def change(**fields: Any) -> Any:
        return lambda layout: dataclasses.replace(
            layout, candidate=dataclasses.replace(layout.candidate, **fields)
        )

    c = here.candidate
    for times in (4, 16):
        yield f"--microbatches {c.microbatches * times}", change(microbatches=c.microbatches * times)
    if here.remat not in (None, "full"):
        yield "remat full", lambda layout: dataclasses.replace(layout, remat="full")
    if here.remat not in (None, HOSTED) and target.platform != "cpu" and c.mesh.get(STAGE, 1) == 1:
        yield f"remat {HOSTED}", lambda layout: dataclasses.replace(layout, remat=HOSTED)
    if c.mesh.get("tensor", 1) > 1 and c.rules in ("tensor", "fsdp_tensor"):
        yield f"rules {c.rules}_sequence", change(rules=f"{c.rules}_sequence")
    batch = [a for a in ("data", "fsdp") if c.mesh.get(a, 1) > 1]
    if c.mesh.get("data", 1) > 1:
        sizes = {**c.mesh, "data": 1, "fsdp": c.mesh.get("fsdp", 1) * c.mesh["data"]}
        rules = {"data": "fsdp_tensor", "zero1": "fsdp_tensor", "zero1_tensor": "fsdp_tensor"}.get(
            c.rules, c.rules
        )
        yield "fsdp in place of data", change(sizes=Candidate.of(sizes).sizes, rules=rules)
    for axis in ("tensor", "context"):
        if batch and c.mesh[batch[-1]] % 2 == 0:
            sizes = {**c.mesh, batch[-1]: c.mesh[batch[-1]] // 2, axis: 2 * c.mesh.get(axis, 1)}
            yield (
                f"{axis}={sizes[axis]}, {batch[-1]}={sizes[batch[-1]]}",
                change(sizes=Candidate.of(sizes).sizes),
            )
