"""A partitioned program on paper: its operations, how often each runs, what it computes and sends.

`plan/partitioned.py` makes one out of StableHLO. Plain values: nothing here knows where they came from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

from shardtrain.mesh.build import SLOW
from shardtrain.plan.hlo import Collective, Collectives, HloError, mesh_axes


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape and dtype of one value on one device."""

    dtype: str
    shape: tuple[int, ...]
    width: float  # bytes of an element

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * self.width

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation. `reads`, `makes`: numbers of values. `blocks`: bodies; of a loop its condition and its body.

    `flops`: of one run. `axes`, `groups`: of a collective, the mesh axes by name or devices by number; a permute has pairs.
    `number`: of a constant. `share`: of a branch, how often it is taken. `compares`: of a comparison. `source`:
    `file.py:123`; `scope`: JAX's name of the operation.
    """

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    flops: float = 0.0
    axes: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    number: int | None = None
    compares: str = ""
    source: str = ""
    scope: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """`takes`: numbers of its arguments. `gives`: of what it returns. `share`: of all runs, those that take this branch."""

    takes: tuple[int, ...]
    ops: tuple[Op, ...]
    gives: tuple[int, ...]
    share: Fraction = Fraction(1)


@dataclasses.dataclass(frozen=True)
class Paper:
    """A whole program: `entry`, what every value is, and the mesh."""

    entry: Block
    values: Mapping[int, Array]
    mesh: Mapping[str, int]


KINDS = {
    "all_gather": "all-gather",
    "all_reduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "collective_permute": "collective-permute",
    "collective_broadcast": "collective-broadcast",
}


TO_HOST, TO_DEVICE = "to_host", "to_device"  # a value, as remat policies place it
_SAME_PLACE = frozenset(
    ["reshape", "broadcast_in_dim", "slice", "dynamic_slice", "transpose", "optimization_barrier"]
)


def hosted(paper: Paper) -> frozenset[int]:
    """Values in the memory of the host: from where they are sent to where they come back, through loops and their state."""
    found: set[int] = set()
    before = -1
    while before != len(found):
        before = len(found)
        _follow(paper.entry, found)
    return frozenset(found)


def _follow(block: Block, found: set[int]) -> None:
    for op in block.ops:
        pairs: Iterable[tuple[int, ...]] = ()
        if op.name == TO_HOST:
            found.update(op.makes)
        elif op.name == "while":
            body = op.blocks[1]
            # What a loop starts from may be shared with others: zeros, which are made where they are wanted.
            pairs = zip(op.blocks[0].takes, body.takes, body.gives, op.makes, strict=True)
            found.update(take for take, read in zip(body.takes, op.reads, strict=True) if read in found)
        elif op.blocks:
            pairs = ((m, *gives) for m, *gives in zip(op.makes, *(b.gives for b in op.blocks), strict=True))
        elif op.name == "dynamic_update_slice":
            state = op.reads[:1] if op.reads[0] in block.takes else ()
            if found & {*op.reads[:2], *op.makes}:
                found.update(op.makes, state)
        elif op.name in _SAME_PLACE:
            found.update(made for made, read in zip(op.makes, op.reads, strict=False) if read in found)
        for same in pairs:
            if found & set(same):
                found.update(same)
        for inner in op.blocks:
            _follow(inner, found)


def to_and_fro(paper: Paper) -> float:
    """Bytes between one device and its host in a step, both ways added."""
    moves = (r for r in runs(paper) if r.op.name in (TO_HOST, TO_DEVICE))
    return float(sum(r.times * Fraction(paper.values[r.op.makes[0]].bytes) for r in moves))


@dataclasses.dataclass(frozen=True)
class Run:
    """An operation where it stands: `times` a step on one device, `loops` around it, outermost first."""

    op: Op
    times: Fraction
    loops: tuple[int, ...]


def runs(paper: Paper) -> Iterator[Run]:
    """Every operation but conditionals, as often as it runs; a loop itself, after what is in it, as often as it turns. A loop in
    which nothing is computed or sent and that does not say how often it runs is taken for one of a single run.

    Raises:
        HloError: another loop that does not say it.
    """
    yield from _runs(paper.entry, Fraction(1), (), {})


def _runs(block: Block, times: Fraction, loops: tuple[int, ...], known: dict[int, int]) -> Iterator[Run]:
    known = dict(known)
    for op in block.ops:
        if op.number is not None:
            known[op.makes[0]] = op.number
        if op.name == "while":
            trips = trip_count(op, known)
            if trips is None and any(map(_matters, op.blocks)):
                raise HloError(
                    "a loop runs an unknown number of times",
                    where=op.source or "an unknown line",
                    why="it holds collectives or products, which cannot be counted then",
                    fix="a scan or fori_loop over a known number; it trains as it is",
                )
            trips = 1 if trips is None else trips
            yield from _runs(op.blocks[1], times * trips, (*loops, trips), _passed(op, known))
            yield Run(op, times * trips, (*loops, trips))
        elif op.blocks:
            for branch in op.blocks:
                yield from _runs(branch, times * branch.share, loops, known)
        else:
            yield Run(op, times, loops)


def _matters(block: Block) -> bool:
    return any(op.flops or op.name in KINDS or any(map(_matters, op.blocks)) for op in block.ops)


def _passed(loop: Op, known: Mapping[int, int]) -> dict[int, int]:
    """Numbers known inside a body: of outside, and of arguments that the loop hands on as they are."""
    body = loop.blocks[1]
    same = zip(body.takes, body.gives, loop.reads, strict=False)
    return {**known, **{took: known[read] for took, gave, read in same if took == gave and read in known}}


def trip_count(loop: Op, known: Mapping[int, int]) -> int | None:
    """Of a loop that counts one number up to another: (end - start) / step, rounded up."""
    condition, body = loop.blocks
    inside = {op.makes[0]: op for op in condition.ops if len(op.makes) == 1}
    test = inside.get(condition.gives[0]) if condition.gives else None
    if test is None or test.name != "compare" or test.compares not in ("LT", "LE"):
        return None
    counter, limit = test.reads
    if counter not in condition.takes:
        return None
    index = condition.takes.index(counter)
    numbers = {**known, **{o.makes[0]: o.number for o in condition.ops if o.number is not None}}
    handed = dict(zip(condition.takes, loop.reads, strict=False))
    unchanged = {c for c, t, g in zip(condition.takes, body.takes, body.gives, strict=False) if t == g}
    end = numbers.get(limit, known.get(handed[limit]) if limit in unchanged else None)
    start = known.get(loop.reads[index])
    makers = {op.makes[0]: op for op in body.ops if len(op.makes) == 1}
    added = makers.get(body.gives[index])
    if end is None or start is None or added is None or added.name != "add":
        return None
    steps = {**known, **{o.makes[0]: o.number for o in body.ops if o.number is not None}}
    others = [steps.get(r) for r in added.reads if r != body.takes[index]]
    if body.takes[index] not in added.reads or len(others) != 1 or not others[0] or others[0] < 1:
        return None
    return max(0, -(-(end + (test.compares == "LE") - start) // others[0]))


def count(paper: Paper) -> tuple[float, Collectives]:
    """FLOPs of products and every collective, per device and step."""
    flops, found = Fraction(0), []
    for run in runs(paper):
        flops += run.times * Fraction(run.op.flops)
        if run.op.name in KINDS:
            found.append(_collective(run, paper))
    return float(flops), Collectives(found)


def _collective(run: Run, paper: Paper) -> Collective:
    op, mesh = run.op, paper.mesh
    kind = KINDS[op.name]
    operands = [paper.values[r] for r in (op.reads if op.name != "ragged_all_to_all" else op.reads[:1])]
    axes, n, sending = op.axes, math.prod(mesh[a] for a in op.axes), 1.0
    if op.groups:
        groups = [list(g) for g in op.groups]
        axes, n = mesh_axes(groups, mesh), len(groups[0])
        if kind == "collective-permute":
            n, sending = 2, sum(a != b for a, b in groups) / math.prod(mesh.values())
    payload = sum(a.bytes for a in operands) * (n if kind == "all-gather" else 1)
    share = (n - 1) / n
    factor = {"all-reduce": 2 * share, "collective-permute": sending, "collective-broadcast": 1.0 * (n > 1)}
    wire = factor.get(kind, share) * payload * float(run.times)
    return Collective(
        op=kind,
        axes=axes,
        dtype="/".join(sorted({a.dtype for a in operands})),
        shape=" ".join(map(str, operands)),
        count=int(run.times) if run.times.denominator == 1 else float(run.times),
        bytes=payload,
        wire_bytes=wire,
        asynchronous=False,
        source=op.source,
        group=n,
        op_name=op.scope,
        partial=kind != "collective-permute" and n != math.prod(mesh[a] for a in axes),
        loops=run.loops,
        dcn=any(a in SLOW for a in axes),
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """An operation: `flops` and `bytes` (of memory, read and written) of one run, `times` a step; whether in a loop."""

    dtype: str
    flops: float
    bytes: float
    times: float
    looped: bool = False


def work(paper: Paper, fused: frozenset[str]) -> tuple[Work, ...]:
    """What the device computes and moves in its memory, operation by operation, in their order; fused ones move nothing.

    The state of a step is read and written once more, by its update; that of a loop in each turn, where a fused operation makes it
    anew: sums of gradients are.
    """
    state = sum(paper.values[a].bytes for a in paper.entry.takes)
    found = [Work("f32", 0.0, 2 * state, 1.0)]
    away = hosted(paper)
    for run in runs(paper):
        op = run.op
        if op.name in fused or op.name in KINDS or op.name == "constant":
            continue
        sizes = [paper.values[n].bytes for n in (*op.reads, *op.makes) if n not in away]
        if op.name == "while":
            sizes = [k * paper.values[n].bytes for n, k in _changed(op, fused).items() if n not in away]
        elif op.name == "dynamic_update_slice":  # in place: what is written, and read from where it was made
            sizes = [] if op.makes[0] in away else [2 * paper.values[op.reads[1]].bytes]
        elif op.name in ("gather", "scatter"):
            sizes = [2 * min(sizes)]
        dtype = paper.values[op.reads[0]].dtype if op.reads else ""
        if sum(sizes):
            found.append(Work(dtype, op.flops, sum(sizes), float(run.times), bool(run.loops)))
    return tuple(found)


def _changed(loop: Op, fused: frozenset[str]) -> dict[int, int]:
    """What fused operations make of a loop's state, and how often each turn moves it: it is read and written, but what a product
    adds to it is written by the product."""
    body = loop.blocks[1]
    made = {op.makes[0]: op for op in body.ops if len(op.makes) == 1}

    def of_product(value: int) -> bool:
        op = made.get(value)
        moved = op is not None and op.name in ("convert", "reshape", "transpose")
        return op is not None and (op.name == "dot_general" or (moved and of_product(op.reads[0])))

    changed = {
        gave: made[gave]
        for took, gave in zip(body.takes, body.gives, strict=True)
        if gave != took and gave in made and made[gave].name in fused
    }
    return {gave: 1 if any(map(of_product, op.reads)) else 2 for gave, op in changed.items()}
