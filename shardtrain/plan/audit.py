"""What a compiled step sends, against the least that its layout has to send, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardtrain.errors import ConfigError, suggestion
from shardtrain.plan.bars import Bar, bars, picture
from shardtrain.plan.findings import SEVERITIES, Finding, Severity, findings
from shardtrain.plan.hlo import Collective, Collectives
from shardtrain.plan.minimum import Minimum, minimum
from shardtrain.tree import bytes_text, table

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled, Memory

OVER = 1.05  # times the least; more than this is shown as too much
SHOWN = 4  # senders named for an axis that sends too much


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` read. Print it, look at `svg()`, or take `as_json()`.

    `minimum`: None for a function that is not the plan's own step (`plan.jit`): nobody knows what it must send.
    `bytes`: sent per device and step. `ratio`: to the minimum. `async_share`: of the bytes, those of collectives under
    which something else may run. `flops`, `lines`: of the program. `source`: whose compiler made it.
    """

    target: str
    mesh: Mapping[str, int]
    collectives: Collectives
    minimum: Minimum | None
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
        """None where nothing has to be sent, or nobody knows what has to."""
        return self.bytes / self.minimum.bytes if self.minimum and self.minimum.bytes else None

    @property
    def async_share(self) -> float | None:
        """None where nothing is sent."""
        hidden = sum(c.wire_bytes for c in self.collectives if c.asynchronous)
        return hidden / self.bytes if self.bytes else None

    def by_axis(self) -> dict[str, tuple[float, float | None]]:
        """Axis -> (bytes sent, minimum or None), in mesh order."""
        least = self.minimum.by_axis() if self.minimum is not None else None
        sent: dict[str, float] = defaultdict(float)
        for c in self.collectives:
            if c.axes:
                sent[c.axis] += c.wire_bytes
        order = list(self.mesh)
        axes = sorted({*sent, *(least or ())}, key=lambda axis: [order.index(a) for a in axis.split("+")])
        return {a: (sent[a], None if least is None else least.get(a, 0.0)) for a in axes}

    def over(self) -> dict[str, float]:
        """Axis -> bytes more than it must send, for those that send more than 5% over (and 1% of all) too much."""
        return {
            axis: sent - least
            for axis, (sent, least) in self.by_axis().items()
            if least is not None and sent > OVER * least and sent - least > 0.01 * self.bytes
        }

    def senders(self, axis: str) -> list[Sender]:
        """Who sends along an axis, most bytes first."""
        lines: dict[tuple[str, str], list[Collective]] = defaultdict(list)
        for c in self.collectives:
            if c.axis == axis:
                lines[c.op, c.source].append(c)
        kinds: dict[str, list[str]] = defaultdict(list)
        for finding in self.findings:
            if axis in finding.path:
                kinds[finding.source].append(finding.kind)
        found = [
            Sender(
                op,
                source,
                max(together, key=lambda c: c.wire_bytes).shape,
                sum(c.count for c in together),
                sum(c.wire_bytes for c in together),
                tuple(dict.fromkeys(kinds[source])),
            )
            for (op, source), together in lines.items()
        ]
        return sorted(found, key=lambda s: -s.bytes)

    def worst(self, severity: str) -> list[Finding]:
        """Findings of at least this severity.

        Raises:
            ConfigError: no such severity.
        """
        least = SEVERITIES.index(check_severity(severity))
        return [f for f in self.findings if SEVERITIES.index(f.severity) >= least]

    def as_json(self) -> dict[str, Any]:
        """See the README for the keys."""
        return {
            "target": self.target,
            "mesh": dict(self.mesh),
            "bytes": self.bytes,
            "minimum": None if self.minimum is None else self.minimum.bytes,
            "ratio": self.ratio,
            "async_share": self.async_share,
            "by_axis": {a: {"bytes": sent, "minimum": least} for a, (sent, least) in self.by_axis().items()},
            "collectives": self.collectives.as_json(),
            "derivation": None if self.minimum is None else self.minimum.as_json(),
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "memory": dict(self.memory),
            "flops": self.flops,
            "program_lines": self.lines,
            "source": self.source,
        }

    def __str__(self) -> str:
        parts = [
            f"{self.target}, mesh {' '.join(f'{a}={n}' for a, n in self.mesh.items())}: {self.source}",
            str(self.memory),
            "" if self.minimum is None else str(self.minimum),
            self._table(),
            bars(self._bars()),
            *(self._why(axis, more) for axis, more in self.over().items()),
            "\n".join(map(str, self.findings)) or "no findings",
            self.summary(),
        ]
        return "\n\n".join(part for part in parts if part)

    def summary(self) -> str:
        """One line: bytes, ratio, asynchrony."""
        ratio = "" if self.ratio is None else f", {self.ratio:.3f} of the minimum"
        share = "" if self.async_share is None else f", {self.async_share:.0%} of it asynchronous"
        return f"sent per device and step: {bytes_text(self.bytes)}{ratio}{share}"

    def _table(self) -> str:
        """Each collective by axis, beside what it must send."""
        sent = {
            (axis, op): values for (op, axis), values in self.collectives.by_axis().items() if axis != "-"
        }
        least: dict[tuple[str, str], float] = defaultdict(float)
        for term in self.minimum or ():
            least[term.axis, term.op] += term.bytes
        known, order, over = self.minimum is not None, list(self.by_axis()), self.over()
        rows = []
        for axis, op in sorted({*sent, *least}, key=lambda key: (order.index(key[0]), key[1])):
            count, wire = sent.get((axis, op), (0, 0.0))
            must = least.get((axis, op), 0.0)
            extra = wire - must
            mark = f"+{bytes_text(extra)}" if axis in over and extra > 0.01 * self.bytes else ""
            rows.append((axis, op, f"{count:g}", bytes_text(wire), bytes_text(must) if known else "?", mark))
        return (
            table(("axis", "collective", "runs", "sent", "least", "too much"), rows)
            if rows
            else "nothing is sent"
        )

    def _why(self, axis: str, more: float) -> str:
        lines = [f"{axis} sends {bytes_text(more)} more than it must; what it sends:"]
        lines += [f"  {sender}" for sender in self.senders(axis)[:SHOWN]]
        return "\n".join(lines)

    def _bars(self) -> list[Bar]:
        over = self.over()
        return [
            Bar(axis, sent, least, axis in over, str(self.senders(axis)[0]) if axis in over else "")
            for axis, (sent, least) in self.by_axis().items()
        ]

    def svg(self) -> str:
        """Bytes by axis, sent and least, as a picture."""
        return picture(self._bars(), f"{self.target}: bytes sent per device and step", self.summary())

    def _repr_html_(self) -> str:
        return f"{self.svg()}<pre>{html.escape(str(self))}</pre>"


