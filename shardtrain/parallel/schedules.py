"""Pipeline schedules as data: which stage works on which microbatch when.

A schedule is a table of rows (time, stage, microbatch, op, chunk). With v chunks a device holds v pieces of the model:
chunk c of stage s is piece c*p + s, so that a microbatch goes round the devices v times (virtual stages). What is
said of a table here (its order) is what the executor runs; how long it takes is said by `parallel/timeline.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from shardtrain.errors import ConfigError, suggestion

FORWARD, BACKWARD = "forward", "backward"
INPUT, WEIGHT = "backward-input", "backward-weight"
OPS = (FORWARD, BACKWARD, INPUT, WEIGHT)
NAMES = ("gpipe", "1f1b", "interleaved:V", "zb")


class Row(NamedTuple):
    """At `time` (any increasing count), `stage` does `op` of `microbatch` on its piece `chunk` of the model."""

    time: int
    stage: int
    microbatch: int
    op: str
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table that has been checked: `rows` of `stages` x `microbatches` x `chunks`."""

    name: str
    stages: int
    microbatches: int
    chunks: int
    rows: tuple[Row, ...]

    @property
    def pieces(self) -> int:
        """Of the model: stages x chunks."""
        return self.stages * self.chunks

    @property
    def orders(self) -> tuple[tuple[Row, ...], ...]:
        """Stage -> what it does, one after the other."""
        lists: list[list[Row]] = [[] for _ in range(self.stages)]
        for row in sorted(self.rows):
            lists[row.stage].append(row)
        return tuple(map(tuple, lists))

    @property
    def splits(self) -> bool:
        """Whether backwards of inputs and of weights are apart somewhere."""
        return any(row.op == INPUT for row in self.rows)

    def piece(self, row: Row) -> int:
        """Which piece of the model a row is about."""
        return row.chunk * self.stages + row.stage

    def needs(self, row: Row) -> list[tuple[str, int, int]]:
        """What has to be done before a row, each as (op, piece, microbatch)."""
        piece, i = self.piece(row), row.microbatch
        if row.op == FORWARD:
            return [(FORWARD, piece - 1, i)] if piece else []
        if row.op == WEIGHT:
            return [(INPUT, piece, i)]
        after = [(INPUT, piece + 1, i)] if piece + 1 < self.pieces else []
        return [(FORWARD, piece, i), *after]

    def does(self, row: Row) -> tuple[str, int, int]:
        """What a row gives to others: a whole backward gives the gradient of its input, as its first half does."""
        return (INPUT if row.op == BACKWARD else row.op, self.piece(row), row.microbatch)

    def in_flight(self) -> list[int]:
        """Stage -> most microbatches (of any chunk) whose input it keeps for a backward at one time."""
        peaks = []
        for order in self.orders:
            held = peak = 0
            for row in order:
                held += {FORWARD: 1, INPUT: 0}.get(row.op, -1)
                peak = max(peak, held)
            peaks.append(peak)
        return peaks

    def link_bytes(self, activation: float) -> dict[tuple[int, int], float]:
        """(from, to) -> bytes of a step, for `activation` bytes between two pieces for one microbatch.

        2 m v a for the two directions of a boundary; between the last stage and the first one chunk less.
        """
        sent: dict[tuple[int, int], float] = {}
        p = self.stages
        for piece in range(self.pieces - 1):
            for link in ((piece % p, (piece + 1) % p), ((piece + 1) % p, piece % p)):
                sent[link] = sent.get(link, 0.0) + self.microbatches * activation
        return sent


