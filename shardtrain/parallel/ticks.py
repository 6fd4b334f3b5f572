"""A schedule as the ticks of one program that all stages run in step.

A tick has three slots: a forward, a backward (or its half for inputs), a backward of weights. What a stage makes in a
tick is with its neighbour at the next one. Each stage does its ops in the order of the table, in the earliest slot
that comes after the last and after what they need. Buffers for inputs and gradients that wait are as many as are ever
needed at one time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from shardtrain.parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Row, Schedule

SLOT = {FORWARD: 0, BACKWARD: 1, INPUT: 1, WEIGHT: 2}
ARRIVAL = 3  # after the slots of a tick

# Columns of a table of ticks. -1 is nothing.
F_CHUNK, F_BATCH, F_INPUT = 0, 1, 2
B_CHUNK, B_BATCH, B_INPUT, B_GRADIENT = 3, 4, 5, 6
W_CHUNK, W_BATCH, W_INPUT, W_GRADIENT = 7, 8, 9, 10
GET_INPUT, GET_GRADIENT = 11, 12
COLUMNS = 13


@dataclasses.dataclass(frozen=True, eq=False)
class Ticks:
    """`rows`: tick -> stage -> what it does. `table`: int32 [ticks, stages, COLUMNS], the same for the program, with the
    buffer slots. `inputs`, `gradients`: buffers of each. `phases`: (first, last + 1, forwards?, backwards?) of runs of
    ticks, so that a tick carries only what some stage does in it."""

    schedule: Schedule
    rows: tuple[tuple[tuple[Row, ...], ...], ...]
    table: np.ndarray
    inputs: int
    gradients: int
    phases: tuple[tuple[int, int, bool, bool], ...]

    def senders(self, first: int, end: int, slot: int) -> tuple[list[tuple[tuple[int, ...], int]], list[int]]:
        """Of the ticks of a phase: the sets of stages that send (to the next stage for `GET_INPUT`, to the one before for
        `GET_GRADIENT`), each with how many ticks have it; and which of them each tick has."""
        step = -1 if slot == GET_INPUT else 1
        there = np.roll(self.table[first:end, :, slot] >= 0, step, axis=1)  # by sender
        sets = [tuple(map(int, np.flatnonzero(tick))) for tick in there]
        unique = sorted(set(sets))
        return [(s, sets.count(s)) for s in unique], [unique.index(s) for s in sets]

    def done(self, first: int, end: int, column: int, *, only: str = "") -> int:
        """How many times the stages together do what a column says in a phase; `only` on the `first` or `last` piece."""
        rows = self.table[first:end, :, column]
        chunk, stage = {"first": (0, 0), "last": (self.schedule.chunks - 1, self.schedule.stages - 1)}.get(
            only, (None, None)
        )
        return int((rows >= 0).sum() if chunk is None else (rows[:, stage] == chunk).sum())


@contextlib.contextmanager
def runs(times: int, of: int) -> Iterator[None]:
    """Names what is traced inside by how often it runs: a program does not say how often a branch is taken, and the reader of
    compiled programs (`plan/hlo`) takes it from this name."""
    with jax.named_scope(f"runs_{times}_of_{max(of, 1)}"):
        yield


def lower(schedule: Schedule) -> Ticks:
    """The ticks of a schedule. Where some backwards are split, all are."""
    if schedule.splits and any(row.op == BACKWARD for row in schedule.rows):
        schedule = _split(schedule)
    rows = _packed(schedule)
    table = np.full((len(rows), schedule.stages, COLUMNS), -1, np.int32)
    made: dict[tuple[str, int, int], tuple[int, int]] = {}  # -> (tick, slot)
    last: dict[tuple[str, int, int], tuple[int, int]] = {}
    for t, tick in enumerate(rows):
        for row in (row for stage in tick for row in stage):
            key = schedule.does(row)
            made[key] = (t, SLOT[row.op])
            if row.op != FORWARD:
                last[INPUT, *key[1:]] = (t, SLOT[row.op])  # a backward of weights is the last to read
    inputs, used = _colour(schedule, _input_spans(schedule, made, last))
    gradients, waiting = _colour(schedule, _gradient_spans(schedule, made, last))
    for t, tick in enumerate(rows):
        for row in (row for stage in tick for row in stage):
            _write(schedule, table, t, row, inputs, gradients)
    return Ticks(schedule, rows, table, max(used, 1), max(waiting, 1), _phases(rows))


def forward_only(schedule: Schedule) -> Ticks:
    """The forwards of a schedule alone, for evaluation."""
    rows = tuple(row for row in schedule.rows if row.op == FORWARD)
    return lower(dataclasses.replace(schedule, rows=rows))


def _split(schedule: Schedule) -> Schedule:
    rows = []
    for row in schedule.rows:
        time = 2 * row.time
        if row.op == BACKWARD:
            rows += [row._replace(time=time, op=INPUT), row._replace(time=time + 1, op=WEIGHT)]
        else:
            rows.append(row._replace(time=time))
    return dataclasses.replace(schedule, rows=tuple(rows))


def _packed(schedule: Schedule) -> tuple[tuple[tuple[Row, ...], ...], ...]:
    orders, at = schedule.orders, [0] * schedule.stages
    done: dict[tuple[str, int, int], tuple[int, int]] = {}  # -> (tick, stage)
    ticks: list[tuple[tuple[Row, ...], ...]] = []
    while any(n < len(order) for n, order in zip(at, orders, strict=True)):
        t, tick = len(ticks), []
        for stage, order in enumerate(orders):
            own: list[Row] = []
            while at[stage] < len(order):
                row = order[at[stage]]
                late = own and SLOT[own[-1].op] >= SLOT[row.op]
                if late or not all(_there(done.get(need), t, stage) for need in schedule.needs(row)):
                    break
                own.append(row)
                done[schedule.does(row)] = (t, stage)
                at[stage] += 1
            tick.append(tuple(own))
        assert any(tick), f"{schedule.name} waits for itself at tick {t}"
        ticks.append(tuple(tick))
    return tuple(ticks)


def _there(when: tuple[int, int] | None, tick: int, stage: int) -> bool:
    """Own results are there at once, those of another stage with the next tick."""
    return when is not None and (when[0] < tick or when[1] == stage)


Key = tuple[int, int]
"""(piece, microbatch)."""


def _input_spans(schedule: Schedule, made: dict, last: dict) -> dict[Key, tuple[int, int]]:
    """When the buffer of a piece's input is written first and read last."""
    spans = {}
    for (op, piece, i), (t, slot) in made.items():
        if op != FORWARD:
            continue
        first = _time(made[FORWARD, piece - 1, i][0], ARRIVAL) if piece else _time(t, slot)
        spans[piece, i] = (first, _time(*last.get((INPUT, piece, i), (t, slot))))
    return spans


