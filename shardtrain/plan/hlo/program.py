"""A program, walked from its entry: how often everything runs, what is sent, what is computed."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from shardtrain.mesh.build import SLOW
from shardtrain.plan.hlo.collectives import KINDS, Collective, Collectives
from shardtrain.plan.hlo.flops import product_flops
from shardtrain.plan.hlo.groups import mesh_axes, replica_groups
from shardtrain.plan.hlo.loops import known_state, trip_count
from shardtrain.plan.hlo.text import Frame, HloError, Instruction, Module, parse, shapes, size

_MEGASCALE = "_xla_megascale_transfer_type"
_RUNS = re.compile(r"\d+_fun/runs_(\d+)_of_(\d+)")
_CALLERS = {"fusion", "call", "custom-call", "conditional", "async-start"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read.

    `flops`: of products, per device and step (see `hlo.flops` for what no text shows). `computations`: name ->
    instructions. `times`: runs of each a step, 0 if never. `loops`: trip counts around each, outermost first.
    `aliases`: numbers of the entry's parameters that are written in place. `lines`: instructions, the program's size.
    `frames`: the program's stack frames by number, innermost first.
    """

    collectives: Collectives
    flops: float
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
    walk = _Walk(module)
    walk.visit(module.entry, 1, (), False, ())
    found = _collectives(module, walk, sizes)
    _check(text, module, walk)
    flops = sum(
        _number(walk.times[name]) * product_flops(i, walk.bodies[name])
        for name, body in module.computations.items()
        if walk.times[name]
        for i in body
    )
    return Program(
        collectives=found,
        flops=flops,
        computations=module.computations,
        entry=module.entry,
        times={name: _number(walk.times[name]) for name in module.computations},
        loops=walk.loops,
        aliases=_aliases(module.header),
        lines=sum(map(len, module.computations.values())),
        frames=module.frames,
    )


def collectives(text: str, mesh: Any) -> Collectives:
    """Every collective of an optimized program; see `read`."""
    return read(text, mesh).collectives


class _Walk:
    """Runs, loops and asynchrony of every computation."""

    def __init__(self, module: Module):
        self.module = module
        self.bodies = {name: {i.name: i for i in body} for name, body in module.computations.items()}
        self.times: dict[str, Fraction | int] = collections.defaultdict(int)
        self.loops: dict[str, tuple[int, ...]] = {}
        self.reached: set[str] = set()
        self.asynchronous: set[str] = set()
        self.callers: dict[str, tuple[str, Instruction]] = {}
        self.matters = self._matters()

    def _matters(self) -> set[str]:
        """Computations that send or multiply, themselves or in what they call."""
        matters = {
            name
            for name, body in self.module.computations.items()
            if any(
                _kind(i) or _between_slices(i) or i.op in ("dot", "convolution", "custom-call") for i in body
            )
        }
        grew = True
        while grew:
            outer = {
                name
                for name, body in self.module.computations.items()
                if name not in matters and any(c in matters for i in body for c in called(i))
            }
            matters |= outer
            grew = bool(outer)
        return matters

    def visit(
        self, name: str, times: Fraction | int, loops: tuple[int, ...], hidden: bool, arguments: Sequence[Any]
    ) -> None:
        self.reached.add(name)
        self.times[name] += times
        if len(loops) >= len(self.loops.get(name, ())):
            self.loops[name] = loops
        if hidden:
            self.asynchronous.add(name)
        for instruction in self.module.computations[name]:
            inner = [c for c in called(instruction) if c in self.matters]
            for callee in inner:
                self.callers.setdefault(callee, (name, instruction))
            if not inner:
                continue
            if instruction.op == "while":
                trips = trip_count(self.bodies, name, instruction, arguments)
                if trips is None:
                    raise HloError(
                        f"loop {instruction.name} in {name} runs an unknown number of times; "
                        "it holds collectives or products"
                    )
                body = instruction.attribute("body")
                known = known_state(self.bodies, name, instruction, arguments)
                for callee in inner:
                    if callee == body:
                        self.visit(callee, times * trips, (*loops, trips), hidden, known)
                    else:
                        self.visit(callee, times * (trips + 1), loops, hidden, ())
            else:
                shares = {c: self._share(c) for c in inner} if instruction.op == "conditional" else {}
                apart = hidden or instruction.op in ("async-start", "call-start") or _overlapped(instruction)
                for callee in inner:
                    self.visit(callee, times * shares.get(callee, 1), loops, apart, ())

    def _share(self, branch: str) -> Fraction:
        """How often a branch is taken, of all runs: what its trace was named by (`parallel.ticks.runs`), else 1."""
        names = (i.op_name.rpartition("branch_")[2] for i in self.module.computations[branch])
        inside = collections.Counter(named.groups() for name in names if (named := _RUNS.match(name)))
        if not inside:
            return Fraction(1)
        times, of = inside.most_common(1)[0][0]
        return Fraction(int(times), int(of))


