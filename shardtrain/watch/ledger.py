"""What the time of a run went into: one part at a time, so that the parts sum to the wall clock."""

from __future__ import annotations

import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

FILE = "goodput.json"
PARTS = ("compute", "evaluate", "compile", "input", "checkpoint", "start", "restart", "lost")
_KEPT = 1024  # steps whose seconds are known one by one; what is lost beyond them counts as compute
_OF = {
    "compile": "compile",
    "data": "input",
    "dispatch": "compute",
    "wait": "compute",
    "hooks": "compute",
    "evaluate": "evaluate",
    "save": "checkpoint",
}


class Ledger:
    """A run's time over all its attempts.

    Starting and restoring are `start` in a run's first attempt and `restart` later. Between the last word of an attempt
    and a restart by a launcher all is `restart`; a run that somebody resumes by hand was not running in between.
    Compute of steps that a resume goes behind becomes `lost`.

    Args:
        old: what an earlier attempt kept. again: a launcher started this one. age: seconds that the process has run already.
        clock: seconds, any origin. wall: seconds since 1970, for the time between attempts.
    """

    def __init__(
        self,
        old: Mapping[str, Any] | None = None,
        *,
        again: bool = False,
        age: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        old = old or {}
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._parts = {part: float(old.get("parts", {}).get(part, 0.0)) for part in PARTS}
        self._steps = {int(s): float(t) for s, t in old.get("steps", {}).items()}
        self._attempts = int(old.get("attempts", 0)) + 1
        self._opening = "restart" if old else "start"
        between = max(age, self._wall() - float(old["at"])) if old and again else age
        self._parts[self._opening] += between
        self._part, self._step = self._opening, 0
        self._since = clock()

    def enter(self, phase: str, step: int, hidden: bool = False) -> None:
        """From here on. `hidden`: what ends here went on beside the devices' work, and counts as compute."""
        with self._lock:
            self._settle(hidden)
            self._part, self._step = _OF.get(phase, self._opening), step

    def resumed(self, step: int) -> None:
        """The state is that of `step`: later ones are computed again."""
        with self._lock:
            lost = sum(seconds for s, seconds in self._steps.items() if s > step)
            self._parts["compute"] -= lost
            self._parts["lost"] += lost
            self._steps = {s: seconds for s, seconds in self._steps.items() if s <= step}

    def _settle(self, hidden: bool = False) -> None:
        now = self._clock()
        part = "compute" if hidden else self._part
        self._parts[part] += now - self._since
        if part == "compute":
            self._steps[self._step] = self._steps.get(self._step, 0.0) + now - self._since
            while len(self._steps) > _KEPT:
                del self._steps[min(self._steps)]
        self._since = now

    def as_json(self) -> dict[str, Any]:
        """`parts` sum to `wall_seconds`; `goodput` is the share of compute and evaluations."""
        with self._lock:
            self._settle()
            parts = dict(self._parts)
            wall = sum(parts.values())
            good = parts["compute"] + parts["evaluate"]
            return {
                "wall_seconds": wall,
                "goodput": good / wall if wall else None,
                "attempts": self._attempts,
                "parts": parts,
                "at": self._wall(),
                "steps": {str(s): round(t, 6) for s, t in self._steps.items()},
            }

    def write(self, run: pathlib.Path) -> None:
        """Keep it in the run's folder.

        Raises:
            OSError: it cannot be written.
        """
        work = run / f".{FILE}.tmp"
        work.write_text(json.dumps(self.as_json()) + "\n", encoding="utf-8")
        os.replace(work, run / FILE)


def read_goodput(run: pathlib.Path) -> dict[str, Any]:
    """What `Ledger.write` kept; empty without."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
        return found if found["parts"].keys() >= set(PARTS) and "at" in found else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def goodput_lines(found: Mapping[str, Any]) -> str:
    """One line for people: the share, and where the rest went."""
    wall = found["wall_seconds"]
    parts = sorted(found["parts"].items(), key=lambda p: -p[1])
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts if seconds >= 0.05)
    return f"goodput {found['goodput'] or 0.0:.1%} of {wall:.1f} s ({shares})"
