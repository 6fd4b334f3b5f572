"""Pictures of a run: the loss curve as SVG, and one self-contained HTML page."""

from __future__ import annotations

import html
import itertools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.tree import bytes_text

Points = Sequence[tuple[float, float]]
MOST = 1000  # points of a drawn line; more than pixels only makes the file large
_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #555 } .title { font-size: 15px; fill: #222 }
  .grid { stroke: #8884; stroke-width: 1 } .axis { stroke: #888; stroke-width: 1 }
  .train { stroke: #4878d0; opacity: .45 } .smooth { stroke: #4878d0; stroke-width: 2 }
  .eval { stroke: #d65f5f; stroke-width: 2 } .dot { fill: #d65f5f } .lone { fill: #4878d0 }
  .level { stroke: #888; stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) { text { fill: #aaa } .title { fill: #eee } }
"""


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """The values as one line of block characters; those that are no number are left out."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return ""
    step = max(1.0, len(finite) / width)
    picked = [finite[int(i * step)] for i in range(min(width, len(finite)))]
    low, high = min(picked), max(picked)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in picked)


def loss_svg(
    train: Sequence[tuple[float, float | None]],
    evaluation: Sequence[tuple[float, float | None]] = (),
    *,
    levels: Mapping[str, float] | None = None,
    title: str = "loss",
) -> str:
    """A loss curve as an SVG document, readable on light and dark ground.

    Args:
        train, evaluation: (step, loss in nats); points without a number are left out. The training
            curve is drawn faint, with a running mean over it.
        levels: name -> a horizontal line.
    """
    width, height, left, right, top, bottom = 760, 400, 72, 20, 56, 46
    trained, evaluated = _finite(train), _finite(evaluation)
    levels = {k: v for k, v in (levels or {}).items() if math.isfinite(v)}
    points = [*trained, *evaluated] or [(0.0, 0.0), (1.0, 1.0)]
    x_max = max(max(x for x, _ in points), 1.0)
    values = [y for _, y in points] + list(levels.values())
    y_min, y_max = min(values), max(values)
    pad = (y_max - y_min or 1.0) * 0.06
    y_min, y_max = y_min - pad, y_max + pad

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / x_max * (width - left - right),
            top + (y_max - y) / (y_max - y_min) * (height - top - bottom),
        )

    def line(points: Points, kind: str) -> str:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        return f'<polyline class="{kind}" fill="none" points="{path}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{left}" y="22">{html.escape(_short(title))}</text>',
    ]
    for y in _ticks(y_min, y_max):
        _, py = place(0, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(0, x_max, least=1):
        px, _ = place(x, y_min)
        parts.append(
            f'<text x="{px:.1f}" y="{height - bottom + 18}" text-anchor="middle">{_step_text(x)}</text>'
        )
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">step</text>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">nats</text>'
    )
    floor = height - bottom
    parts.append(
        f'<polyline class="axis" fill="none" points="{left},{top} {left},{floor} {width - right},{floor}"/>'
    )
    free = float(height)  # above the label below, so that labels of near levels do not overlap
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        _, py = place(0, level)
        free = min(py - 5, free - 14)
        parts.append(f'<line class="level" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(
            f'<text x="{width - right}" y="{free:.1f}" text-anchor="end">'
            f"{html.escape(_short(name))} {_value_text(level)}</text>"
        )
    if not trained and not evaluated:
        parts.append(f'<text x="{width / 2}" y="{height / 2}" text-anchor="middle">no numbers yet</text>')
    if len(trained) == 1:  # a line through one point is nothing
        px, py = place(*trained[0])
        parts.append(f'<circle class="lone" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
    if trained:
        parts += [line(_thin(trained), "train"), line(_thin(_running_mean(trained)), "smooth")]
    if evaluated:
        evaluated = _thin(evaluated)
        parts.append(line(evaluated, "eval"))
        for x, y in evaluated:
            px, py = place(x, y)
            parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
    legend = [("smooth", f"training {_value_text(trained[-1][1])}")] if trained else []
    legend += [("eval", f"held out {_value_text(evaluated[-1][1])}")] if evaluated else []
    for index, (kind, name) in enumerate(legend):
        x = left + 150 * index
        parts.append(
            f'<line class="{kind}" x1="{x}" x2="{x + 22}" y1="39" y2="39"/><text x="{x + 28}" y="43">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thin(points: Points) -> list[tuple[float, float]]:
    """At most about `MOST` points, with the lowest and the highest of each stretch: no spike is lost."""
    size = -(-len(points) // (MOST // 2))
    if len(points) <= MOST:
        return list(points)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """Centred; towards both ends, where one side is missing, a straight line through what is there.

    A mean of the past would lag behind a falling loss, and a narrower one would end on one noisy value.
    """
    sums = list(itertools.accumulate((y for _, y in points), initial=0.0))
    moments = list(itertools.accumulate((i * y for i, (_, y) in enumerate(points)), initial=0.0))
    half = len(points) // 40
    result = []
    for index, (x, _) in enumerate(points):
        start, end = max(0, index - half), min(len(points), index + half + 1)
        count, middle = end - start, (start + end - 1) / 2
        total = sums[end] - sums[start]
        slope = (moments[end] - moments[start] - middle * total) / max(1, count * (count**2 - 1) / 12)
        result.append((x, total / count + slope * (index - middle)))
    return result


def _short(text: str, most: int = 70) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _value_text(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2e}"


def _step_text(step: float) -> str:
    """`600`, `20k`, `15M`: never wider than its place."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if step >= 10 * size:
            return f"{step / size:g}{unit}"
    return f"{step:g}"


def _ticks(low: float, high: float, count: int = 6, least: float = 0.0) -> list[float]:
    rough = max((high - low) / count, least) or 1.0
    size = 10 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 5, 10) if rough <= m * size)
    first = math.ceil(low / size)
    return [round(i * size, 10) for i in range(first, math.floor(high / size) + 1)]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    curve: str,
    facts: Mapping[str, Any],
    memory: Mapping[str, int] | None = None,
    layout: str = "",
    collectives: str = "",
    sample: str = "",
) -> pathlib.Path:
    """One HTML page without any reference to the network.

    Args:
        curve: an SVG of ours. facts: a table. memory: name -> bytes per device, as bars.
        layout, collectives, sample: plain text, escaped here.
    """
    rows = "".join(f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in facts.items())
    bars = ""
    if memory:
        most = max(memory.values()) or 1
        bars = "<h2>Memory per device</h2><table>" + "".join(
            f"<tr><th>{html.escape(name)}<td>{bytes_text(size)}"
            f'<td class="bar"><div style="width:{100 * size / most:.1f}%"></div>'
            for name, size in memory.items()
        )
        bars += "</table>"
    blocks = "".join(
        f"<h2>{name}</h2><pre{' class="text"' if name == 'Sample' else ''}>{html.escape(text)}</pre>"
        for name, text in (("Sample", sample), ("Layout", layout), ("Collectives", collectives))
        if text
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; padding: 1rem; background: #8881; border-radius: 6px; font-size: 13px }}
th {{ text-align: left; font-weight: 500; padding-right: 1.5rem; vertical-align: top }}
td {{ padding-right: 1rem; font-variant-numeric: tabular-nums }} td:has(+ .bar) {{ text-align: right; white-space: nowrap }}
.bar {{ width: 24rem }}
.text {{ white-space: pre-wrap }}
.bar div {{ background: #4878d0; height: .8rem; border-radius: 3px; min-width: 2px }} svg {{ width: 100%; height: auto }}
</style><h1>{html.escape(title)}</h1>{curve}<table>{rows}</table>{bars}{blocks}</html>
"""
    file = pathlib.Path(path)
    file.write_text(page, encoding="utf-8")
    return file