def _number(times: Fraction | int) -> int | float:
    return int(times) if times == int(times) else float(times)


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; not those that combine two numbers in a reduction."""
    if instruction.op == "while":
        names = [instruction.attribute("body"), instruction.attribute("condition")]
        return [name for name in names if name]
    if instruction.op not in _CALLERS and not instruction.op.endswith("-start"):
        return []
    keys = ["calls", "true_computation", "false_computation"]
    if instruction.op in ("call", "call-start", "custom-call", "async-start"):
        keys.append("to_apply")
    names = [instruction.attribute(key) for key in keys]
    found = [name for name in names if name]
    for key in ("branch_computations", "called_computations", "calls"):
        found += [name for name in instruction.attributes(key) if name]
    return list(dict.fromkeys(found))


def _kind(instruction: Instruction) -> str:
    kind = instruction.op.removesuffix("-start")
    return kind if kind in KINDS else ""


def _between_slices(instruction: Instruction) -> bool:
    return instruction.op == "send" and _MEGASCALE in instruction.rest


def _overlapped(instruction: Instruction) -> bool:
    """A TPU fusion of a collective with what runs meanwhile, or of its start or its end."""
    named = instruction.name.startswith(("async-collective", "async_collective"))
    return (
        named
        or "async_collective_fusion_config" in instruction.rest
        or "calls=%async_coll" in instruction.rest
    )


def _collectives(module: Module, walk: _Walk, mesh: Mapping[str, int]) -> Collectives:
    found: list[Collective] = []
    shared: dict[tuple[str, ...], int] = {}
    starts = {
        i.attribute("calls")
        for body in module.computations.values()
        for i in body
        if i.name.startswith("async-collective-start")
    }
    # Starts first: each is one collective, though many may share a channel and a shape.
    for name in sorted(module.computations, key=lambda name: name not in starts):
        body = module.computations[name]
        if not walk.times[name]:
            continue
        for instruction in body:
            kind = _kind(instruction)
            if not kind and not _between_slices(instruction):
                continue
            hidden = name in walk.asynchronous or "async_collective" in name
            one = (
                _collective(kind, instruction, module, walk, name, mesh, hidden)
                if kind
                else _slices(instruction, walk, name, mesh)
            )
            # The pieces of one asynchronous collective stand in several fusions, and share channel and shape with its
            # start: it is sent once.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (one.op, channel.group(1) if channel else "", one.shape)
            if hidden and channel and key in shared and name not in starts:
                before = found[shared[key]]
                fewer = min(before.count, one.count)
                per_run = one.wire_bytes / one.count
                found[shared[key]] = dataclasses.replace(before, count=fewer, wire_bytes=per_run * fewer)
                continue
            if hidden and channel:
                shared[key] = len(found)
            found.append(one)
    return Collectives(found)


def _collective(
    kind: str,
    instruction: Instruction,
    module: Module,
    walk: _Walk,
    where: str,
    mesh: Mapping[str, int],
    hidden: bool,
) -> Collective:
    groups = replica_groups(instruction.rest, mesh)
    n, sending = len(groups[0]), 1.0
    if kind == "collective-permute":
        # Only devices that send to another one send; the pairs are of the whole mesh.
        n, sending = 2, sum(a != b for a, b in groups) / math.prod(mesh.values())
    operands = [
        walk.bodies[where][name].result for name in instruction.operands if name in walk.bodies[where]
    ]
    payload = sum(map(size, operands))
    if kind == "ragged-all-to-all":
        # How many rows go is not in the program: as many as the smaller of the two buffers holds, spread evenly.
        operands = operands[:2]
        payload = min(map(size, operands))
    dtypes = sorted({dtype for operand in operands for dtype, _ in shapes(operand)})
    shown = operands
    if kind == "all-gather":
        payload *= n
        shown = [_gathered(operand, instruction, n) for operand in operands]
    if kind == "all-reduce" and where != module.entry and _scatters(instruction, where, walk):
        kind = "reduce-scatter"
    share = (n - 1) / n
    factor = {
        "all-reduce": 2 * share,
        "collective-permute": sending,
        "collective-broadcast": 1.0 if n > 1 else 0.0,
    }.get(kind, share)
    axes = mesh_axes(groups, mesh)
    whole = math.prod(mesh[a] for a in axes)
    count = _number(walk.times[where])
    explained = _explained(instruction, where, walk)
    return Collective(
        op=kind,
        axes=axes,
        dtype="/".join(dtypes),
        shape=" ".join(f"{d}[{','.join(map(str, dims))}]" for text in shown for d, dims in shapes(text)),
        count=count,
        bytes=payload,
        wire_bytes=factor * payload * count,
        asynchronous=hidden or instruction.op.endswith("-start"),
        source=explained.source,
        group=n,
        op_name=explained.op_name,
        partial=kind != "collective-permute" and n not in (1, whole),
        loops=walk.loops[where],
        name=instruction.name,
        computation=where,
    )


def _gathered(operand: str, instruction: Instruction, n: int) -> str:
    """The type of one operand after the gather."""
    dim = re.search(r"dimensions=\{(\d+)\}", instruction.rest)
    found = shapes(operand)
    if dim is None or len(found) != 1:
        return operand
    dtype, dims = found[0]
    grown = [size * n if d == int(dim.group(1)) else size for d, size in enumerate(dims)]
    return f"{dtype}[{','.join(map(str, grown))}]"


def _scatters(instruction: Instruction, where: str, walk: _Walk) -> bool:
    """TPU writes a reduce-scatter as a fusion of an all-reduce and the slice that a device keeps."""
    if "all-reduce-scatter" in where:
        return True
    users = [i for i in walk.bodies[where].values() if instruction.name in i.operands]
    fused = not any(i.op in ("while", "fusion", "call") for i in walk.bodies[where].values())
    return bool(users) and fused and all(i.op == "dynamic-slice" for i in users)


def _slices(instruction: Instruction, walk: _Walk, where: str, mesh: Mapping[str, int]) -> Collective:
    """Between slices: the host's network carries what the program sends to it."""
    written = re.search(rf'{_MEGASCALE}="(\w+)"', instruction.rest)
    kind = (written.group(1) if written else "").lower().replace("_", "-")
    if kind not in KINDS:
        raise HloError(f"a transfer between slices of an unknown kind: {kind}")
    axis = next((a for a in (*SLOW, "stage") if a in mesh), next(iter(mesh)))
    n, operand = mesh[axis], walk.bodies[where][instruction.operands[0]].result
    payload, share = size(operand) * (n if kind == "all-gather" else 1), (n - 1) / n
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    meaning = _explained(instruction, where, walk)
    return Collective(
        op=kind,
        axes=(axis,),
        dtype=shapes(operand)[0][0],
        shape=" ".join(f"{d}[{','.join(map(str, dims))}]" for d, dims in shapes(operand)),
        count=_number(walk.times[where]),
        bytes=payload,
        wire_bytes=factor * payload * _number(walk.times[where]),
        asynchronous=True,
        source=meaning.source,
        group=n,
        op_name=meaning.op_name,
        loops=walk.loops[where],
        dcn=True,
        name=instruction.name,
        computation=where,
    )


