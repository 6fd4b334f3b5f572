"""What a process says of itself, and the judgement on all of them: a pure function of what was seen and when."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.errors import ConfigError, suggestion

SILENCE = "SHARDTRAIN_SILENCE"
"""Variable with configured budgets: `data=60,alive=30`."""

FLOORS = {
    "start": 1800.0,
    "compile": 1800.0,
    "restore": 1800.0,
    "data": 15.0,
    "dispatch": 15.0,
    "wait": 15.0,
    "hooks": 60.0,
    "evaluate": 600.0,
    "save": 1800.0,
}
"""Seconds that a phase may go without a sign of progress, at least."""

PHASES = (*FLOORS, "end")
ALIVE = 15.0  # seconds without any beat: stopped, cut off, or holding the interpreter
TIMES = 20.0  # the median of a phase
FIRST = 60.0  # until a phase was seen a few times: the first step connects devices
_SAYING = {
    "start": "starting",
    "compile": "compiling",
    "restore": "restoring",
    "data": "loading data",
    "dispatch": "dispatching",
    "hooks": "in hooks and writers",
    "evaluate": "evaluating",
    "save": "saving",
}


@dataclasses.dataclass(frozen=True)
class Beat:
    """One sign of life. `seconds`: in this phase so far, without progress. `budget`: seconds that it may, None: any.

    `serial`: counts beats. `dispatched`: the last step that was. `program`: its fingerprint. `run`: the folder.
    `means`: phase -> mean seconds of a step.
    """

    process: int
    serial: int
    phase: str
    step: int
    seconds: float
    budget: float | None = None
    dispatched: int = 0
    program: str = ""
    run: str = ""
    means: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def of(text: str) -> Beat | None:
        """None where it is none, half written say."""
        try:
            found = json.loads(text)
            return Beat(**found)
        except (ValueError, TypeError):
            return None

    @property
    def place(self) -> str:
        if self.phase == "wait":
            return f"waiting for step {self.step}'s metrics"
        return "at the end" if self.phase == "end" else f"{_SAYING[self.phase]} at step {self.step}"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A beat, and when it was new, by the clock of who saw it: hosts share none."""

    beat: Beat
    at: float

    def silent(self, now: float) -> float:
        return now - self.at

    def idle(self, now: float) -> float:
        """Seconds in its phase, as far as is known: a process that beats no more is where it was."""
        return self.beat.seconds + self.silent(now)

    def overdue(self, now: float) -> bool:
        return self.beat.budget is not None and self.idle(now) > self.beat.budget


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`processes`: who is to blame; none where all wait alike."""

    processes: tuple[int, ...]
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"processes": list(self.processes), "text": self.text}


def verdict(seen: Sequence[Seen], now: float, alive: float = ALIVE) -> Verdict | None:
    """Whether somebody is stuck, and who.

    First who has not beaten for `alive` seconds (0: any). Then who is over its budget in work of its own, the one furthest
    behind: the rest wait for it. Whoever waits is to blame for nothing while another still works within its budget;
    when all wait and all for too long, the last to dispatch is, or nobody.
    """
    judged = [s for s in seen if s.beat.phase != "end"]
    silent = [s for s in judged if 0 < alive < s.silent(now)]
    if silent:
        return _blame(silent, judged, now, "has given no sign of life for {silent:.0f} s, last seen {place}")
    working = [s for s in judged if s.beat.phase != "wait"]
    stuck = [s for s in working if s.overdue(now)]
    if stuck:
        behind = min(s.beat.dispatched for s in stuck)
        stuck = [s for s in stuck if s.beat.dispatched == behind]
        return _blame(stuck, judged, now, "has been {place} for {idle:.0f} s")
    if working or not judged or not all(s.overdue(now) for s in judged):
        return None
    behind, ahead = (f(s.beat.dispatched for s in judged) for f in (min, max))
    if behind < ahead:
        last = [s for s in judged if s.beat.dispatched == behind]
        return _blame(last, judged, now, "has been {place} for {idle:.0f} s and dispatched no later one")
    idle = min(s.idle(now) for s in judged)
    who = (
        f"all {len(judged)} processes wait" if len(judged) > 1 else f"process {judged[0].beat.process} waits"
    )
    return Verdict((), f"{who} for step {judged[0].beat.step}'s metrics for {idle:.0f} s: devices or network")


def _blame(guilty: Sequence[Seen], judged: Sequence[Seen], now: float, how: str) -> Verdict:
    guilty = sorted(guilty, key=lambda s: s.beat.process)
    names = tuple(s.beat.process for s in guilty)
    said = [
        f"process {s.beat.process} " + how.format(place=s.beat.place, idle=s.idle(now), silent=s.silent(now))
        for s in guilty
    ]
    others = [s.beat for s in judged if s.beat.process not in names]
    if others:
        places = sorted({b.place for b in others})
        said.append(f"the other{'s are' if len(others) > 1 else ' is'} {' or '.join(places[:3])}")
    return Verdict(names, "; ".join(said))


def budget_of(phase: str, times: Sequence[float], configured: Mapping[str, float]) -> float | None:
    """Seconds that a phase may take: as configured (0: any), else twenty times its median, at least its floor."""
    if phase == "end":
        return None
    if phase in configured:
        return configured[phase] or None
    ordered = sorted(times)
    learnt = TIMES * ordered[len(ordered) // 2] if ordered else 0.0
    return max(learnt, FLOORS[phase], FIRST if len(ordered) < 3 else 0.0)


def parse_silence(text: str, where: str = "--silence") -> dict[str, float]:
    """`data=60,alive=30` as budgets in seconds; 0 for none.

    Raises:
        ConfigError: another name, or no number.
    """
    found = {}
    names = (*FLOORS, "alive")
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, value = word.partition("=")
        if name not in names:
            raise ConfigError(f"no phase '{name}'", where=where, fix=suggestion(name, names, "data=60"))
        if not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ConfigError(f"'{word}' has no seconds", where=where, fix=f"{name}=60")
        found[name] = float(value)
    return found