@functools.lru_cache(maxsize=256)
def named(name: str, stages: int, microbatches: int) -> Schedule:
    """The schedule of that name: `gpipe`, `1f1b`, `interleaved:V` (V pieces of the model on each device), `zb`.

    Raises:
        ConfigError: no such name, or sizes that it cannot have.
    """
    kind, colon, count = name.partition(":")
    if kind == "interleaved" and count.isdigit() and int(count) > 0:
        return interleaved(stages, microbatches, int(count))
    if kind in MAKERS and not colon:
        return MAKERS[kind](stages, microbatches)
    raise ConfigError(
        f"'{name}' is none",
        where="schedule",
        fix=suggestion(name, NAMES, "a table of rows (time, stage, microbatch, op, chunk)"),
    )


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards; every stage keeps all m inputs. Bubble (p-1)/(m+p-1).

    Source: Huang et al., GPipe (arXiv 1811.06965).
    """
    todo = [
        [(FORWARD, i, 0) for i in range(microbatches)] + [(BACKWARD, i, 0) for i in range(microbatches)]
        for _ in range(stages)
    ]
    return _placed("gpipe", stages, microbatches, 1, todo)


def one_f_one_b(stages: int, microbatches: int, *, lockstep: bool = True) -> Schedule:
    """One forward, one backward, in turn; bubble (p-1)/(m+p-1) whatever is kept.

    Args:
        lockstep: stage s runs 2(p-1-s) forwards ahead and keeps one input more than that, at most 2p-1. A program
            in which results arrive with the next tick needs so many to be without further bubbles. False: the textbook's
            p-1-s ahead, p inputs, for machines where each stage runs on its own.

    Source: Narayanan et al., PipeDream-Flush (arXiv 2006.09503).
    """
    ahead = [(2 if lockstep else 1) * (stages - 1 - s) for s in range(stages)]
    todo = [
        _alternate([(i, 0) for i in range(microbatches)], [(i, 0) for i in range(microbatches)], n)
        for n in ahead
    ]
    return _placed("1f1b" if lockstep else "1f1b-textbook", stages, microbatches, 1, todo)


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B with `chunks` pieces of the model per device: bubble (p-1)/(vm+p-1), v times the bytes between stages.

    Keeps at most 2(p-1) + (v-1)p + 1 inputs. The microbatches go in blocks of p, each through all chunks.

    Raises:
        ConfigError: the microbatches are not a multiple of the stages.

    Source: Narayanan et al. (arXiv 2104.04473), section 2.2.
    """
    p, m, v = stages, microbatches, chunks
    if v > 1 and m % p:
        raise ConfigError(
            f"{m} microbatches are not divisible by {p} stages",
            where=f"schedule interleaved:{v}",
            why="microbatches go round the devices in blocks of as many as there are stages",
            fix=f"microbatches={-(-m // p) * p}, or schedule='1f1b'",
        )
    blocks = [range(start, min(start + p, m)) for start in range(0, m, p)]
    forwards = [(i, c) for block in blocks for c in range(v) for i in block]
    backwards = [(i, c) for block in blocks for c in reversed(range(v)) for i in block]
    todo = [_alternate(forwards, backwards, (v - 1) * p + 2 * (p - 1 - s)) for s in range(p)]
    return _placed(f"interleaved:{v}", p, m, v, todo)


def zero_bubble(stages: int, microbatches: int, *, lockstep: bool = True) -> Schedule:
    """ZB-H1: the backward in two, for inputs and for weights; the weights' halves fill the bubble at the end.

    Bubble time (p-1)(tf + tb_input - tb_weight) on stages that run on their own (`lockstep=False`): a third of 1F1B's
    where the three take the same time. As many inputs are kept as by 1F1B. `lockstep` as in `one_f_one_b`.

    Source: Qi et al., Zero bubble pipeline parallelism (arXiv 2401.10241), section 3.
    """
    p, m = stages, microbatches
    todo = []
    for s in range(p):
        order: list[tuple[str, int, int]] = []
        done = dict.fromkeys(OPS, 0)

        def add(op: str, order: list[Any] = order, done: dict[str, int] = done) -> None:
            if done[op] < m:
                order.append((op, done[op], 0))
                done[op] += 1

        for _ in range(min(m, (2 if lockstep else 1) * (p - 1 - s))):
            add(FORWARD)
        for i in range(m):
            add(FORWARD)
            add(INPUT)
            if i >= s:  # stage s owes s of them: what the backwards need to get from here to stage 0
                add(WEIGHT)
        while done[WEIGHT] < m:
            add(WEIGHT)
        todo.append(order)
    return _placed("zb" if lockstep else "zb-textbook", p, m, 1, todo)


MAKERS = {"gpipe": gpipe, "1f1b": one_f_one_b, "zb": zero_bubble}


