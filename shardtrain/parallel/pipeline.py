"""The executor of a pipeline: one program that all stages run in step, tick by tick.

A `lax.scan` over the table of `parallel/ticks.py`. In each tick a stage does what its row says; then outputs go to the
next stage and gradients to the one before, by `ppermute`. Of a forward its input alone is kept: a backward runs the piece
again. Memory is what the schedule has in flight, not the number of microbatches.

What a stage does not do it skips, by a `lax.cond` of its own. Collectives inside (fsdp, tensor, context) are then entered by
the devices of one stage alone, which is all of their group. The CPU backend lets that pass for all but collective-permutes,
for which it waits for every device: with ring attention inside, all stages run everything and throw away what is not theirs
(`masked`). On a GPT over 4 stages and 8 microbatches that takes 1.5 times the CPU seconds, over stage=2 fsdp=2 tensor=2
1.4 times and 1.7 times the temporary memory, so it is done only there.

Everything here is different on each stage and each batch shard ("varying"): a value that is the same on all of them and is
differentiated in a branch would be summed over them inside the branch, where the others never come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.parallel import ticks as columns
from shardtrain.parallel.fsdp import varying
from shardtrain.parallel.precision import wide
from shardtrain.parallel.schedules import Schedule
from shardtrain.parallel.stages import STAGE, Deal, Stages
from shardtrain.parallel.ticks import Ticks, forward_only, lower, runs
from shardtrain.parallel.timeline import Costs, Timeline, realise


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A loss in parts, its schedule, and which layers each stage has."""

    stages: Stages
    schedule: Schedule
    deal: Deal

    def ticks(self, train: bool) -> Ticks:
        """What the program runs; without `train` forwards alone."""
        return lower(self.schedule) if train else forward_only(self.schedule)

    def timeline(self, costs: Costs | None = None) -> Timeline:
        """What each stage does when, as the compiled step runs it; on paper, from what an op costs.

        `timeline.simulate(pipeline.schedule)` is the same schedule on stages that run each on its own.
        """
        return realise(self.schedule, costs)

    def owns(self, path: str) -> bool:
        """Whether a parameter is one of the stack's."""
        return path.startswith(f"{self.stages.blocks}/")


@dataclasses.dataclass(frozen=True)
class Work:
    """What the stages do, as functions of arrays. `i`: microbatch, `c`: chunk; both traced.

    `embed(shared, i) -> x`. `piece(stack, c, i, x) -> x`, with the parameters of one piece.
    `head(shared, i, x) -> (objective, told)`: whatever arrays are added up over microbatches.
    """

    embed: Callable[[Any, jax.Array], Any]
    piece: Callable[[Any, jax.Array, jax.Array, Any], Any]
    head: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


def run(
    ticks: Ticks, work: Work, shared: Any, stack: Any, axes: tuple[str, ...], *, train: bool, masked: bool
) -> Any:
    """Run the schedule.

    Args:
        shared: parameters of `embed` and `head`, as they are on every stage. stack: [chunks, layers of a piece, ...]
            of this stage. axes: manual mesh axes over which values differ, `stage` among them.
        train: False runs forwards alone, and the head with them. masked: see above.

    Returns:
        `(gradients of shared, of the stack, told)`: sums over the microbatches of this stage, float32 or wider. None in
        place of the gradients without `train`.

    Communicates: over `stage`, one x over each boundary between pieces per microbatch, and its gradient back: in each tick
    only stages that have something for their neighbour send it.
    """
    return _Executor(ticks, work, axes, train, masked).run(shared, stack)


