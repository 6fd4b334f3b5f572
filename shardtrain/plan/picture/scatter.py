"""Candidates of a search: memory against step time, and all of them in a table with the reason why each lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.plan.picture.marks import (
    Markup,
    both,
    fitted,
    label,
    seconds_text,
    steps,
    svg,
    table,
    tag,
    text,
)
from shardtrain.tree import bytes_text

Row = Mapping[str, Any]
_SHAPES = {"sketched": 3.0, "partitioned": 5.0, "compiled": 6.0, "certified": 9.0}  # half of their width


def scatter(rows: Sequence[Row], front: Sequence[str], usable: float | None, best: str | None) -> str:
    """Of those of which both numbers are known; fewer digits, and logarithms where they lie far apart."""
    known = [(i, r) for i, r in enumerate(rows) if r["step_seconds"] and r["memory"]]
    if not known:
        return tag(
            "p", "No seconds are known for this hardware, so there is nothing to draw; the table has all."
        )
    return both(lambda width: _drawn(known, set(front), usable, best, width))


class _Axis:
    """Numbers to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = min(values), max(values)
        self.logarithmic = high > 4 * low
        pad = 1.15 if self.logarithmic else 1.0
        spare = 0.0 if self.logarithmic else 0.06 * (high - low or high)
        self.low, self.high = max(low / pad - spare, low / 10), high * pad + spare
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        way = math.log if self.logarithmic else float
        share = (way(value) - way(self.low)) / (way(self.high) - way(self.low))
        return self.start + share * (self.end - self.start)

    def steps(self, most: int) -> list[float]:
        return steps(self.low, self.high, self.logarithmic, most)


def _drawn(
    known: Sequence[tuple[int, Row]], front: set[str], usable: float | None, best: str | None, width: float
) -> str:
    left, right, top, height = 76.0, 16.0, 22.0, 400.0
    floor = height - 42
    x = _Axis([r["step_seconds"] for _, r in known], left, width - right)
    sizes = [r["memory"] / 2**30 for _, r in known] + ([usable / 2**30] if usable else [])
    y = _Axis(sizes, floor, top)
    marks = []
    for at in x.steps(7 if width > 600 else 3):
        marks.append(tag("line", x1=x(at), x2=x(at), y1=top, y2=floor, class_="rule"))
        marks.append(text(x(at), floor + 17, seconds_text(at), text_anchor="middle", class_="faint"))
    for at in y.steps(7):
        marks.append(tag("line", x1=left, x2=width - right, y1=y(at), y2=y(at), class_="rule"))
        marks.append(text(left - 8, y(at) + 4, f"{at:g} GiB", text_anchor="end", class_="faint"))
    logs = [name for name, axis in (("time", x), ("memory", y)) if axis.logarithmic]
    also = f" ({' and '.join(logs)} logarithmic)" if logs else ""
    below = f"predicted step time, peak memory of one device{also}"
    marks.append(text(left, floor + 36, fitted(below, width - left)))
    if usable:
        at = y(usable / 2**30)
        marks.append(tag("line", x1=left, x2=width - right, y1=at, y2=at, class_="limit"))
        marks.append(
            text(width - right, at - 5, f"usable {bytes_text(usable)}", text_anchor="end", class_="halo")
        )
    place = {r["layout"]: (x(r["step_seconds"]), y(r["memory"] / 2**30)) for _, r in known}
    line = sorted(place[name] for name in front if name in place)
    if len(line) > 1:
        corners = [f"{a:.1f},{b:.1f}" for a, b in line]
        marks.append(tag("polyline", points=" ".join(corners), class_="front"))
    order = sorted(known, key=lambda pair: (pair[1]["layout"] == best, pair[1]["tier"] != "sketched"))
    for row, r in order:
        marks.append(_point(row, r, *place[r["layout"]], r["layout"] in front, r["layout"] == best))
    points = tag("g", "".join(marks), class_="points", tabindex=0)
    return svg(width, height, f"{len(known)} layouts, memory against step time", [points])


def _point(row: int, r: Row, x: float, y: float, front: bool, best: bool) -> str:
    tier = r["tier"] if r["tier"] in _SHAPES else "sketched"
    half = _SHAPES[tier]
    kinds = ["point", tier]
    kinds += ["toobig"] if r["fits"] is False else []
    kinds += ["onfront"] if front else []
    kinds += ["best"] if best else []
    if kinds == ["point", "sketched"]:  # there are thousands of these
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{half:g}" class="point sketched" data-row="{row}"/>'
    return tag("path", d=_outline(tier, r["fits"], x, y, half), class_=" ".join(kinds), data_row=row)


def _outline(tier: str, fits: bool | None, x: float, y: float, half: float) -> str:
    """A cross where it does not fit, else by tier: dot, circle, diamond, star."""
    if fits is False:
        h = max(half, 4.0) * 0.8
        return f"M{x - h:.1f} {y - h:.1f}l{2 * h:.1f} {2 * h:.1f}m0 {-2 * h:.1f}l{-2 * h:.1f} {2 * h:.1f}"
    if tier == "compiled":
        return f"M{x:.1f} {y - half:.1f}l{half} {half}l{-half} {half}l{-half} {-half}z"
    if tier == "certified":
        turns = [(half if i % 2 == 0 else half * 0.45, math.pi * (i / 5 - 0.5)) for i in range(10)]
        points = [f"{x + r * math.cos(t):.1f} {y + r * math.sin(t):.1f}" for r, t in turns]
        return f"M{'L'.join(points)}z"
    return f"M{x - half:.1f} {y:.1f}a{half} {half} 0 1 0 {2 * half} 0a{half} {half} 0 1 0 {-2 * half} 0z"


def legend() -> str:
    """Shapes in words."""
    items = []
    for tier, half in _SHAPES.items():
        shape = tag("path", d=_outline(tier, True, 10, 10, half), class_=f"point {tier}")
        items.append(tag("span", svg(20, 20, tier, [shape]) + tier, class_="key"))
    cross = tag("path", d=_outline("partitioned", False, 10, 10, 5), class_="point toobig")
    items.append(tag("span", svg(20, 20, "cross", [cross]) + "does not fit", class_="key"))
    line = tag("line", x1=1.0, x2=19.0, y1=10.0, y2=10.0, class_="front")
    items.append(tag("span", svg(20, 20, "line", [line]) + "Pareto front", class_="key"))
    return tag("p", "".join(items), class_="legend")


def candidates(rows: Sequence[Row], front: Sequence[str]) -> str:
    """All in the search's order: what each would take, and why it lost or was dropped."""
    shown = [
        (
            r["layout"] + (" *" if r["layout"] in front else ""),
            seconds_text(r["step_seconds"]),
            bytes_text(r["memory"]) if r["memory"] else "-",
            {True: "yes", False: "no", None: "?"}[r["fits"]],
            Markup(label(r["source"] if r["tier"] != "certified" else f"certified {r['source']}")),
            r["why"],
        )
        for r in rows
    ]
    return table(
        ("layout", "step", "memory", "fits", "tier", "why"), shown, right=(1, 2), class_="candidates"
    )
