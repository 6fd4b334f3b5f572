"""What a compiled step sends, against the least that its layout has to send, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardtrain.errors import ConfigError, suggestion
from shardtrain.plan.findings import SEVERITIES, Finding, findings
from shardtrain.plan.hlo import Collectives
from shardtrain.plan.minimum import Minimum, minimum
from shardtrain.tree import bytes_text

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled, Memory


@dataclasses.dataclass(frozen=True)
class Audit:
    """`bytes`: sent per device and step; `ratio`: to the minimum; `async_share`: of the bytes, those of collectives
    under which something else may run. Print it, or `as_json()`, or look at `svg()`."""

    target: str
    mesh: Mapping[str, int]
    collectives: Collectives
    minimum: Minimum
    findings: Sequence[Finding]
    memory: Memory
    source: str
    flops: float
    lines: int

    @property
    def bytes(self) -> float:
        return self.collectives.wire_bytes

    @property
    def ratio(self) -> float | None:
        """None where nothing has to be sent."""
        return self.bytes / self.minimum.bytes if self.minimum.bytes else None

    @property
    def async_share(self) -> float | None:
        """None where nothing is sent."""
        hidden = sum(c.wire_bytes for c in self.collectives if c.asynchronous)
        return hidden / self.bytes if self.bytes else None

    def by_axis(self) -> dict[str, tuple[float, float]]:
        """Axis -> (bytes sent, minimum)."""
        least, sent = self.minimum.by_axis(), dict[str, float]()
        for c in self.collectives:
            sent[c.axis] = sent.get(c.axis, 0.0) + c.wire_bytes
        return {axis: (sent.get(axis, 0.0), least.get(axis, 0.0)) for axis in sorted({*sent, *least})}

    def worst(self, severity: str) -> list[Finding]:
        """Findings of at least this severity.

        Raises:
            ConfigError: no such severity.
        """
        if severity not in SEVERITIES:
            raise ConfigError(
                f"'{severity}'", where="severity", fix=suggestion(severity, SEVERITIES, "warning")
            )
        least = SEVERITIES.index(severity)  # type: ignore[arg-type]
        return [f for f in self.findings if SEVERITIES.index(f.severity) >= least]

    def as_json(self) -> dict[str, Any]:
        """See the README for the keys."""
        return {
            "target": self.target,
            "mesh": dict(self.mesh),
            "bytes": self.bytes,
            "minimum": self.minimum.bytes,
            "ratio": self.ratio,
            "async_share": self.async_share,
            "by_axis": {a: {"bytes": sent, "minimum": least} for a, (sent, least) in self.by_axis().items()},
            "collectives": self.collectives.as_json(),
            "derivation": self.minimum.as_json(),
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "memory": dict(self.memory),
            "flops": self.flops,
            "program_lines": self.lines,
            "source": self.source,
        }

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.3f} of the minimum"
        share = "" if self.async_share is None else f", {self.async_share:.0%} of it asynchronous"
        parts = [
            f"{self.target}, mesh {' '.join(f'{a}={n}' for a, n in self.mesh.items())}",
            str(self.collectives),
            str(self.minimum),
            bars(self.by_axis()),
            f"sent per device and step: {bytes_text(self.bytes)}{ratio}{share}",
            str(self.memory),
            "\n".join(map(str, self.findings)) or "no findings",
            self.source,
        ]
        return "\n\n".join(part for part in parts if part)

    def svg(self) -> str:
        """Bytes by axis, sent and least, as a picture."""
        return picture(self.by_axis(), f"{self.target}: bytes sent per device and step")

    def _repr_html_(self) -> str:
        return f"{self.svg()}<pre>{html.escape(str(self))}</pre>"


def audit(step: Compiled) -> Audit:
    """Read a compiled step: every collective against the minimum of its layout, memory, findings.

    Args:
        step: `plan.compile()` or `plan.compile(target=...)`. Warnings of the partitioner are captured for targets
            only (`plan.compile(target="cpu:8")` is one).
    """
    return Audit(
        target=str(step.target or f"{step.platform}:{step.plan.mesh.size}"),
        mesh=dict(step.plan.mesh.shape),
        collectives=step.collectives(),
        minimum=minimum(step.plan),
        findings=tuple(findings(step)),
        memory=step.memory(),
        source=step.source,
        flops=step.program().flops,
        lines=step.program().lines,
    )


def bars(by_axis: Mapping[str, tuple[float, float]], width: int = 48) -> str:
    """Sent and least bytes of each axis, as bars for a terminal."""
    most = max((max(pair) for pair in by_axis.values()), default=0.0)
    if not most:
        return ""
    name = max(map(len, by_axis))
    lines = []
    for axis, (sent, least) in by_axis.items():
        for label, value, mark in ((axis, sent, "█"), ("", least, "░")):
            bar = mark * round(width * value / most)
            lines.append(
                f"{label.ljust(name)}  {bar or '·'} {bytes_text(value)}{' least' if mark == '░' else ''}"
            )
    return "\n".join(lines)


def picture(by_axis: Mapping[str, tuple[float, float]], title: str) -> str:
    """Two bars an axis: what is sent, and the least."""
    most = max((max(pair) for pair in by_axis.values()), default=0.0) or 1.0
    height, left, width = 46 * len(by_axis) + 58, 130, 460
    rows = []
    for row, (axis, (sent, least)) in enumerate(by_axis.items()):
        y = 46 + 46 * row
        over = least > 0 and sent > 1.05 * least
        rows.append(f'<text x="{left - 10}" y="{y + 18}" text-anchor="end">{html.escape(axis)}</text>')
        for offset, value, color in ((0, sent, "#c2410c" if over else "#2563eb"), (16, least, "#94a3b8")):
            length = max(1.0, width * value / most)
            rows.append(
                f'<rect x="{left}" y="{y + offset}" width="{length:.1f}" height="13" fill="{color}" rx="2"/>'
            )
            rows.append(
                f'<text x="{left + length + 8:.1f}" y="{y + offset + 11}" class="v">{bytes_text(value)}</text>'
            )
    legend = "blue: sent, orange: sent and more than 5% over, grey: the least that the layout has to send"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" style="background:#fff">'
        "<style>.v{font-size:11px;fill:#475569}</style>"
        f'<text x="12" y="24" font-size="15" font-weight="600">{html.escape(title)}</text>'
        f'{"".join(rows)}<text x="12" y="{height - 10}" class="v">{legend}</text></svg>'
    )
