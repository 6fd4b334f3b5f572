"""Schedules: every table is whole and in order, and takes the time that its source says."""

import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from shardtrain.errors import ConfigError
from shardtrain.parallel import schedules
from shardtrain.parallel import ticks as columns
from shardtrain.parallel.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Row, table
from shardtrain.parallel.stages import Deal
from shardtrain.parallel.ticks import forward_only, lower
from shardtrain.parallel.timeline import Costs, realise, simulate

SIZES = [(p, m) for p in (2, 3, 4, 8) for m in (1, 2, p, 2 * p, 4 * p + (p > 2))]
NAMES = ["gpipe", "1f1b", "interleaved:2", "interleaved:3", "zb"]


def made(name, p, m):
    return schedules.named(name, p, m if not name.startswith("interleaved") else -(-m // p) * p)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_a_table_that_we_would_take(name):
    """Whole, in order, one op of a stage at a time. Failed once with a warm-up longer than the microbatches."""
    for p, m in SIZES:
        schedule = made(name, p, m)
        again = table(schedule.rows, p, schedule.microbatches)
        assert (
            again.chunks == schedule.chunks
            and len(again.rows) >= 2 * p * schedule.microbatches * schedule.chunks
        )
    for p, m in SIZES:
        for textbook in (schedules.one_f_one_b, schedules.zero_bubble):
            table(textbook(p, m, lockstep=False).rows, p, m)


@pytest.mark.parametrize(("forward", "half"), [(1.0, 1.0), (1.0, 1.5), (2.0, 1.0)])
def test_bubbles_are_the_closed_forms(forward, half):
    """(p-1)/(vm+p-1), whatever the costs, where there are at least as many microbatches as stages.

    The fault in mind: a forward too few ahead, which shows as (p-1)/m more.
    """
    costs = Costs(forward, half, half)
    for p, m in SIZES:
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved:2", 2), ("interleaved:3", 3)):
            schedule = made(name, p, m)
            m_, closed = schedule.microbatches, (p - 1) / (v * schedule.microbatches + p - 1)
            if m_ >= p:
                assert simulate(schedule, costs).bubble == pytest.approx(closed)
                # Our program takes what it promises: the same, of a backward that runs the forward again.
                assert realise(schedule, costs).bubble == pytest.approx(closed)
        if m >= p:
            textbook = schedules.one_f_one_b(p, m, lockstep=False)
            assert simulate(textbook, costs).bubble == pytest.approx((p - 1) / (m + p - 1))


def test_zero_bubble_is_a_third_of_1f1b():
    """(p-1)(tf + tb_input - tb_weight) of bubble time; with equal times a third. The fault in mind: a debt of s+1."""
    for p, m in SIZES:
        if m < 2 * p:
            continue
        for lockstep in (True, False):
            schedule = schedules.zero_bubble(p, m, lockstep=lockstep)
            assert simulate(schedule).bubble == pytest.approx((p - 1) / (3 * m + p - 1))
        time = simulate(schedules.named("1f1b", p, m))
        assert (simulate(schedule).total - 3 * m) * 3 == pytest.approx(time.total - 3 * m)
        # What our program does not keep it has to make again: there it is no gain, and we say so.
        assert realise(schedules.named("zb", p, m)).total > realise(schedules.named("1f1b", p, m)).total


def test_what_is_kept():
    """GPipe keeps m inputs, 1F1B 2p-1 in step and p on its own, ZB-H1 as many. The fault in mind: GPipe for all."""
    for p, m in SIZES:
        if m < 2 * p:
            continue
        assert max(schedules.gpipe(p, m).in_flight()) == lower(schedules.gpipe(p, m)).inputs == m
        for make in (schedules.one_f_one_b, schedules.zero_bubble):
            assert max(make(p, m, lockstep=False).in_flight()) == p
            assert max(make(p, m).in_flight()) == lower(make(p, m)).inputs == 2 * p - 1
        assert lower(schedules.named("1f1b", p, m)).gradients == 1
        interleaved = schedules.interleaved(p, 2 * p, 2)
        assert max(interleaved.in_flight()) == min(4 * p, 2 * (p - 1) + p + 1)
        assert lower(interleaved).inputs == max(interleaved.in_flight())


def test_bytes_of_a_link():
    """2 m v a over a boundary, both ways; round the end v-1. The fault in mind: once per chunk too many."""
    assert schedules.gpipe(2, 4).link_bytes(10) == {(0, 1): 40, (1, 0): 40}
    sent = schedules.interleaved(4, 8, 2).link_bytes(1.0)
    assert sent == {
        **{(s, s + 1): 16 for s in range(3)},
        **{(s + 1, s): 16 for s in range(3)},
        (3, 0): 8,
        (0, 3): 8,
    }


@pytest.mark.parametrize("name", [*NAMES, "textbook"])
def test_the_program_reads_what_was_written(name):
    """The table of ticks, run with integers: each op finds the input and the gradient of its own microbatch in its buffers.

    The fault in mind: a buffer given away one tick too early.
    """
    for p, m in SIZES[:16]:
        schedule = schedules.one_f_one_b(p, m, lockstep=False) if name == "textbook" else made(name, p, m)
        v, ticks = schedule.chunks, lower(schedule)
        inputs, gradients = np.full((p, ticks.inputs), -1), np.full((p, ticks.gradients), -1)
        tag = lambda piece, i: piece * 1000 + i
        done = []
        for t, _ in enumerate(ticks.rows):
            sent: list[tuple] = []
            for s in range(p):
                row = ticks.table[t, s]
                if row[columns.F_CHUNK] >= 0:
                    piece, i = row[columns.F_CHUNK] * p + s, row[columns.F_BATCH]
                    if piece == 0:
                        inputs[s, row[columns.F_INPUT]] = tag(0, i)
                    assert inputs[s, row[columns.F_INPUT]] == tag(piece, i)
                    sent.append(
                        (inputs, (s + 1) % p, columns.GET_INPUT, tag(piece + 1, i), piece + 1 < p * v)
                    )
                    done.append((FORWARD, piece, i))
                if row[columns.B_CHUNK] >= 0:
                    piece, i = row[columns.B_CHUNK] * p + s, row[columns.B_BATCH]
                    if piece + 1 == p * v:
                        gradients[s, row[columns.B_GRADIENT]] = tag(piece, i)
                    assert inputs[s, row[columns.B_INPUT]] == tag(piece, i)
                    assert gradients[s, row[columns.B_GRADIENT]] == tag(piece, i)
                    sent.append((gradients, (s - 1) % p, columns.GET_GRADIENT, tag(piece - 1, i), piece > 0))
                    done.append((BACKWARD, piece, i))
                if row[columns.W_CHUNK] >= 0:
                    piece, i = row[columns.W_CHUNK] * p + s, row[columns.W_BATCH]
                    assert inputs[s, row[columns.W_INPUT]] == tag(piece, i)
                    assert gradients[s, row[columns.W_GRADIENT]] == tag(piece, i)
                    done.append((WEIGHT, piece, i))
            for buffer, to, column, value, wanted in sent:
                slot = ticks.table[t, to, column]
                assert (slot >= 0) == wanted
                if wanted:
                    buffer[to, slot] = value
        ops = [FORWARD, BACKWARD, *([WEIGHT] if schedule.splits else [])]
        assert sorted(done) == sorted(itertools.product(ops, range(p * v), range(schedule.microbatches)))
        phases = ticks.phases
        assert phases[0][0] == 0 and phases[-1][1] == len(ticks.rows) and len(phases) <= 3


def test_forwards_alone():
    """For evaluation: m v + p - 1 ticks, one buffer is enough for each chunk that waits. The fault in mind: backwards too."""
    ticks = forward_only(schedules.gpipe(4, 8))
    assert len(ticks.rows) == 11 and ticks.inputs == 1 and ticks.phases == ((0, 11, True, False),)
    assert (ticks.table[:, :, columns.B_CHUNK] == -1).all()


GOOD = schedules.gpipe(2, 2).rows


def changed(rows, old, **new):
    return [row._replace(**new) if row == old else row for row in rows]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([r for r in GOOD if r.stage == 0], "stage 1 runs microbatch 0 0 times forward"),
        (
            [r for r in GOOD if (r.stage, r.microbatch, r.op) != (1, 1, BACKWARD)],
            "microbatch 1 1 times forward, 0 times",
        ),
        ([*GOOD, Row(99, 0, 1, FORWARD)], "microbatch 1 2 times forward"),
        (changed(GOOD, Row(1, 1, 0, FORWARD), time=0), "needs forward on stage 0, which is at time 0"),
        (changed(GOOD, GOOD[-1], time=1), "stage 0 has 2 ops at time 1"),
        ([*GOOD[:-1], Row(90, 0, 1, INPUT)], "1 times backward-input and 0 times backward-weight"),
        ([*GOOD, Row(99, 2, 0, FORWARD)], "stage 2 of 2"),
        ([*GOOD, Row(99, 0, 7, FORWARD)], "microbatch 7 of 2"),
        ([*GOOD, Row(99, 0, 0, "forwards")], "op 'forwards'"),
    ],
)
def test_a_wrong_table_is_refused(rows, said):
    """Each a planted fault: a stage skipped, something missing, twice, too early, at once, by halves, out of range."""
    with pytest.raises(ConfigError, match=said) as error:
        table(rows, 2, 2)
    assert error.value.fix


