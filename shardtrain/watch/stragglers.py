"""Seconds of a step by phase and process, and who is slow."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping

from shardtrain.watch.beats import Beat

FILE = "processes.json"
COLUMNS = ("data", "dispatch", "wait", "hooks", "save")
_OWN = ("data", "dispatch", "hooks", "save")  # the rest is waiting for others
_TIMES, _SHARE = 1.5, 0.2
Table = Mapping[int, Mapping[str, float]]


def slow(table: Table) -> int | None:
    """The process whose own work takes 1.5 times the median of the others', and a fifth of its step more; or None."""
    own = {p: sum(row.get(c, 0.0) for c in _OWN) for p, row in table.items()}
    if len(own) < 2:
        return None
    worst = max(own, key=lambda p: own[p])
    rest = statistics.median(seconds for p, seconds in own.items() if p != worst)
    step = sum(table[worst].values())
    return worst if own[worst] > _TIMES * rest and own[worst] - rest > _SHARE * step else None


def write_table(run: pathlib.Path, beats: Iterable[Beat]) -> None:
    """Keep the table in the run's folder.

    Raises:
        OSError: it cannot be written.
    """
    rows = {b.process: dict(b.means) for b in beats if b.means}
    if len(rows) < 2:
        return
    work = run / f".{FILE}.tmp"
    work.write_text(json.dumps({"seconds": rows, "slow": slow(rows)}) + "\n", encoding="utf-8")
    os.replace(work, run / FILE)


def read_table(run: pathlib.Path) -> dict[int, dict[str, float]]:
    """What `write_table` kept; empty without."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))["seconds"]
        return {int(p): {c: float(t) for c, t in row.items()} for p, row in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def table_lines(table: Table) -> list[str]:
    """For people: milliseconds of a step, and the slow one by name."""
    lines = ["process  " + "".join(f"{c:>10}" for c in COLUMNS) + "  ms of a step"]
    for process, row in sorted(table.items()):
        lines.append(f"{process:<9}" + "".join(f"{1000 * row.get(c, 0.0):>10.1f}" for c in COLUMNS))
    if (found := slow(table)) is not None:
        phase = max(_OWN, key=lambda c: table[found].get(c, 0.0))
        lines.append(f"process {found} is slow: {1000 * table[found][phase]:.1f} ms of a step in {phase}")
    return lines
