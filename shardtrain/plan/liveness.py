"""What is live when: an estimate of a program's temporaries from its operations in their order.

Element-wise operations and moves are fused into who reads them. A buffer is made by products, collectives, reductions,
loops and the like, and where one of those reads a fused value, for as long as such readers remain. A loop's state is one
buffer each; what a body hands on unchanged, or updates in place, is no second one. What waits in the host's memory is counted
apart. TPUs lay the last dim of what a forward keeps along their 128 lanes: heads of 64 take twice their bytes there. XLA reorders
and recomputes: an estimate, whose error `benchmarks/planning.py` publishes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from shardtrain.plan.paper import Block, Op, Paper, hosted

_FUSED_NAMES = """
abs add and broadcast_in_dim cbrt ceil clamp compare complex composite convert cosine count_leading_zeros divide
dynamic_slice exponential exponential_minus_one floor get_dimension_size imag iota is_finite log log_plus_one logistic
maximum minimum multiply negate not or pad partition_id popcnt power real remainder reshape reverse round_nearest_afz
round_nearest_even rsqrt select shift_left shift_right_arithmetic shift_right_logical sign sine slice sqrt subtract tan
tanh transpose xor erf concatenate bitcast_convert reduce_precision real_dynamic_slice
"""
FUSED = frozenset(_FUSED_NAMES.split())
_FREE = frozenset(["constant", "iota", "partition_id", "get_dimension_size"])
_IN_PLACE = frozenset(["dynamic_update_slice", "scatter"])
SMALL = 4096  # bytes: smaller buffers are not followed
LANES = {"tpu": 128}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """`saved`: made by one loop and read by a later one, which is what a backward keeps of its forward."""

    bytes: float
    what: str
    source: str
    saved: bool


@dataclasses.dataclass(frozen=True)
class Live:
    """`bytes` at the moment when most is live, arguments not counted; `buffers`: which, largest first. `host`: bytes in the
    host's memory when most is there.
    """

    bytes: float
    buffers: tuple[Buffer, ...]
    host: float = 0.0

    @property
    def saved(self) -> float:
        """Bytes kept by forwards for their backwards."""
        return sum(b.bytes for b in self.buffers if b.saved)


def live(paper: Paper, platform: str = "cpu") -> Live:
    """The moment of most memory on a platform."""
    away = hosted(paper)
    here = {value: 0.0 if value in away else array.bytes for value, array in paper.values.items()}
    most, buffers = _Walk(paper, here, LANES.get(platform, 1)).block(paper.entry, frozenset(), keep=True)
    host = 0.0
    if away:
        there = {value: array.bytes if value in away else 0.0 for value, array in paper.values.items()}
        host = _Walk(paper, there).block(paper.entry, frozenset(), keep=True)[0]
    return Live(most, tuple(sorted(buffers, key=lambda b: -b.bytes)), host)


Found = tuple[float, list[Buffer]]


@dataclasses.dataclass
class _Held:
    """A buffer of this block: from `born` to `last`, positions of operations."""

    bytes: float
    born: int
    what: str
    source: str
    last: int = -1
    loop: bool = False
    saved: bool = False
    padding: float = 0.0  # where it is saved

    @property
    def taken(self) -> float:
        return self.bytes + self.padding * self.saved


class _Walk:
    """`sizes`: bytes of every value in the memory that is looked at. `lanes`: of the last dim."""

    def __init__(self, paper: Paper, sizes: Mapping[int, float], lanes: int = 1):
        self.values, self.sizes, self.lanes = paper.values, sizes, lanes

    def block(self, block: Block, carried: Iterable[int], *, keep: bool) -> Found:
        """Most bytes of what the block makes, over those that were there, and the buffers of that moment.

        Args:
            carried: arguments whose buffers the block may give up once it has read them, to take others for what
                it returns. keep: of the outermost block, what it returns is written over its arguments.
        """
        roots: dict[int, tuple[int, ...]] = {}  # value -> numbers of buffers that it needs
        held: dict[int, _Held] = {}  # number of a buffer, that of the value which made it
        inner: dict[int, Found] = {}
        carried = set(carried)
        for argument in block.takes:
            roots[argument] = ()
            if argument in carried and self.sizes[argument] >= SMALL:
                held[argument] = _Held(self.sizes[argument], -1, "", "")
                roots[argument] = (argument,)

        def make(value: int, at: int, op: Op, **more: bool) -> None:
            size = self.sizes[value]
            roots[value] = (value,) if size >= SMALL else ()
            if size >= SMALL:
                text = f"{op.name} {self.values[value]}"
                held[value] = _Held(size, at, text, op.source, at, padding=self.padding(value), **more)

        def read(values: Iterable[int], at: int, loop: bool = False) -> None:
            for value in values:
                for number in roots.get(value, ()):
                    buffer = held[number]
                    buffer.last = max(buffer.last, at)
                    buffer.saved |= loop and buffer.loop and buffer.born < at

        lazy: dict[int, Op] = {}  # fused values that no buffer holds yet
        for at, op in enumerate(block.ops):
            if op.name in _FREE:
                roots.update({m: () for m in op.makes})
                continue
            if op.name in FUSED:
                roots[op.makes[0]] = tuple(dict.fromkeys(n for r in op.reads for n in roots.get(r, ())))
                lazy[op.makes[0]] = op
                continue
            # Whoever is not fused reads buffers: those of fused values are made now, and stay for the next such reader.
            for value in self.whole(op):
                if value in lazy and not _only_moves(value, lazy):
                    source = lazy.pop(value)
                    read([value], at)
                    make(value, at, source)
            read(op.reads, at, op.name == "while")
            if op.name == "optimization_barrier":
                for made, value in zip(op.makes, op.reads, strict=True):
                    roots[made] = roots.get(value, ())
            elif op.name == "while":
                inner[at] = self.loop(op, at, roots, held, make, block)
            elif op.name in ("case", "if"):
                most, buffers = max(
                    (self.block(b, (), keep=False) for b in op.blocks), key=lambda found: found[0]
                )
                for value in op.makes:
                    make(value, at, op)
                results = sum(held[m].taken for m in op.makes if m in held)
                inner[at] = max(0.0, most - results), buffers  # a branch makes them where they are wanted
            elif op.name in _IN_PLACE and op.reads[0] in roots and len(roots[op.reads[0]]) == 1:
                roots[op.makes[0]] = roots[op.reads[0]]
            else:
                for value in op.makes:
                    make(value, at, op)
        end = len(block.ops)
        states = dict(zip(block.gives, block.takes, strict=False)) if carried else {}
        for value in block.gives:
            if keep:
                continue
            state, made_of = states.get(value), roots.get(value, ())
            # A product that is added to a loop's state is written where that is.
            in_place = state in carried and state in made_of and self.sizes[state] == self.sizes[value]
            in_place &= any(held[n].what.startswith("dot_general") for n in made_of if n in held)
            if value in lazy and not in_place:
                op = lazy.pop(value)
                read([value], end)
                make(value, end, op)
            read([value], end)
        return _most(held, inner, end)

    def padding(self, value: int) -> float:
        """Bytes of lanes that a value leaves empty. Where it would fill less than half, compilers lay another dim along them."""
        last = (self.values[value].shape or (1,))[-1]
        lanes = -(-last // self.lanes) * self.lanes
        return self.sizes[value] * (lanes / last - 1) if last and lanes <= 2 * last else 0.0

    def whole(self, op: Op) -> tuple[int, ...]:
        """Operands that must be in memory; a reduction computes what it reads, an update what it writes, a loop has what it
        starts from where its state is."""
        if op.name == "while":
            return tuple(r for r, made in zip(op.reads, op.makes, strict=True) if self.sizes[made])
        return op.reads[:1] if op.name == "dynamic_update_slice" else () if op.name == "reduce" else op.reads

    def loop(
        self,
        op: Op,
        at: int,
        roots: dict[int, tuple[int, ...]],
        held: dict[int, _Held],
        make: Callable[..., None],
        block: Block,
    ) -> Found:
        """State of a loop: the buffer that it came in where nobody else reads it later, else one of its own."""
        body = op.blocks[1]
        later = {r for o in block.ops[at + 1 :] for r in o.reads} | set(block.gives)
        taken: set[int] = set()
        changes = []
        for took, gave, value, made in zip(body.takes, body.gives, op.reads, op.makes, strict=True):
            found = roots.get(value, ())
            if took == gave:  # handed on as it is
                roots[made] = found
                continue
            changes.append(took)
            mine = len(found) == 1 and held[found[0]].bytes == self.sizes[made]
            if mine and found[0] not in taken and value not in later and held[found[0]].born >= 0:
                roots[made] = found
                held[found[0]].loop = True
                taken.add(found[0])
            else:
                make(made, at, op, loop=True)
        return self.block(body, changes, keep=False)


def _only_moves(value: int, lazy: Mapping[int, Op]) -> bool:
    """Whether a fused value is another's bits in another shape."""
    op = lazy[value]
    return op.name == "reshape" and (op.reads[0] not in lazy or _only_moves(op.reads[0], lazy))


def _most(held: dict[int, _Held], inner: dict[int, Found], end: int) -> Found:
    """The moment of most bytes: of buffers that are live, and of what an operation has inside."""
    change: dict[int, float] = {}
    base = sum(b.taken for b in held.values() if b.born < 0)
    for buffer in held.values():
        if buffer.born >= 0:
            change[buffer.born] = change.get(buffer.born, 0.0) + buffer.taken
        change[buffer.last + 1] = change.get(buffer.last + 1, 0.0) - buffer.taken
    most, when, now = 0.0, -1, base
    for at in range(end + 1):
        now += change.get(at, 0.0)
        total = now + inner.get(at, (0.0, []))[0]
        if total - base > most:
            most, when = total - base, at
    buffers = [
        Buffer(b.taken, b.what, b.source, b.saved) for b in held.values() if 0 <= b.born <= when <= b.last
    ]
    return most, [*buffers, *inner.get(when, (0.0, []))[1]]
