"""The collectives of a walked program: what each sends, over which axes, from which line."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

from shardtrain.mesh.build import SLOW
from shardtrain.plan.hlo.collectives import KINDS, Collective, Collectives
from shardtrain.plan.hlo.groups import mesh_axes, replica_groups
from shardtrain.plan.hlo.text import HloError, Instruction, Module, shapes, size
from shardtrain.plan.hlo.walk import MEGASCALE, Walk, between_slices, kind_of, number


def sent(module: Module, walk: Walk, mesh: Mapping[str, int]) -> Collectives:
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
            kind = kind_of(instruction)
            if not kind and not between_slices(instruction):
                continue
            hidden = name in walk.asynchronous or "async_collective" in name
            one = (
                _collective(kind, instruction, module, walk, name, mesh, hidden)
                if kind
                else _slices(instruction, walk, name, mesh)
            )
            # The pieces of one asynchronous collective stand in several fusions, and share channel and shape with its
            # start: it is sent once. What a SparseCore was handed is whole, and only looks like the next layer's.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (one.op, channel.group(1) if channel else "", one.shape)
            piece = hidden and channel and not walk.started_whole(name)
            if piece and key in shared and name not in starts:
                before = found[shared[key]]
                fewer = min(before.count, one.count)
                per_run = one.wire_bytes / one.count
                found[shared[key]] = dataclasses.replace(before, count=fewer, wire_bytes=per_run * fewer)
                continue
            if piece:
                shared[key] = len(found)
            found.append(one)
    return Collectives(found)


def _collective(
    kind: str,
    instruction: Instruction,
    module: Module,
    walk: Walk,
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
    count = number(walk.times[where])
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


def _scatters(instruction: Instruction, where: str, walk: Walk) -> bool:
    """TPU writes a reduce-scatter as a fusion of an all-reduce and the slice that a device keeps."""
    if "all-reduce-scatter" in where:
        return True
    users = [i for i in walk.bodies[where].values() if instruction.name in i.operands]
    fused = not any(i.op in ("while", "fusion", "call") for i in walk.bodies[where].values())
    return bool(users) and fused and all(i.op == "dynamic-slice" for i in users)


def _slices(instruction: Instruction, walk: Walk, where: str, mesh: Mapping[str, int]) -> Collective:
    """Between slices: the host's network carries what the program sends to it."""
    written = re.search(rf'{MEGASCALE}="(\w+)"', instruction.rest)
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
        count=number(walk.times[where]),
        bytes=payload,
        wire_bytes=factor * payload * number(walk.times[where]),
        asynchronous=True,
        source=meaning.source,
        group=n,
        op_name=meaning.op_name,
        loops=walk.loops[where],
        dcn=True,
        name=instruction.name,
        computation=where,
    )


def _explained(instruction: Instruction, where: str, walk: Walk) -> Instruction:
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
