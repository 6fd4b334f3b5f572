"""What a search found: layouts as far as they came, the best, and in words why."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardtrain.mesh import Target
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.forecast import Forecast
from shardtrain.plan.picture import fragment
from shardtrain.plan.sketch import Sketch
from shardtrain.tree import bytes_text, table

OBJECTIVES = ("step_time", "memory", "cost")
TIERS = ("dropped", "sketched", "partitioned", "compiled", "certified")


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
            "usable": self.target.chip.usable_bytes if self.target.chip else None,
            "candidates": [e.as_json() for e in shown],
            "best": None if self.best is None else self.best.as_json(),
            "winner": self.best.forecast.as_json() if self.best and self.best.forecast else None,
            "pareto": [e.name for e in self.pareto()],
            "counts": {tier: self.count(tier) for tier in TIERS},
            "words": self.words(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def _repr_html_(self) -> str:
        return fragment(self.as_json())

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


def reason(entry: Entry, best: Entry | None) -> str:
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
    usable = best.forecast.bill.usable if best is not None and best.forecast else None
    if entry.forecast is None and usable is not None and (entry.peak or 0.0) > usable:
        return f"sketched too big: {bytes_text(entry.peak or 0.0)} of {bytes_text(usable)}"
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
    batch = axes & {"slice", "slice_fsdp", "data", "fsdp"}
    divided = " with the state divided (fsdp)" if axes & {"slice_fsdp", "fsdp"} else ""
    if not model:
        return f"data parallelism{divided}"
    kind = "hybrid parallelism, data" if batch else "model parallelism"
    return f"{kind}{divided} and {' and '.join(model)}" if batch else f"{kind} over {' and '.join(model)}"
