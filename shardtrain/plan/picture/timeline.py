"""The predicted seconds of a step: a lane for the arithmetic, and one for each mesh axis that sends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.plan.cost import HOST
from shardtrain.plan.picture.marks import LETTER, both, escape, fitted, seconds_text, steps, svg, tag, text

_TERMS = ("compute", "hbm", "bubble", "total", "waited")


@dataclasses.dataclass(frozen=True)
class Bar:
    """`lane` is busy from `start` to `end`, seconds. `kind`: compute, hbm, hidden, waited or bubble."""

    lane: str
    kind: str
    start: float
    end: float
    what: str


def bars(seconds: Mapping[str, Any], collectives: Sequence[Mapping[str, Any]] = ()) -> list[Bar]:
    """The terms of the cost model end to end: what hides stands under compute, what is waited for after it.

    The last ends at `total`. An axis' bar is cut by kind of collective, as far as their seconds are known.
    """
    waited: Mapping[str, float] = seconds["waited"]
    busy = seconds["compute"] + seconds["hbm"]
    found = [Bar("compute", "compute", 0.0, seconds["compute"], "compute")]
    if seconds["hbm"]:
        found.append(Bar("compute", "hbm", seconds["compute"], busy, "waiting for memory (HBM)"))
    under, after = 0.0, busy
    for axis in (name for name in seconds if name not in _TERMS):
        whole = seconds[axis]
        rows = [(c["op"], c.get("seconds") or 0.0) for c in collectives if c["axis"] == axis]
        rows = sorted(((op, t) for op, t in rows if t > 0), key=lambda row: -row[1]) or [("sent", whole)]
        for op, taken in rows:
            part = taken / whole if whole else 0.0
            hidden, late = (whole - waited[axis]) * part, waited[axis] * part
            if hidden > 0:
                found.append(Bar(axis, "hidden", under, under + hidden, f"{op}, beside compute"))
            if late > 0:
                found.append(Bar(axis, "waited", after, after + late, f"{op}, waited for"))
            under, after = under + hidden, after + late
    if seconds["bubble"]:
        found.append(Bar("bubble", "bubble", after, after + seconds["bubble"], "stages without work"))
    return found


def timeline(seconds: Mapping[str, Any], collectives: Sequence[Mapping[str, Any]]) -> str:
    """Lanes of the terms, with what overlaps. Where in a step they fall is not predicted: the order is ours."""
    drawn = bars(seconds, collectives)
    links = {HOST: "PCIe"} | {c["axis"]: c["link"] for c in collectives if c.get("link")}
    return both(lambda width: _drawn(drawn, seconds["total"], links, width))


def _drawn(drawn: Sequence[Bar], total: float, links: Mapping[str, str], width: float) -> str:
    lanes = list(dict.fromkeys(bar.lane for bar in drawn))
    left, right, top, high = (170.0 if width > 600 else 92.0), 14.0, 8.0, 40.0
    scale = (width - left - right) / total
    floor = top + high * len(lanes)
    marks = []
    for at in steps(0.0, total, False, 7 if width > 600 else 3):
        x = left + at * scale
        marks.append(tag("line", x1=x, x2=x, y1=top, y2=floor, class_="rule"))
        marks.append(text(x, floor + 16, seconds_text(at), text_anchor="middle", class_="faint"))
    for number, lane in enumerate(lanes):
        y = top + high * number
        marks.append(
            tag("rect", x=left, y=y + 6, width=width - left - right, height=high - 12, class_="ground")
        )
        below = links.get(lane, "") if lane not in ("compute", "bubble") else ""
        marks.append(
            text(left - 10, y + (19 if below else 25), fitted(lane, left - 12) or lane[:8], text_anchor="end")
        )
        if below:
            marks.append(
                text(left - 10, y + 33, fitted(below, left - 12), text_anchor="end", class_="faint small")
            )
        marks += [_bar(bar, left, y, high, scale) for bar in drawn if bar.lane == lane]
    label = f"predicted step of {seconds_text(total)}: {', '.join(lanes)}"
    return svg(width, floor + 26, label, marks)


def _bar(bar: Bar, left: float, y: float, high: float, scale: float) -> str:
    x, width = left + bar.start * scale, max(1.0, (bar.end - bar.start) * scale)
    taken = seconds_text(bar.end - bar.start)
    detail = f"{bar.lane}: {bar.what}, {taken}" if bar.lane != bar.what else f"{bar.what}, {taken}"
    marks = [
        tag(
            "rect",
            tag("title", escape(detail)),
            x=x,
            y=y + 6,
            width=width,
            height=high - 12,
            class_=f"bar {bar.kind}",
            tabindex=-1,
            data_detail=detail,
        )
    ]
    short = bar.what.split(",")[0]
    words = next((w for w in (f"{short} {taken}", taken) if len(w) * LETTER < width - 10), "")
    if words:
        marks.append(text(x + 5, y + 25, words, class_="on"))
    return "".join(marks)
