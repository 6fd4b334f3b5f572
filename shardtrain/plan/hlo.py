"""The HLO reader: collectives of an optimized program.

Reads the text of CPU programs today. Ids in replica groups are positions in `mesh.devices.flat`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from shardtrain.tree import bytes_text, table

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$|^(ENTRY )?%?([\w.\-]+) .*-> .*\{$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    `axes`: mesh axes it runs over. `count`: times a step, loops multiplied. `bytes`: payload of one
    run on one device (result; for reduce-scatter the operand). `wire_bytes`: sent per device and
    step by a ring, all runs together: all-reduce 2f*X, all-gather, reduce-scatter and all-to-all f*X.
    `source`: the name of the JAX operation it came from.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    shape: str
    count: int
    bytes: float
    wire_bytes: float
    asynchronous: bool
    source: str
    group: int

    @property
    def axis(self) -> str:
        """`data+fsdp`."""
        return "+".join(self.axes) or "-"


class Collectives(list[Collective]):
    """All collectives of a program."""

    def by_axis(self) -> dict[tuple[str, str], tuple[int, float]]:
        """(op, axis) -> (count, wire bytes) per step."""
        totals: dict[tuple[str, str], tuple[int, float]] = {}
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
                "count": c.count,
                "bytes": c.bytes,
                "wire_bytes": c.wire_bytes,
                "async": c.asynchronous,
                "source": c.source,
            }
            for c in self
        ]

    def __str__(self) -> str:
        if not self:
            return "no collectives"
        rows = [(op, axis, n, bytes_text(wire)) for (op, axis), (n, wire) in sorted(self.by_axis().items())]
        return table(("collective", "axis", "per step", "sent per device"), rows)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    op: str
    rest: str


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                is_entry = line.startswith("ENTRY ")
                current = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                computations[current] = []
                entry = current if is_entry else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            result, rest = _split(match.group(2))
            op = re.match(r"[\w\-]+", rest)
            computations[current].append(_Instruction(match.group(1), result, op.group() if op else "", rest))
    assert entry, "no ENTRY computation in the HLO text"
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """`(f32[2], f32[3]) all-reduce(...)` -> result type, the rest."""
    depth = 0
    for index, char in enumerate(text):
        depth += char in "({["
        depth -= char in ")}]"
        if char == " " and depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _calls(instruction: _Instruction) -> list[str]:
    found = re.findall(
        r"\b(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest
    )
    for group in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        found += [name.strip().lstrip("%") for name in group.split(",")]
    return found


def _trips(instruction: _Instruction) -> int:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
    if match is None:
        raise ValueError(f"loop {instruction.name} has no known trip count")
    return int(match.group(1))


def _payload(result: str) -> tuple[float, str, str]:
    """Bytes, dtype and shape of a result type, tuples added up."""
    shapes = _SHAPE.findall(result)
    total = 0.0
    for dtype, dims in shapes:
        bits = _BITS.get(dtype) or int(re.sub(r"e\d+m\d+\w*$", "", dtype.lstrip("sufc")))
        total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    names = sorted({d for d, _ in shapes})
    return total, "/".join(names), " ".join(f"{d}[{s}]" for d, s in shapes)


def replica_groups(rest: str, mesh: Mesh) -> list[list[int]]:
    """Groups of positions in the mesh, from any of the spellings of XLA."""
    everyone = [list(range(mesh.size))]
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", match.group(1))]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=[^{]*)? ?\{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        chosen = re.findall(r"'([^']+)'", match.group(2))
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        axes = [list(sizes).index(name) for name in chosen]
        others = [i for i in range(len(sizes)) if i not in axes]
        return (
            ids.transpose(others + axes)
            .reshape(-1, math.prod(list(sizes.values())[i] for i in axes))
            .tolist()
        )
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = ([int(x) for x in match.group(i).split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match.group(3):
            ids = ids.transpose([int(x) for x in match.group(3).split(",")])
        return ids.reshape(shape).tolist()
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest):
        found = [[int(x) for x in g.split(",") if x] for g in re.findall(r"\{([\d,]*)\}", match.group(1))]
        return found or everyone
    return everyone


def mesh_axes(groups: Iterable[Iterable[int]], mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    shape = tuple(mesh.shape.values())
    varying = set()
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.array(list(group)), shape))
        varying |= {i for i in range(len(shape)) if (coordinates[i] != coordinates[i][0]).any()}
    return tuple(name for i, name in enumerate(mesh.shape) if i in varying)


def collectives(text: str, mesh: Mesh) -> Collectives:
    """Every collective of an optimized program, with loops multiplied.

    Raises:
        ValueError: a loop without a known trip count that holds a collective, or collectives in the
            text that were not parsed or not reached from the entry.
    """
    computations, entry = _parse(text)
    times: collections.Counter[str] = collections.Counter()
    holds = {name for name, body in computations.items() if any(_kind(i) for i in body)}
    grew = True
    while grew:
        outer = {n for n, body in computations.items() if any(c in holds for i in body for c in _calls(i))}
        grew = not outer <= holds
        holds |= outer

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for instruction in computations[name]:
            inner = [c for c in _calls(instruction) if c in holds]
            if inner:
                trips = _trips(instruction) if instruction.op == "while" else 1
                for callee in inner:
                    visit(callee, factor * trips)

    visit(entry, 1)
    found = Collectives()
    for name, body in computations.items():
        for instruction in body:
            kind = _kind(instruction)
            if kind:
                if not times[name]:
                    raise ValueError(f"collective {instruction.name} in {name} is not reached from the entry")
                found.append(_collective(kind, instruction, times[name], mesh))
    written = len(
        re.findall(rf"^\s+(?:ROOT )?%?[\w.\-]+ = .*? (?:{'|'.join(KINDS)})(?:-start)?\(", text, re.M)
    )
    if written != len(found):
        raise ValueError(f"{written} collectives in the text, {len(found)} parsed")
    return found


def _kind(instruction: _Instruction) -> str:
    kind = instruction.op.removesuffix("-start")
    return kind if kind in KINDS else ""


def _collective(kind: str, instruction: _Instruction, count: int, mesh: Mesh) -> Collective:
    payload, dtype, shape = _payload(instruction.result)
    started = instruction.op.endswith("-start")
    groups = replica_groups(instruction.rest, mesh)
    size = mesh.size if not groups else len(groups[0])
    if started and kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all"):
        halves = {"all-gather": size / (size + 1), "reduce-scatter": 1 / (size + 1)}
        payload *= halves.get(kind, 0.5)  # the result of a start is (operand, result)
    if kind == "reduce-scatter":
        payload *= size
    part = (size - 1) / size
    wire = {"all-reduce": 2 * part, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(
        kind, part
    ) * payload
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(
        kind,
        mesh_axes(groups, mesh),
        dtype,
        shape,
        count,
        payload,
        wire * count,
        started,
        source.group(1) if source else "",
        size,
    )
