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
from typing import Any

from shardtrain.errors import CompileError, ConfigError, ShardTrainError
from shardtrain.mesh import Target
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants
from shardtrain.plan.forecast import compile_lowered, forecast, lower_for, of_program
from shardtrain.plan.hlo import HloError
from shardtrain.plan.partitioned import Partitioned, partition, unavailable
from shardtrain.plan.plan import Plan
from shardtrain.plan.ranking import TIERS, Entry, Search, reason
from shardtrain.plan.sketch import Sketcher

DOUBT = 1.25  # a peak on paper of so many times what is usable may still fit: its compiler decides; or a sketch's: paper does


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
    cannot = [unavailable(e.candidate.mesh) for e in alive]
    able = [e for e, why in zip(alive, cannot, strict=True) if not why]
    if any(cannot):
        notes = (*notes, f"some were sketched alone: {next(filter(None, cannot))}")
    done: dict[str, Entry] = {}
    papers: dict[str, tuple[Plan, Partitioned]] = {}
    for entry in _few(able, partitions, objective, usable):
        done[entry.name] = _partitioned(entry, target, make, constants, papers)
    if all(e.fits is False for e in done.values()):  # as many again, of what sketches say does fit
        left = [e for e in able if e.name not in done and not _too_big(e, usable)]
        for entry in sorted(left, key=lambda e: e.better("memory"))[:partitions]:
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
    entries, best = _certified(
        entries, papers, constants, objective, timeout, usable=usable, certify=bool(compiles)
    )
    entries = _explained(sorted(entries, key=lambda e: _order(e, objective)), best)
    best = None if best is None else next(e for e in entries if e.name == best.name)
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
    """The best of those that seem to fit, then the smallest of the others; half of the places at most go to the best of
    each kind, an eighth to the best of what its sketch says is a little too big: it may be wrong."""
    big = lambda e: _too_big(e, usable)  # noqa: E731
    ordered = sorted(entries, key=lambda e: (big(e), e.better("memory" if big(e) else objective)))
    kinds: dict[frozenset[str], Entry] = {}
    for entry in ordered:
        kinds.setdefault(entry.kind, entry)
    firsts = list(kinds.values())[: count // 2]
    doubtful = [
        e for e in entries if big(e) and (e.peak or 0.0) <= DOUBT * (usable or 0.0) and e not in firsts
    ]
    firsts += sorted(doubtful, key=lambda e: e.better(objective))[: count // 8]
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
    except ShardTrainError as error:
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
    usable: float | None,
    certify: bool,
) -> tuple[list[Entry], Entry | None]:
    """The best that fits, compiled as production would; if that refuses it, the next."""
    left = list(entries)
    while True:
        for tiers in (("compiled",), ("partitioned",), ("sketched",)):
            able = [e for e in left if e.tier in tiers and e.fits is not False and not _too_big(e, usable)]
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
        if sure.tier == "certified" and sure.fits is not False:
            return left, sure


def _order(entry: Entry, objective: str) -> tuple[Any, ...]:
    return (entry.fits is False, -TIERS.index(entry.tier), entry.better(objective))


def _explained(entries: Sequence[Entry], best: Entry | None) -> list[Entry]:
    return [dataclasses.replace(e, why=e.why or reason(e, best)) for e in entries]