@dataclasses.dataclass(frozen=True)
class Sender:
    """What one line of the user sends along an axis; `kinds`: of findings about it."""

    op: str
    source: str
    shape: str
    runs: int | float
    bytes: float
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        shape = self.shape if len(self.shape) < 60 else f"{self.shape[:57]}..."
        return f"{bytes_text(self.bytes)}  {self.op} {shape}, {self.runs:g} x  {self.source}  {' '.join(self.kinds)}".rstrip()


def check_severity(severity: str) -> Severity:
    """Raises ConfigError where there is no such severity."""
    for known in SEVERITIES:
        if severity == known:
            return known
    raise ConfigError(f"'{severity}'", where="severity", fix=suggestion(severity, SEVERITIES, "warning"))


def audit(step: Compiled) -> Audit:
    """Read a compiled step: every collective against the minimum of its layout, memory, findings.

    Args:
        step: `plan.compile()`, `plan.compile(target=...)`, or a function of one's own, `plan.jit(...)`, of which no
            minimum is known. Warnings of the partitioner are captured for targets only (`target="cpu:8"` is one).

    Returns:
        See `Audit`. The bytes are counted in the compiled program, for one device and step.

    Raises:
        HloError: the program says something that the reader does not understand.

    Held to it by tests/unit/plan/test_findings.py, which plants each fault, and by counts by hand in test_hlo_programs.py.
    """
    program = step.program()
    return Audit(
        target=str(step.target or f"{step.platform}:{step.plan.mesh.size}"),
        mesh=dict(step.plan.mesh.shape),
        collectives=program.collectives,
        minimum=minimum(step.plan) if step.trains else None,
        findings=tuple(findings(step)),
        memory=step.memory(),
        source=step.source,
        flops=program.flops,
        lines=program.lines,
    )