class _Executor:
    def __init__(self, ticks: Ticks, work: Work, axes: tuple[str, ...], train: bool, masked: bool):
        self.ticks, self.work, self.axes, self.train, self.masked = ticks, work, axes, train, masked
        schedule = ticks.schedule
        self.stages, self.chunks = schedule.stages, schedule.chunks

    def run(self, shared: Any, stack: Any) -> Any:
        shared, stack = self.own(shared), self.own(stack)
        self.shared, self.stack = shared, stack
        self.stage = jax.lax.axis_index(STAGE)
        zero = jnp.int32(0)

        def ends() -> Any:
            x = self.own(self.work.embed(shared, zero))
            return x, self.work.head(shared, zero, x)[1]

        x, told = jax.eval_shape(ends)
        self.no_x, self.no_told = self.zeros(x), self.zeros(told)
        buffers = lambda count: self.own(  # noqa: E731
            jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), x)
        )
        sums = lambda tree: self.own(jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s)), tree))  # noqa: E731
        carry = {"inputs": buffers(self.ticks.inputs), "told": self.no_told}
        if self.train:
            carry |= {
                "gradients": buffers(self.ticks.gradients),
                "shared": sums(shared),
                "stack": sums(stack),
            }
        table = jnp.asarray(self.ticks.table)
        for phase in self.ticks.phases:
            (onward, on), (backward, back) = (
                self.ticks.senders(*phase[:2], slot) for slot in (columns.GET_INPUT, columns.GET_GRADIENT)
            )
            sends = (onward, 1), (backward, -1)

            def tick(carry: Any, xs: Any, phase: Any = phase, sends: Any = sends) -> tuple[Any, None]:
                rows, which = xs
                return self.tick(dict(carry), rows[self.stage], which, phase, sends), None

            xs = table[slice(*phase[:2])], (jnp.asarray(on), jnp.asarray(back))
            carry, _ = jax.lax.scan(tick, carry, xs)
        return carry.get("shared"), carry.get("stack"), carry["told"]

    def tick(self, carry: Any, row: jax.Array, which: Any, phase: Any, sends: Any) -> Any:
        """One tick of this stage. `which`: the stages that send in it, of those that `sends` has for the phase."""
        y = dx = None
        first, end, forwards, backwards = phase
        self.phase = (first, end)
        cells = (end - first) * self.stages
        if forwards:
            x, y, told = self.choose(
                row[columns.F_CHUNK] >= 0,
                lambda: self.forward(carry, row),
                lambda: (self.no_x, self.no_x, self.no_told),
                (self.done(columns.F_CHUNK), cells),
            )
            carry["inputs"] = _put(carry["inputs"], row[columns.F_INPUT], x)
            carry["told"] = _add(carry["told"], told)
        if backwards:
            half = self.ticks.schedule.splits
            kept = {k: carry[k] for k in ("shared", "stack", "told")}
            dy, dx, kept = self.choose(
                row[columns.B_CHUNK] >= 0,
                lambda: self.back(carry, row, half),
                lambda: (self.no_x, self.no_x, kept),
                (self.done(columns.B_CHUNK), cells),
            )
            carry |= kept
            if half:
                carry["gradients"] = _put(carry["gradients"], row[columns.B_GRADIENT], dy)
                carry["stack"] = self.choose(
                    row[columns.W_CHUNK] >= 0,
                    lambda: self.weights(carry, row),
                    lambda: carry["stack"],
                    (self.done(columns.W_CHUNK), cells),
                )
        if y is not None:
            got = self.send(y, which[0], *sends[0])
            carry["inputs"] = _put(carry["inputs"], row[columns.GET_INPUT], got)
        if dx is not None:
            got = self.send(dx, which[1], *sends[1])
            carry["gradients"] = _put(carry["gradients"], row[columns.GET_GRADIENT], got)
        return carry

    def done(self, column: int, only: str = "") -> int:
        """Of all stages together, in this phase."""
        return self.ticks.done(*self.phase, column, only=only)

    def forward(self, carry: Any, row: jax.Array) -> Any:
        """Input and output of a piece. In training the last one's output is not needed: its backward makes it again."""
        c, i = row[columns.F_CHUNK], row[columns.F_BATCH]
        every, last = self.done(columns.F_CHUNK), self.done(columns.F_CHUNK, "last")
        x = self.choose(
            self.is_first(c),
            lambda: self.own(self.work.embed(self.shared, i)),
            lambda: _take(carry["inputs"], row[columns.F_INPUT]),
            (self.done(columns.F_CHUNK, "first"), every),
        )
        piece = lambda: self.own(self.work.piece(_take(self.stack, c), c, i, x))  # noqa: E731
        if self.train:
            return (
                x,
                self.choose(~self.is_last(c), piece, lambda: self.no_x, (every - last, every)),
                self.no_told,
            )
        y = piece()
        told = self.choose(
            self.is_last(c),
            lambda: self.own(self.work.head(self.shared, i, y)[1]),
            lambda: self.no_told,
            (last, every),
        )
        return x, y, told

    def back(self, carry: Any, row: jax.Array, half: bool) -> Any:
        """Gradients of a piece's output and input, and the sums with its parameters' added; `half`: not of the stack."""
        c, i = row[columns.B_CHUNK], row[columns.B_BATCH]
        x, own = _take(carry["inputs"], row[columns.B_INPUT]), _take(self.stack, c)
        if half:
            y, transpose = jax.vjp(lambda x: self.own(self.work.piece(own, c, i, x)), x)
        else:
            y, transpose = jax.vjp(lambda own, x: self.own(self.work.piece(own, c, i, x)), own, x)

        def end() -> Any:
            head = lambda shared, y: self.own(self.work.head(shared, i, y))  # noqa: E731
            one, transpose, told = jax.vjp(head, self.shared, y, has_aux=True)
            d_shared, dy = transpose(self.own(jnp.ones_like(one)))
            return dy, _add(carry["shared"], d_shared), _add(carry["told"], told)

        def middle() -> Any:
            return _take(carry["gradients"], row[columns.B_GRADIENT]), carry["shared"], carry["told"]

        every = self.done(columns.B_CHUNK)
        share = (self.done(columns.B_CHUNK, "last"), every)
        dy, shared, told = self.choose(self.is_last(c), end, middle, share)
        *d_stack, dx = transpose(dy)

        def start() -> Any:
            _, transpose = jax.vjp(lambda shared: self.own(self.work.embed(shared, i)), self.shared)
            return _add(shared, transpose(dx)[0])

        share = (self.done(columns.B_CHUNK, "first"), every)
        shared = self.choose(self.is_first(c), start, lambda: shared, share)
        stack = carry["stack"] if half else _add_at(carry["stack"], c, d_stack[0])
        return dy, dx, {"shared": shared, "stack": stack, "told": told}

    def weights(self, carry: Any, row: jax.Array) -> Any:
        """The stack's sum with the gradient of a piece's parameters added."""
        c, i = row[columns.W_CHUNK], row[columns.W_BATCH]
        x, dy = (
            _take(carry["inputs"], row[columns.W_INPUT]),
            _take(carry["gradients"], row[columns.W_GRADIENT]),
        )
        _, transpose = jax.vjp(lambda own: self.own(self.work.piece(own, c, i, x)), _take(self.stack, c))
        return _add_at(carry["stack"], c, transpose(dy)[0])

    def choose(
        self, wanted: jax.Array, yes: Callable[[], Any], no: Callable[[], Any], share: tuple[int, int]
    ) -> Any:
        """One of two, by a condition that differs from stage to stage. `share`: how often the first, of how many runs.

        What no stage takes in this phase is not written at all: compilers merge equal branches of two phases into one, whose
        name then says how often it is taken in one of them only.
        """
        times, of = share
        if times in (0, of):
            return yes() if times else no()
        if not self.masked:

            def counted() -> Any:
                with runs(*share):
                    return _ended(yes())

            return jax.lax.cond(wanted, counted, lambda: _ended(no()))
        return jax.tree.map(lambda a, b: jnp.where(wanted, a, b), yes(), no())

    def is_first(self, c: jax.Array) -> jax.Array:
        return (c == 0) & (self.stage == 0)

    def is_last(self, c: jax.Array) -> jax.Array:
        return (c == self.chunks - 1) & (self.stage == self.stages - 1)

    def send(self, tree: Any, which: jax.Array, sets: list[tuple[tuple[int, ...], int]], step: int) -> Any:
        """To the next stage or the one before, from those that have something to send. All stages agree on `which`."""
        first, end = self.phase

        def by(index: int) -> Callable[[Any], Any]:
            senders, count = sets[index]
            pairs = [(s, (s + step) % self.stages) for s in senders]

            def run(tree: Any) -> Any:
                if not pairs:
                    return self.zeros(tree)
                with runs(count, end - first):
                    return jax.tree.map(lambda a: jax.lax.ppermute(a, STAGE, pairs), tree)

            return run

        return (
            jax.lax.switch(which, [by(i) for i in range(len(sets))], tree) if len(sets) > 1 else by(0)(tree)
        )

    def own(self, tree: Any) -> Any:
        return varying(tree, self.axes)

    def zeros(self, shapes: Any) -> Any:
        return self.own(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _ended(branch: Any) -> Any:
    """A branch of a single result would end in the sharding constraint of that, and the TPU compiler wants the same at the end
    of the other (with several it ends in a tuple, which has none)."""
    return jax.lax.optimization_barrier(branch) if len(jax.tree.leaves(branch)) == 1 else branch


def _take(tree: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), tree)


def _put(tree: Any, slot: jax.Array, value: Any) -> Any:
    """`value` in a buffer's slot; nothing for slot -1."""
    at = jnp.maximum(slot, 0)

    def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(buffer, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, new, old), at, 0)

    return jax.tree.map(put, tree, value)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, more)


def _add_at(total: Any, c: jax.Array, more: Any) -> Any:
    return jax.tree.map(lambda t, g: t.at[c].add(g.astype(t.dtype)), total, more)