def _alternate(
    forwards: Sequence[tuple[int, int]], backwards: Sequence[tuple[int, int]], ahead: int
) -> list[tuple[str, int, int]]:
    """`ahead` forwards, then one of each in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    order = [(FORWARD, *f) for f in forwards[:ahead]]
    for index, backward in enumerate(backwards):
        order += [(FORWARD, *f) for f in forwards[ahead + index : ahead + index + 1]]
        order.append((BACKWARD, *backward))
    return order


def _placed(
    name: str, stages: int, microbatches: int, chunks: int, todo: Sequence[Sequence[tuple[str, int, int]]]
) -> Schedule:
    """A schedule from what each stage does in turn: every op takes one unit of time and starts as soon as it can."""
    for what, count in (("stages", stages), ("microbatches", microbatches)):
        if count < 1:
            raise ConfigError(f"{count}", where=f"schedule {name}: {what}", fix="1 or more")
    empty = Schedule(name, stages, microbatches, chunks, ())
    next_of, done, rows, time = [0] * stages, set(), [], 0
    while any(n < len(order) for n, order in zip(next_of, todo, strict=True)):
        now = []
        for s, order in enumerate(todo):
            if next_of[s] < len(order):
                op, microbatch, chunk = order[next_of[s]]
                row = Row(time, s, microbatch, op, chunk)
                if all(need in done for need in empty.needs(row)):
                    now.append(row)
        assert now, f"{name} waits for itself at {time}"
        for row in now:
            next_of[row.stage] += 1
            done.add(empty.does(row))
        rows += now
        time += 1
    return dataclasses.replace(empty, rows=tuple(rows))


def table(rows: Iterable[Any], stages: int, microbatches: int, name: str = "table") -> Schedule:
    """A schedule of the user's own, checked.

    Args:
        rows: (time, stage, microbatch, op[, chunk]) each; op is forward, backward, or backward-input and
            backward-weight apart. Chunks are counted from 0, as are all others.

    Raises:
        ConfigError: an unknown op, a number out of range, two ops of a stage at one time, something that is missing or
            done twice, or done before what it needs.
    """
    found = sorted(Row(*row) for row in rows)
    for row in found:
        _check_row(row, stages, microbatches)
    chunks = 1 + max((row.chunk for row in found), default=0)
    schedule = Schedule(name, stages, microbatches, chunks, tuple(found))
    _check_complete(schedule)
    _check_order(schedule)
    return schedule


def _check_row(row: Row, stages: int, microbatches: int) -> None:
    if row.op not in OPS:
        raise ConfigError(
            f"op '{row.op}'",
            where=f"schedule, {tuple(row)}",
            fix=suggestion(str(row.op), OPS, "one of these"),
        )
    for what, value, count in (("stage", row.stage, stages), ("microbatch", row.microbatch, microbatches)):
        if not 0 <= value < count:
            raise ConfigError(
                f"{what} {value} of {count}",
                where=f"schedule, {tuple(row)}",
                why=f"the mesh and the groups give {stages} stages and {microbatches} microbatches per batch shard",
                fix=f"{what}s from 0 to {count - 1}",
            )
    if row.time < 0 or row.chunk < 0:
        raise ConfigError("a time or chunk below 0", where=f"schedule, {tuple(row)}", fix="count from 0")


def _check_complete(schedule: Schedule) -> None:
    """Every piece runs every microbatch forward once and backward once, in one op or in two; one op at a time."""
    at_once = collections.Counter((row.time, row.stage) for row in schedule.rows)
    for (time, stage), count in at_once.items():
        if count > 1:
            raise ConfigError(
                f"stage {stage} has {count} ops at time {time}",
                where="schedule",
                why="a stage does one thing at a time",
                fix="another time for each",
            )
    times = collections.Counter((row.stage, row.chunk, row.microbatch, row.op) for row in schedule.rows)
    for stage in range(schedule.stages):
        for chunk in range(schedule.chunks):
            for i in range(schedule.microbatches):
                f, b, x, w = (times[stage, chunk, i, op] for op in OPS)
                if f == 1 and (b, x, w) in ((1, 0, 0), (0, 1, 1)):
                    continue
                raise ConfigError(
                    f"stage {stage} runs microbatch {i} {f} times forward, {b} times backward, "
                    f"{x} times backward-input and {w} times backward-weight",
                    where="schedule" if schedule.chunks == 1 else f"schedule, chunk {chunk}",
                    why=f"each of {schedule.stages} stages x {schedule.chunks} chunks has to run each of "
                    f"{schedule.microbatches} microbatches forward once and backward once",
                    fix="one forward, and one backward or one backward-input and one backward-weight",
                )


def _check_order(schedule: Schedule) -> None:
    """Everything comes after what it needs."""
    when = {schedule.does(row): row for row in schedule.rows}
    for row in schedule.rows:
        for need in schedule.needs(row):
            before = when[need]
            if before.time >= row.time:
                raise ConfigError(
                    f"{row.op} of microbatch {row.microbatch} on stage {row.stage} at time {row.time} needs "
                    f"{before.op} on stage {before.stage}, which is at time {before.time}",
                    where="schedule",
                    why="a result can be used from the next time on",
                    fix=f"time {before.time + 1} or later for the first",
                )
