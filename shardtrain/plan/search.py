"""The best layouts for hardware that need not be here, and why the others lost.

Three tiers, each for fewer layouts than the one before: sketched (arithmetic, `plan/sketch.py`), partitioned by Shardy
(`plan/partitioned.py`), compiled by the target's own compiler. The winner is compiled once more as production would, which
certifies that it fits. Every number says by its source which tier it is of.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from shardtrain.errors import CompileError, ConfigError, ShardTrainError
from shardtrain.mesh import Target
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants
from shardtrain.plan.forecast import Forecast, compile_lowered, forecast, lower_for, of_program
from shardtrain.plan.hlo import HloError
from shardtrain.plan.partitioned import Partitioned, partition, unavailable
from shardtrain.plan.plan import Plan
from shardtrain.plan.sketch import Sketch, Sketcher
from shardtrain.tree import bytes_text, table

Objective = Literal["step_time", "memory", "cost"]
OBJECTIVES = ("step_time", "memory", "cost")
TIERS = ("dropped", "sketched", "partitioned", "compiled", "certified")
DOUBT = 1.25  # a peak on paper of so many times what is usable may still fit: its compiler decides


@dataclasses.dataclass(frozen=True)
class Entry:
    """One layout, as far as it came. `why`: why it lost, or was dropped; of the best, what it spends its time on."""

    candidate: Candidate
    remat: str | None
    tier: str
    sketch: Sketch | None = None
    forecast: Forecast | None = None
    why: str = ""

    @property
    def name(self) -> str:
        return self.candidate.name + (f"+remat:{self.remat}" if self.remat else "")

    @property
    def kind(self) -> frozenset[str]:
        """The axes that it uses."""
        return frozenset(self.candidate.mesh)

    @property
    def seconds(self) -> float | None:
        if self.forecast is not None:
            return self.forecast.seconds
        return self.sketch.cost.total if self.sketch and self.sketch.cost else None

    @property
    def peak(self) -> float | None:
        """Bytes of one device."""
        return self.forecast.bill.peak if self.forecast else self.sketch.peak if self.sketch else None

    @property
    def fits(self) -> bool | None:
        return None if self.forecast is None else self.forecast.fits

    @property
    def source(self) -> str:
        return self.tier if self.forecast is None else self.forecast.source

    def better(self, objective: str) -> tuple[float, float]:
        """Smaller is better."""
        seconds, peak = self.seconds or 0.0, self.peak or 0.0
        return (peak, seconds) if objective == "memory" else (seconds, peak)

    def as_json(self) -> dict[str, Any]:
        """See the README for the keys."""
        c = self.candidate
        return {
            "layout": self.name,
            "mesh": c.mesh,
            "rules": c.rules,
            "remat": self.remat,
            "microbatches": c.microbatches,
            "attention": c.attention,
            "schedule": c.schedule,
            "tier": self.tier,
            "fits": self.fits,
            "memory": self.peak,
            "step_seconds": self.seconds,
            "terms": self.forecast.cost.as_json() if self.forecast and self.forecast.cost else None,
            "mfu": self.forecast.mfu if self.forecast else None,
            "why": self.why,
            "source": self.source,
        }


@dataclasses.dataclass(frozen=True)
class Search:
    """`entries`: the best first, then those that lost, then those that were dropped. `seconds`: of searching."""

    target: Target
    objective: str
    entries: tuple[Entry, ...]
    best: Entry | None
    seconds: float
    notes: tuple[str, ...]

    def pareto(self) -> list[Entry]:
        """Of those that were partitioned: none is both faster and smaller than one of these."""
        known = [
            e
            for e in self.entries
            if e.forecast is not None and e.seconds is not None and e.fits is not False
        ]
        known.sort(key=lambda e: (e.seconds or 0.0, e.peak or 0.0))
        front: list[Entry] = []
        for entry in known:
            if not front or (entry.peak or 0.0) < (front[-1].peak or 0.0):
                front.append(entry)
        return front

    def count(self, tier: str) -> int:
        """Layouts that came at least so far."""
        return sum(TIERS.index(e.tier) >= TIERS.index(tier) for e in self.entries)

    def words(self) -> str:
        """In plain words: data, model or hybrid parallelism, and why not less."""
        if self.best is None:
            return f"no layout of {self.target} fits"
        kind = _words(self.best.kind)
        alone = [
            e
            for e in self.entries
            if e.kind <= {"slice", "data"} and e.candidate.rules != "zero1" and e.sketch
        ]
        said = f"{kind}: {self.best.name}"
        if not self.best.kind <= {"slice", "data"} and alone:
            one = min(alone, key=lambda e: e.better(self.objective))
            usable = self.best.forecast.bill.usable if self.best.forecast else None
            assert one.sketch is not None
            if usable is not None and one.sketch.state > usable:
                said += (
                    f". With data parallelism alone every device holds {bytes_text(one.sketch.state)} of parameters, "
                    f"gradients and optimizer, of {bytes_text(usable)}"
                )
            elif one.seconds and self.best.seconds:
                said += f". With data parallelism alone a step takes {one.seconds / self.best.seconds:.2f} times as long"
                said += f", in {bytes_text(one.peak or 0)}" if one.peak else ""
        return said

    def as_json(self, top: int | None = None) -> dict[str, Any]:
        """See the README for the keys."""
        shown = self.entries if top is None else self.entries[:top]
        return {
            "target": self.target.name,
            "objective": self.objective,
            "candidates": [e.as_json() for e in shown],
            "best": None if self.best is None else self.best.as_json(),
            "pareto": [e.name for e in self.pareto()],
            "counts": {tier: self.count(tier) for tier in TIERS},
            "words": self.words(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def text(self, top: int = 5) -> str:
        """A table of the best, and what became of the others."""
        front = {e.name for e in self.pareto()}
        rows = [
            (
                e.name + (" *" if e.name in front else ""),
                f"{e.seconds:.4g} s" if e.seconds else "-",
                bytes_text(e.peak) if e.peak else "-",
                {True: "yes", False: "no", None: "?"}[e.fits],
                e.tier,
                e.why,
            )
            for e in self.entries
            if e.tier != "dropped"
        ]
        shown = [r for i, r in enumerate(rows) if i < top or r[4] in ("compiled", "certified")]
        dropped: dict[str, int] = {}
        for e in self.entries:
            if e.tier == "dropped":
                dropped[e.why] = dropped.get(e.why, 0) + 1
        lines = [
            self.words(),
            table(("layout", "step", "peak", "fits", "tier", "why"), shown),
            "* none is both faster and smaller",
            f"{len(self.entries)} layouts: {self.count('sketched')} sketched, {self.count('partitioned')} partitioned, "
            f"{self.count('compiled')} compiled, in {self.seconds:.0f} s",
            *(f"dropped, {n} x: {why}" for why, n in sorted(dropped.items(), key=lambda item: -item[1])[:5]),
            *self.notes,
        ]
        if self.best is not None and self.best.forecast is not None:
            lines.insert(1, str(self.best.forecast))
        return "\n\n".join(lines)


def search(
    layouts: Sequence[tuple[Candidate, str | None]],
    target: Target,
    sketchers: Mapping[str | None, Sketcher],
    make: Callable[[Candidate, str | None], tuple[Plan, float | None]],
    *,
    objective: str = "step_time",
    constants: Constants | None = None,
    partitions: int = 24,
    compiles: int = 5,
    timeout: float = 300,
    level: str = "fast",
    workers: int = 2,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Search:
    """Rank layouts of one model on one target.

    Args:
        layouts: candidates with what the backward recomputes. sketchers: by that. make: the plan of a layout on the
            target's abstract mesh, and the model's FLOPs of a step.
        objective: `step_time`, `memory`, or `cost`, which on one target is the time.
        partitions, compiles: how many reach the second and the third tier. timeout: seconds for one compilation;
            a compiler that dies, hangs or runs out of memory costs its layout the place, not the search.
        level: of the third tier; the winner is compiled at `full` anyway.

    Raises:
        ConfigError: no layout divides.
    """
    started = time.monotonic()
    constants = constants or Constants.of(target)
    usable = target.chip.usable_bytes if target.chip else None
    entries = [_sketched(c, remat, sketchers[remat], usable) for c, remat in layouts]
    alive = sorted((e for e in entries if e.tier != "dropped"), key=lambda e: e.better(objective))
    dropped = [e for e in entries if e.tier == "dropped"]
    if not alive:
        why = dropped[0].why if dropped else "none was given"
        raise ConfigError("no layout can run", where=f"target {target}", why=why, fix="more devices")
    say(f"{len(alive)} of {len(entries)} layouts sketched, {time.monotonic() - started:.0f} s")
    chosen = _few(alive, partitions, objective, usable) if not unavailable() else []
    done: dict[str, Entry] = {}
    papers: dict[str, tuple[Plan, Partitioned]] = {}
    for entry in chosen:
        done[entry.name] = _partitioned(entry, target, make, constants, papers)
    say(f"{len(done)} partitioned, {time.monotonic() - started:.0f} s")
    entries = [done.get(e.name, e) for e in alive]
    hopeful = sorted((e for e in entries if _may_fit(e)), key=lambda e: e.better(objective))
    if compiles and hopeful:
        for entry in _compiled(
            _few(hopeful, compiles, objective, usable), papers, constants, level, timeout, workers, say
        ):
            done[entry.name] = entry
    entries = [done.get(e.name, e) for e in alive]
    entries, best = _certified(entries, papers, constants, objective, timeout, certify=bool(compiles))
    entries = _explained(sorted(entries, key=lambda e: _order(e, objective)), best)
    return Search(target, objective, (*entries, *dropped), best, time.monotonic() - started, tuple(notes))


def _sketched(candidate: Candidate, remat: str | None, sketcher: Sketcher, usable: float | None) -> Entry:
    try:
        found = sketcher(candidate)
    except ShardTrainError as error:
        where = f"{error.where}: " if error.where else ""
        return Entry(candidate, remat, "dropped", why=f"{where}{error.message}")
    if usable is not None and found.state > usable:
        why = "parameters, gradients and optimizer alone are more than the device has"
        return Entry(candidate, remat, "dropped", found, why=why)
    return Entry(candidate, remat, "sketched", found)


def _too_big(entry: Entry, usable: float | None) -> bool:
    return entry.forecast is None and usable is not None and (entry.peak or 0.0) > usable


def _few(entries: Sequence[Entry], count: int, objective: str, usable: float | None) -> list[Entry]:
    """The best of those that seem to fit, and the best of each kind; half of the places at most go to kinds."""
    ordered = sorted(entries, key=lambda e: (_too_big(e, usable), e.better(objective)))
    kinds: dict[frozenset[str], Entry] = {}
    for entry in ordered:
        kinds.setdefault(entry.kind, entry)
    firsts = list(kinds.values())[: count // 2]
    best = [e for e in ordered if e not in firsts][: count - len(firsts)]
    return [*firsts, *best]


def _partitioned(
    entry: Entry,
    target: Target,
    make: Callable[[Candidate, str | None], tuple[Plan, float | None]],
    constants: Constants,
    papers: dict[str, tuple[Plan, Partitioned]],
) -> Entry:
    try:
        plan, flops = make(entry.candidate, entry.remat)
        paper = partition(plan, target)
    except (ShardTrainError, HloError) as error:
        return dataclasses.replace(entry, tier="dropped", why=str(error).splitlines()[0])
    papers[entry.name] = plan, paper
    found = forecast(plan, target, constants=constants, model_flops=flops, paper=paper)
    return dataclasses.replace(entry, tier="partitioned", forecast=found)


def _may_fit(entry: Entry) -> bool:
    if entry.forecast is None or entry.tier == "dropped":
        return False
    usable = entry.forecast.bill.usable
    return usable is None or entry.forecast.bill.peak <= DOUBT * usable


def _compiled(
    entries: Sequence[Entry],
    papers: Mapping[str, tuple[Plan, Partitioned]],
    constants: Constants,
    level: str,
    timeout: float,
    workers: int,
    say: Callable[[str], None],
) -> list[Entry]:
    """Each in a process of its own; tracing stays here, one after the other."""
    waiting: dict[concurrent.futures.Future[Any], Entry] = {}
    found: list[Entry] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for entry in entries:
            assert entry.forecast is not None
            try:
                lowered = lower_for(papers[entry.name][0], entry.forecast.target)
            except ConfigError as error:  # the compiler is not installed: nothing can be compiled
                say(f"not compiled: {error}")
                return []
            waiting[pool.submit(compile_lowered, lowered, entry.forecast, level, timeout)] = entry
        for future in concurrent.futures.as_completed(waiting):
            found.append(_with(waiting[future], future, papers, constants))
            say(
                f"compiled {waiting[future].name}: {found[-1].why or 'fits' if found[-1].fits else found[-1].why}"
            )
    return found


def _with(
    entry: Entry,
    future: concurrent.futures.Future[Any],
    papers: Mapping[str, tuple[Plan, Partitioned]],
    constants: Constants,
    tier: str = "compiled",
) -> Entry:
    plan, paper = papers[entry.name]
    assert entry.forecast is not None
    try:
        new = of_program(entry.forecast, future.result(), paper, constants, plan)
    except (CompileError, HloError) as error:
        return dataclasses.replace(entry, tier="dropped", why=str(error).splitlines()[0])
    return dataclasses.replace(entry, tier=tier, forecast=new)


def _certified(
    entries: Sequence[Entry],
    papers: Mapping[str, tuple[Plan, Partitioned]],
    constants: Constants,
    objective: str,
    timeout: float,
    *,
    certify: bool,
) -> tuple[list[Entry], Entry | None]:
    """The best that fits, compiled as production would; if that refuses it, the next."""
    left = list(entries)
    while True:
        for tiers in (("compiled",), ("partitioned",), ("sketched",)):
            able = [e for e in left if e.tier in tiers and e.fits is not False]
            if able:
                break
        else:
            return left, None
        best = min(able, key=lambda e: e.better(objective))
        if not certify or best.tier != "compiled":
            return left, best
        assert best.forecast is not None
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            lowered = lower_for(papers[best.name][0], best.forecast.target)
            future.set_result(compile_lowered(lowered, best.forecast, "full", timeout))
        except ShardTrainError as error:
            future.set_exception(error)
        sure = _with(best, future, papers, constants, "certified")
        left = [sure if e is best else e for e in left]
        if sure.tier == "certified" and sure.fits:
            return left, sure


def _order(entry: Entry, objective: str) -> tuple[Any, ...]:
    return (entry.fits is False, -TIERS.index(entry.tier), entry.better(objective))


def _explained(entries: Sequence[Entry], best: Entry | None) -> list[Entry]:
    return [dataclasses.replace(e, why=e.why or _why(e, best)) for e in entries]


def _why(entry: Entry, best: Entry | None) -> str:
    if entry is best:
        return (
            f"most time in {entry.forecast.cost.limit}" if entry.forecast and entry.forecast.cost else "best"
        )
    if entry.fits is False and entry.forecast is not None:
        bill = entry.forecast.bill
        return (
            entry.forecast.refused
            or f"does not fit: {bytes_text(bill.peak)} of {bytes_text(bill.usable or 0)}"
        )
    if best is None or not entry.seconds or not best.seconds:
        return ""
    text = f"{entry.seconds / best.seconds:.2f} x the time"
    ours, theirs = (
        e.forecast.cost if e.forecast else e.sketch.cost if e.sketch else None for e in (entry, best)
    )
    if ours is None or theirs is None or ours.total <= theirs.total:
        return text
    terms = lambda c: {"compute": c.compute, "hbm": c.hbm, "bubble": c.bubble, **c.waited}  # noqa: E731
    before = terms(theirs)
    more = {name: value - before.get(name, 0.0) for name, value in terms(ours).items()}
    worst = max(more, key=lambda name: more[name])
    return f"{text}: {worst} +{more[worst]:.3g} s"


def _words(axes: frozenset[str]) -> str:
    model = sorted(axes & {"tensor", "stage", "context", "expert"})
    batch = axes & {"slice", "data", "fsdp"}
    divided = " with the state divided (fsdp)" if "fsdp" in axes else ""
    if not model:
        return f"data parallelism{divided}"
    kind = "hybrid parallelism, data" if batch else "model parallelism"
    return f"{kind}{divided} and {' and '.join(model)}" if batch else f"{kind} over {' and '.join(model)}"