def test_names():
    """The fault in mind: `interleaved:0`."""
    for name in ("1f1", "interleaved:0", "interleaved:x", "gpipe:2"):
        with pytest.raises(ConfigError, match="is none"):
            schedules.named(name, 2, 4)
    with pytest.raises(ConfigError, match="6 microbatches are not divisible by 4 stages") as error:
        schedules.named("interleaved:2", 4, 6)
    assert "microbatches=8" in error.value.fix


def test_pictures():
    """Text and SVG have a mark for every op. The fault in mind: a picture without its last stage."""
    for timeline in (simulate(schedules.named("zb", 4, 8)), realise(schedules.named("interleaved:2", 4, 8))):
        drawn = ET.fromstring(timeline.svg())
        titles = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
        assert len(titles) == len(timeline.spans)
        lines = str(timeline).splitlines()
        assert (
            len(lines) == 5 and "bubble" in lines[0] and {len(line) for line in lines[1:]} == {len(lines[1])}
        )
    drawn = str(simulate(schedules.gpipe(2, 2))).splitlines()
    assert drawn[1:] == ["stage 0  01...aabb", "stage 1  .01aabb.."]


@pytest.mark.parametrize(
    ("layers", "p", "v"), [(8, 4, 2), (24, 4, 3), (16, 8, 2), (12, 2, 3), (6, 4, 1), (7, 2, 2)]
)
def test_layers_are_dealt_once(layers, p, v):
    """Every layer is in one piece, in order, pieces differ by one at most; rounds are one piece from and to every stage."""
    deal = Deal(layers, p, v)
    pieces = [[int(n) for n in deal.places[q % p, q // p] if n >= 0] for q in range(p * v)]
    assert [*itertools.chain(*pieces)] == list(range(layers))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    if deal.equal:
        assert sorted(itertools.chain(*deal.rounds)) == list(range(p * v))
        for moved in deal.rounds:
            assert sorted(q // v for q in moved) == sorted(q % p for q in moved) == list(range(p))
