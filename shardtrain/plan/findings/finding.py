"""One finding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from shardtrain.plan import hlo

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
LARGE = 64 * 1024  # bytes of one run; smaller collectives are latency, not bytes


@dataclasses.dataclass(frozen=True)
class Finding:
    """`path`: a leaf or a collective; `source`: `file.py:123` of the user; `fix`: the way out."""

    kind: str
    severity: Severity
    path: str
    source: str
    message: str
    fix: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.source, self.path) if part)
        return f"{self.severity}: {self.kind}: {where}: {self.message}\n  try: {self.fix}"


def large(step: Compiled) -> list[hlo.Collective]:
    """Collectives whose bytes count."""
    return [c for c in step.collectives() if c.bytes >= LARGE and c.axes]