def _gradient_spans(schedule: Schedule, made: dict, last: dict) -> dict[Key, tuple[int, int]]:
    """The same for the gradient of a piece's output. That of the last piece never travels."""
    spans = {}
    for (op, piece, i), (t, slot) in made.items():
        if op != INPUT:
            continue
        end = piece + 1 == schedule.pieces
        first = _time(t, slot) if end else _time(made[INPUT, piece + 1, i][0], ARRIVAL)
        spans[piece, i] = (first, _time(*last[INPUT, piece, i]))
    return spans


def _time(tick: int, slot: int) -> int:
    return (ARRIVAL + 1) * tick + slot


def _colour(schedule: Schedule, spans: dict[Key, tuple[int, int]]) -> tuple[dict[Key, int], int]:
    """A buffer for each span, those of one stage apart; and how many buffers the busiest stage needs."""
    slots: dict[Key, int] = {}
    most = 0
    for stage in range(schedule.stages):
        own = sorted((span, key) for key, span in spans.items() if key[0] % schedule.stages == stage)
        ends: list[int] = []  # buffer -> last read
        for (first, end), key in own:
            free = next((b for b, read in enumerate(ends) if read < first), len(ends))
            ends[free : free + 1] = [end]
            slots[key] = free
        most = max(most, len(ends))
    return slots, most


def _write(
    schedule: Schedule, table: np.ndarray, t: int, row: Row, inputs: dict[Key, int], gradients: dict[Key, int]
) -> None:
    piece, i, p = schedule.piece(row), row.microbatch, schedule.stages
    mine, key = table[t, row.stage], (piece, i)
    if row.op == FORWARD:
        mine[[F_CHUNK, F_BATCH, F_INPUT]] = row.chunk, i, inputs[key]
        if piece + 1 < schedule.pieces:
            table[t, (row.stage + 1) % p, GET_INPUT] = inputs[piece + 1, i]
    elif row.op == WEIGHT:
        mine[[W_CHUNK, W_BATCH, W_INPUT, W_GRADIENT]] = row.chunk, i, inputs[key], gradients[key]
    else:
        mine[[B_CHUNK, B_BATCH, B_INPUT, B_GRADIENT]] = row.chunk, i, inputs[key], gradients[key]
        if piece:
            table[t, (row.stage - 1) % p, GET_GRADIENT] = gradients[piece - 1, i]


def _phases(rows: Iterable[Iterable[Iterable[Row]]]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Ticks before the first backward, ticks after the last forward, and those between."""
    ops = [{row.op for stage in tick for row in stage} for tick in rows]
    forward = [t for t, found in enumerate(ops) if FORWARD in found]
    backward = [t for t, found in enumerate(ops) if found - {FORWARD}]
    cuts = {0, len(ops)} | ({backward[0]} if backward else set()) | ({forward[-1] + 1} if forward else set())
    edges = sorted(cuts)
    has = lambda times, a, b: any(a <= t < b for t in times)  # noqa: E731
    return tuple((a, b, has(forward, a, b), has(backward, a, b)) for a, b in itertools.pairwise(edges))
