"""Bytes by axis as bars: for a terminal, and as a picture."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from shardtrain.tree import bytes_text


@dataclasses.dataclass(frozen=True)
class Bar:
    """`least`: None where nobody knows. `over`: sent is more than it must be, `why`: by whom."""

    name: str
    sent: float
    least: float | None
    over: bool
    why: str = ""

    @property
    def times(self) -> str:
        """`1.86 x the least`, or ""."""
        return f"{self.sent / self.least:.2f} x the least" if self.least else ""


def _most(rows: Sequence[Bar]) -> float:
    return max((max(bar.sent, bar.least or 0.0) for bar in rows), default=0.0)


def bars(rows: Sequence[Bar], width: int = 48) -> str:
    """Two lines an axis: what is sent, and the least."""
    most = _most(rows)
    if not most:
        return ""
    name = max(len(bar.name) for bar in rows)

    def line(label: str, value: float, mark: str, text: str) -> str:
        return f"{label.ljust(name)}  {mark * round(width * value / most) or '·'} {bytes_text(value)} {text}".rstrip()

    lines = []
    for bar in rows:
        lines.append(line(bar.name, bar.sent, "█", f"sent, {bar.times}" if bar.over else "sent"))
        if bar.least is not None:
            lines.append(line("", bar.least, "░", "least"))
    return "\n".join(lines)


def picture(rows: Sequence[Bar], title: str, below: str) -> str:
    """The same as SVG. An axis that sends too much is orange, and says by whom."""
    most, left, width, y = _most(rows) or 1.0, 120, 480, 52
    drawn = []
    for bar in rows:
        color = "#c2410c" if bar.over else "#2563eb"
        drawn.append(f'<text x="{left - 12}" y="{y + 18}" text-anchor="end">{html.escape(bar.name)}</text>')
        drawn += _rectangle(left, y, width * bar.sent / most, color, bytes_text(bar.sent))
        if bar.least is not None:
            times = f" least; {bar.times} is sent" if bar.over and bar.times else " least"
            drawn += _rectangle(
                left, y + 16, width * bar.least / most, "#94a3b8", bytes_text(bar.least) + times
            )
        if bar.why:
            drawn.append(
                f'<text x="{left}" y="{y + 44}" font-size="11" fill="#c2410c">{html.escape(bar.why)}</text>'
            )
        y += 62 if bar.why else 46
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 240}" height="{y + 24}" '
        'font-family="system-ui, sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="14" y="26" font-size="15" font-weight="600">{html.escape(title)}</text>'
        f'{"".join(drawn)}<text x="14" y="{y + 10}" fill="#475569">{html.escape(below)}</text></svg>'
    )


def _rectangle(x: float, y: float, length: float, color: str, text: str) -> list[str]:
    length = max(1.0, length)
    return [
        f'<rect x="{x}" y="{y}" width="{length:.1f}" height="13" fill="{color}" rx="2"/>',
        f'<text x="{x + length + 8:.1f}" y="{y + 11}" font-size="11" fill="#475569">{html.escape(text)}</text>',
    ]
