"""One collective, and all of a program."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardtrain.tree import bytes_text, table

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    `axes`: mesh axes along which the members of a group differ; `partial`: groups cover only a part of them.
    `count`: runs a step on one device, loops multiplied; in a branch that only some take, on the mean of the devices.
    `bytes`: payload of one run: what is reduced, the gathered
    result, what is scattered or exchanged, what one device of a permute sends. `wire_bytes`: sent per device and
    step, all runs together: all-reduce 2f*X, all-gather, reduce-scatter and all-to-all f*X, permute X for the share
    of devices that send, with f = (n-1)/n and n = `group`. `asynchronous`: something may run meanwhile.
    `op_name`: the JAX operation; `source`: `file.py:123` of the user. `loops`: trip counts around it. `dcn`: between
    slices. `name`, `computation`: where it stands.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    shape: str
    count: int | float
    bytes: float
    wire_bytes: float
    asynchronous: bool
    source: str
    group: int
    op_name: str = ""
    partial: bool = False
    loops: tuple[int, ...] = ()
    dcn: bool = False
    name: str = ""
    computation: str = ""

    @property
    def axis(self) -> str:
        """`data+fsdp`."""
        return "+".join(self.axes) or "-"


class Collectives(list[Collective]):
    """All collectives of a program."""

    def by_axis(self) -> dict[tuple[str, str], tuple[int | float, float]]:
        """(op, axis) -> (count, wire bytes) per step."""
        totals: dict[tuple[str, str], tuple[int | float, float]] = {}
        for c in self:
            count, wire = totals.get((c.op, c.axis), (0, 0.0))
            totals[c.op, c.axis] = (count + c.count, wire + c.wire_bytes)
        return totals

    @property
    def wire_bytes(self) -> float:
        """Per device and step."""
        return sum(c.wire_bytes for c in self)

    def as_json(self) -> list[dict[str, Any]]:
        """One object per instruction, keys as in `shardtrain plan --json`."""
        return [
            {
                "op": c.op,
                "axis": c.axis,
                "dtype": c.dtype,
                "shape": c.shape,
                "count": c.count,
                "bytes": c.bytes,
                "wire_bytes": c.wire_bytes,
                "async": c.asynchronous,
                "source": c.source,
                "op_name": c.op_name,
                "loops": list(c.loops),
                "dcn": c.dcn,
                "partial": c.partial,
            }
            for c in self
        ]

    def __str__(self) -> str:
        if not self:
            return "no collectives"
        rows = [(op, axis, n, bytes_text(wire)) for (op, axis), (n, wire) in sorted(self.by_axis().items())]
        return table(("collective", "axis", "per step", "sent per device"), rows)
