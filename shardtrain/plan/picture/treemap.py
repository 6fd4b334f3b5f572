"""The memory bill of one device as areas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardtrain.plan.picture.marks import BOLD, both, escape, fitted, svg, tag, text
from shardtrain.tree import bytes_text

STEP = "made during the step"
PARTS = ("parameters", "optimizer", "other", "batch", STEP)
Box = tuple[float, float, float, float]  # x, y, width, height


def parts(memory: Mapping[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Part of the peak -> its pieces, largest first; all together they are the peak.

    What is made during a step is what the peak has over the arguments: of that the largest tensors on paper, as far as
    they are there at all (a compiler may need less), and the rest.
    """
    held: Mapping[str, Mapping[str, float]] = memory.get("held") or {}
    found: dict[str, list[tuple[str, float]]] = {}
    for part in ("parameters", "optimizer", "other", "batch"):
        whole = float(memory.get(part) or 0.0)
        pieces = list(held.get(part, {}).items()) or [(part, whole)]
        found[part] = sorted(pieces, key=lambda piece: -piece[1])
    rest = max(0.0, float(memory["peak"]) - float(memory["arguments"]))
    pieces = []
    for what, size in memory.get("largest") or []:
        if size <= rest:
            pieces.append((str(what), float(size)))
            rest -= size
    found[STEP] = [*pieces, ("smaller ones" if pieces else STEP, rest)]
    return {part: [(n, s) for n, s in found[part] if s > 0] for part in PARTS}


def squarified(sizes: Sequence[float], box: Box) -> Iterator[Box]:
    """Boxes of these areas, largest first, as square as they can be. Bruls, Huizing, van Wijk (2000)."""
    x, y, width, height = box
    left = sum(sizes)
    start = 0
    while start < len(sizes) and left > 0 and width > 0 and height > 0:
        side, scale = min(width, height), width * height / left
        worst, end, row = float("inf"), start, 0.0
        while end < len(sizes):
            more = row + sizes[end]
            depth = more * scale / side
            ratio = max(
                max(depth * depth / (s * scale), s * scale / (depth * depth)) for s in sizes[start : end + 1]
            )
            if ratio > worst:
                break
            worst, row, end = ratio, more, end + 1
        depth, at = row * scale / side, 0.0
        for size in sizes[start:end]:
            length = side * size / row
            yield (x, y + at, depth, length) if width >= height else (x + at, y, length, depth)
            at += length
        if width >= height:
            x, width = x + depth, width - depth
        else:
            y, height = y + depth, height - depth
        left, start = left - row, end


def treemap(memory: Mapping[str, Any]) -> str:
    """The peak as areas: by part, then by parameter or tensor. Above it, the peak against what is usable."""
    return both(lambda width: _drawn(memory, width))


def _drawn(memory: Mapping[str, Any], width: float) -> str:
    peak, usable = float(memory["peak"]), memory.get("usable")
    top, high = 34.0, 330.0 if width > 600 else 420.0
    marks = _against(peak, usable, width)
    found = {part: pieces for part, pieces in parts(memory).items() if pieces}
    order = sorted(found, key=lambda part: -sum(s for _, s in found[part]))
    totals = [sum(s for _, s in found[part]) for part in order]
    for part, total, box in zip(order, totals, squarified(totals, (0, top, width, high)), strict=False):
        marks.append(_part(part, total, peak, found[part], box))
    return svg(width, top + high, f"memory of one device, {bytes_text(peak)} at the peak", marks)


def _part(part: str, total: float, peak: float, pieces: Sequence[tuple[str, float]], box: Box) -> str:
    x, y, width, height = box
    kind = part.split(" ", maxsplit=1)[0]
    title = f"{part}: {bytes_text(total)}, {total / peak:.1%} of the peak"
    name = fitted(f"{part} {bytes_text(total)}", width - 12, BOLD) if height > 24 else ""
    room = 20.0 if name else 2.0
    drawn = [tag("rect", x=x, y=y, width=width, height=height, class_=f"part {kind}", data_detail=title)]
    if name:
        drawn.append(text(x + 6, y + 14, name, class_="on strong"))
    inner = (x + 2, y + room, max(0.0, width - 4), max(0.0, height - room - 2))
    for (what, size), (a, b, w, h) in zip(pieces, squarified([s for _, s in pieces], inner), strict=False):
        if w < 1 or h < 1:
            continue
        detail = f"{part}: {what}, {bytes_text(size)}, {size / peak:.1%} of the peak"
        drawn.append(
            tag(
                "rect",
                tag("title", escape(detail)),
                x=a,
                y=b,
                width=w,
                height=h,
                class_=f"piece {kind}",
                tabindex=-1,
                data_detail=detail,
            )
        )
        whole = fitted(what, w - 10) == what
        words = what if whole else fitted(what.rsplit("/", maxsplit=1)[-1], w - 10)
        words = words if h > 18 and len(pieces) > 1 else ""
        if words:
            drawn.append(text(a + 5, b + 14, words, class_="on"))
            if h > 34 and fitted(bytes_text(size), w - 10) == bytes_text(size):
                drawn.append(text(a + 5, b + 29, bytes_text(size), class_="on faint"))
    return tag("g", "".join(drawn))


def _against(peak: float, usable: float | None, width: float) -> list[str]:
    """A bar: the peak, and the line that it must not cross."""
    most = max(peak, usable or 0.0)
    drawn = [
        tag("rect", x=0.0, y=20.0, width=width, height=6.0, class_="ground"),
        tag(
            "rect",
            x=0.0,
            y=20.0,
            width=width * peak / most,
            height=6.0,
            class_="over" if usable is not None and peak > usable else "filled",
        ),
    ]
    words = f"peak {bytes_text(peak)}"
    if usable is not None:
        rest = usable - peak
        words += f" of {bytes_text(usable)} usable, " + (
            f"{bytes_text(rest)} free" if rest >= 0 else f"{bytes_text(-rest)} too much"
        )
        at = width * usable / most
        drawn.append(tag("line", x1=at - 1, x2=at - 1, y1=16.0, y2=30.0, class_="limit"))
    return [text(0, 12, fitted(words, width)), *drawn]
