"""A program, walked from its entry: how often everything runs, what is sent, what is computed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardtrain.plan.hlo.collectives import KINDS, Collectives
from shardtrain.plan.hlo.flops import product_flops
from shardtrain.plan.hlo.sent import sent
from shardtrain.plan.hlo.text import Frame, HloError, Instruction, Module, parse
from shardtrain.plan.hlo.walk import MEGASCALE, Walk, called, kind_of, number

_REMAT = re.compile(r"\.remat\d*")


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read.

    `flops`: of products, per device and step (see `hlo.flops` for what no text shows); `recomputed`: those of them that the
    compiler added, since memory was short, by running products again; `resent`: wire bytes that it sends again for the same
    reason, per device and step. `computations`: name -> instructions. `times`: runs of
    each a step, 0 if never. `loops`: trip counts around each, outermost first. `aliases`: numbers of the entry's parameters
    that are written in place. `lines`: instructions, the program's size. `frames`: the program's stack frames by number,
    innermost first.
    """

    collectives: Collectives
    flops: float
    recomputed: float
    resent: float
    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    times: Mapping[str, int | float]
    loops: Mapping[str, tuple[int, ...]]
    aliases: frozenset[int]
    lines: int
    frames: Mapping[int, tuple[Frame, ...]]


def read(text: str, mesh: Any) -> Program:
    """Read the optimized text of a program.

    Args:
        mesh: a `Mesh`, an `AbstractMesh`, or axis name -> size in mesh order.

    Raises:
        HloError: a loop that sends or computes and runs an unknown number of times; a collective in the text that
            was not parsed or is never reached; a collective or replica groups of an unknown kind.
    """
    sizes = dict(getattr(mesh, "shape", mesh))
    module = parse(text)
    walk = Walk(module)
    walk.visit(module.entry, 1, (), False, ())
    found = sent(module, walk, sizes)
    _check(text, module, walk)
    flops = sum(
        number(walk.times[name]) * product_flops(i, walk.bodies[name])
        for name, body in module.computations.items()
        if walk.times[name]
        for i in body
    )
    return Program(
        collectives=found,
        flops=flops,
        recomputed=_recomputed(module, walk),
        resent=_resent(found),
        computations=module.computations,
        entry=module.entry,
        times={name: number(walk.times[name]) for name in module.computations},
        loops=walk.loops,
        aliases=_aliases(module.header),
        lines=sum(map(len, module.computations.values())),
        frames=module.frames,
    )


def _recomputed(module: Module, walk: Walk) -> float:
    """XLA names a copy `NAME.remat`, `NAME.remat2`, and drops NAME itself where only copies are read."""

    def inside(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
        callees = called(instruction) if instruction.op in ("fusion", "call") else []
        own = product_flops(instruction, body)
        return own + sum(inside(i, walk.bodies[c]) for c in callees for i in module.computations[c])

    again = 0.0
    for name, body in module.computations.items():
        copies: dict[str, list[Instruction]] = {}
        for i in body if walk.times[name] else ():
            copies.setdefault(_REMAT.sub("", i.name), []).append(i)
        for same in copies.values():
            if len(same) > 1:
                again += (len(same) - 1) * number(walk.times[name]) * inside(same[0], walk.bodies[name])
    return again


def _resent(found: Collectives) -> float:
    copies: dict[tuple[str, str], list[float]] = {}
    for c in found:
        copies.setdefault((c.computation, _REMAT.sub("", c.name)), []).append(c.wire_bytes)
    return sum(sum(same[1:]) for same in copies.values())


def collectives(text: str, mesh: Any) -> Collectives:
    """Every collective of an optimized program; see `read`."""
    return read(text, mesh).collectives


def _check(text: str, module: Module, walk: Walk) -> None:
    """What the text says must have been parsed, and what was parsed must be reached."""
    kinds = "|".join(KINDS)
    written = len(re.findall(rf"^\s+(?:ROOT )?%?[\w.\-]+ = .*? (?:{kinds})(?:-start)?\(", text, re.M))
    parsed = [(name, i) for name, body in module.computations.items() for i in body if kind_of(i)]
    if written != len(parsed):
        raise HloError(f"{written} collectives in the text, {len(parsed)} parsed")
    for name, instruction in parsed:
        if name not in walk.reached:
            raise HloError(f"collective {instruction.name} in {name} is not reached from the entry")
    for name, body in module.computations.items():
        for instruction in body:
            base = re.sub(r"-(start|done|update)$", "", instruction.op)
            looks = base.startswith(("all-", "collective-", "ragged-all", "reduce-scatter"))
            if looks and base not in KINDS:
                raise HloError(f"{instruction.op} in {name} looks like a collective and is not known")


def _aliases(header: str) -> frozenset[int]:
    start = header.find("input_output_alias={")
    if start < 0:
        return frozenset()
    depth, end = 0, start
    for end in range(header.index("{", start), len(header)):
        depth += {"{": 1, "}": -1}.get(header[end], 0)
        if depth == 0:
            break
    return frozenset(int(n) for n in re.findall(r": \((\d+),", header[start:end]))


def host_transfers(program: Program) -> list[Instruction]:
    """Instructions by which a step talks to Python or the host: callbacks, prints, infeed, outfeed, host sends."""
    return [i for name, body in program.computations.items() if program.times[name] for i in _host(body)]


def _host(body: Sequence[Instruction]) -> Iterator[Instruction]:
    for i in body:
        to_host = i.op in ("send", "recv") and "is_host_transfer=true" in i.rest and MEGASCALE not in i.rest
        called_back = i.op.startswith("custom-call") and re.search(
            r'custom_call_target="[^"]*callback', i.rest
        )
        if i.op in ("infeed", "outfeed") or to_host or called_back:
            yield i