def _explained(instruction: Instruction, where: str, walk: _Walk) -> Instruction:
    """The nearest instruction that says where it comes from: partitioners drop it from what they insert, fusions keep
    it outside."""
    for _ in range(3):
        found = _nearest(instruction, walk.bodies[where])
        if found.frames or where not in walk.callers:
            return found
        where, instruction = walk.callers[where]
    return instruction


def _nearest(instruction: Instruction, body: Mapping[str, Instruction]) -> Instruction:
    if instruction.frames:
        return instruction
    users: dict[str, list[str]] = collections.defaultdict(list)
    for user in body.values():
        for operand in user.operands:
            users[operand].append(user.name)
    seen, frontier = {instruction.name}, [instruction.name]
    for _ in range(4):
        after: list[str] = []
        for name in frontier:
            near: list[str] = [*(body[name].operands if name in body else ()), *users[name]]
            for other in near:
                if other in seen or other not in body:
                    continue
                if body[other].frames:
                    return body[other]
                seen.add(other)
                after.append(other)
        frontier = after
    return instruction


def _check(text: str, module: Module, walk: _Walk) -> None:
    """What the text says must have been parsed, and what was parsed must be reached."""
    kinds = "|".join(KINDS)
    written = len(re.findall(rf"^\s+(?:ROOT )?%?[\w.\-]+ = .*? (?:{kinds})(?:-start)?\(", text, re.M))
    parsed = [(name, i) for name, body in module.computations.items() for i in body if _kind(i)]
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
        sent = i.op in ("send", "recv") and "is_host_transfer=true" in i.rest and _MEGASCALE not in i.rest
        called_back = i.op.startswith("custom-call") and re.search(
            r'custom_call_target="[^"]*callback', i.rest
        )
        if i.op in ("infeed", "outfeed") or sent or called_back:
            yield i
