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
from shardtrain.parallel.schedules import Schedule
from shardtrain.parallel.stages import STAGE, Deal, Stages
from shardtrain.parallel.ticks import Ticks, forward_only, lower
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
    `head(shared, i, x) -> (objective, scalars)`.
    """

    embed: Callable[[Any, jax.Array], Any]
    piece: Callable[[Any, jax.Array, jax.Array, Any], Any]
    head: Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]


def run(
    ticks: Ticks, work: Work, shared: Any, stack: Any, axes: tuple[str, ...], *, train: bool, masked: bool
) -> Any:
    """Run the schedule.

    Args:
        shared: parameters of `embed` and `head`, as they are on every stage. stack: [chunks, layers of a piece, ...]
            of this stage. axes: manual mesh axes over which values differ, `stage` among them.
        train: False runs forwards alone, and the head with them. masked: see above.

    Returns:
        `(gradients of shared, of the stack, scalars)`: sums over the microbatches of this stage, float32. None in
        place of the gradients without `train`.

    Communicates: over `stage`, per tick of a phase with forwards one x to the next stage, with backwards one to the one
    before: (m v + p - 1) a each way, of which m v are the least.
    """
    return _Executor(ticks, work, axes, train, masked).run(shared, stack)


class _Executor:
    def __init__(self, ticks: Ticks, work: Work, axes: tuple[str, ...], train: bool, masked: bool):
        self.ticks, self.work, self.axes, self.train, self.masked = ticks, work, axes, train, masked
        schedule = ticks.schedule
        self.stages, self.chunks = schedule.stages, schedule.chunks
        # Results go round only where a device has several pieces.
        ring = self.stages if self.chunks > 1 else self.stages - 1
        self.onward = [(s, (s + 1) % self.stages) for s in range(ring)]
        self.backward = [(b, a) for a, b in self.onward]

    def run(self, shared: Any, stack: Any) -> Any:
        shared, stack = self.own(shared), self.own(stack)
        self.shared, self.stack = shared, stack
        self.stage = jax.lax.axis_index(STAGE)
        zero = jnp.int32(0)

        def ends() -> Any:
            x = self.own(self.work.embed(shared, zero))
            return x, self.work.head(shared, zero, x)[1]

        x, scalars = jax.eval_shape(ends)
        self.no_x, self.no_scalars = self.zeros(x), self.zeros(scalars)
        buffers = lambda count: self.own(  # noqa: E731
            jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), x)
        )
        sums = lambda tree: self.own(jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), tree))  # noqa: E731
        carry = {"inputs": buffers(self.ticks.inputs), "scalars": self.no_scalars}
        if self.train:
            carry |= {
                "gradients": buffers(self.ticks.gradients),
                "shared": sums(shared),
                "stack": sums(stack),
            }
        table = jnp.asarray(self.ticks.table)
        for first, end, forwards, backwards in self.ticks.phases:

            def tick(
                carry: Any, rows: jax.Array, on: bool = forwards, back: bool = backwards
            ) -> tuple[Any, None]:
                return self.tick(dict(carry), rows[self.stage], on, back), None

            carry, _ = jax.lax.scan(tick, carry, table[first:end])
        return carry.get("shared"), carry.get("stack"), carry["scalars"]

    def tick(self, carry: Any, row: jax.Array, forwards: bool, backwards: bool) -> Any:
        """One tick of this stage."""
        y = dx = None
        if forwards:
            x, y, scalars = self.choose(
                row[columns.F_CHUNK] >= 0,
                lambda: self.forward(carry, row),
                lambda: (self.no_x, self.no_x, self.no_scalars),
            )
            carry["inputs"] = _put(carry["inputs"], row[columns.F_INPUT], x)
            carry["scalars"] = carry["scalars"] + scalars
        if backwards:
            half = self.ticks.schedule.splits
            kept = {k: carry[k] for k in ("shared", "stack", "scalars")}
            dy, dx, kept = self.choose(
                row[columns.B_CHUNK] >= 0,
                lambda: self.back(carry, row, half),
                lambda: (self.no_x, self.no_x, kept),
            )
            carry |= kept
            if half:
                carry["gradients"] = _put(carry["gradients"], row[columns.B_GRADIENT], dy)
                carry["stack"] = self.choose(
                    row[columns.W_CHUNK] >= 0, lambda: self.weights(carry, row), lambda: carry["stack"]
                )
        if y is not None:
            carry["inputs"] = _put(carry["inputs"], row[columns.GET_INPUT], self.send(y, self.onward))
        if dx is not None:
            carry["gradients"] = _put(
                carry["gradients"], row[columns.GET_GRADIENT], self.send(dx, self.backward)
            )
        return carry

    def forward(self, carry: Any, row: jax.Array) -> Any:
        """Input and output of a piece. In training the last one's output is not needed: its backward makes it again."""
        c, i = row[columns.F_CHUNK], row[columns.F_BATCH]
        x = self.choose(
            self.is_first(c),
            lambda: self.own(self.work.embed(self.shared, i)),
            lambda: _take(carry["inputs"], row[columns.F_INPUT]),
        )
        piece = lambda: self.own(self.work.piece(_take(self.stack, c), c, i, x))  # noqa: E731
        if self.train:
            return x, self.choose(self.is_last(c), lambda: self.no_x, piece), self.no_scalars
        y = piece()
        scalars = self.choose(
            self.is_last(c), lambda: self.own(self.work.head(self.shared, i, y)[1]), lambda: self.no_scalars
        )
        return x, y, scalars

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
            one, transpose, scalars = jax.vjp(head, self.shared, y, has_aux=True)
            d_shared, dy = transpose(self.own(jnp.ones_like(one)))
            return dy, _add(carry["shared"], d_shared), carry["scalars"] + scalars

        def middle() -> Any:
            return _take(carry["gradients"], row[columns.B_GRADIENT]), carry["shared"], carry["scalars"]

        dy, shared, scalars = self.choose(self.is_last(c), end, middle)
        *d_stack, dx = transpose(dy)

        def start() -> Any:
            _, transpose = jax.vjp(lambda shared: self.own(self.work.embed(shared, i)), self.shared)
            return _add(shared, transpose(dx)[0])

        shared = self.choose(self.is_first(c), start, lambda: shared)
        stack = carry["stack"] if half else _add_at(carry["stack"], c, d_stack[0])
        return dy, dx, {"shared": shared, "stack": stack, "scalars": scalars}

    def weights(self, carry: Any, row: jax.Array) -> Any:
        """The stack's sum with the gradient of a piece's parameters added."""
        c, i = row[columns.W_CHUNK], row[columns.W_BATCH]
        x, dy = (
            _take(carry["inputs"], row[columns.W_INPUT]),
            _take(carry["gradients"], row[columns.W_GRADIENT]),
        )
        _, transpose = jax.vjp(lambda own: self.own(self.work.piece(own, c, i, x)), _take(self.stack, c))
        return _add_at(carry["stack"], c, transpose(dy)[0])

    def choose(self, wanted: jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """One of two, by a condition that differs from stage to stage."""
        if not self.masked:
            return jax.lax.cond(wanted, yes, no)
        return jax.tree.map(lambda a, b: jnp.where(wanted, a, b), yes(), no())

    def is_first(self, c: jax.Array) -> jax.Array:
        return (c == 0) & (self.stage == 0)

    def is_last(self, c: jax.Array) -> jax.Array:
        return (c == self.chunks - 1) & (self.stage == self.stages - 1)

    def send(self, tree: Any, pairs: list[tuple[int, int]]) -> Any:
        return jax.tree.map(lambda a: jax.lax.ppermute(a, STAGE, pairs), tree)

    def own(self, tree: Any) -> Any:
        return varying(tree, self.axes)

    def zeros(self, shapes: Any) -> Any:
        return self.own(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


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
