"""Who is stuck: a pure function of beats and times, so every case is a line."""

import dataclasses
import itertools

import pytest

from shardtrain.errors import ConfigError
from shardtrain.watch import Beat, Seen, parse_silence, verdict
from shardtrain.watch.beats import ALIVE, FIRST, FLOORS, PHASES, budget_of

NOW = 1000.0


def seen(process, phase, step=812, seconds=0.0, silent=0.0, budget=15.0, dispatched=None):
    budget = None if phase == "end" else budget
    beat = Beat(process, 1, phase, step, seconds, budget, step if dispatched is None else dispatched)
    return Seen(beat, NOW - silent)


def blamed(*found):
    judged = verdict(found, NOW)
    return None if judged is None else judged.processes


def test_the_issues_own_sentence():
    found = [seen(p, "wait", 811, 16.0, dispatched=812) for p in (0, 1, 2)]
    told = verdict([*found, seen(3, "data", 812, 16.0, dispatched=811)], NOW)
    assert told.processes == (3,)
    assert told.text == (
        "process 3 has been loading data at step 812 for 16 s; the others are waiting for step 811's metrics"
    )


@pytest.mark.parametrize("phase", [p for p in PHASES if p not in ("end", "wait")])
def test_own_work_over_its_budget(phase):
    """Blamed one second past the budget, and not one before. Failed once with >= turned round."""
    waiting = seen(0, "wait", seconds=100.0)
    assert blamed(waiting, seen(1, phase, seconds=15.5)) == (1,)
    assert blamed(waiting, seen(1, phase, seconds=14.5)) is None


def test_waiting_is_no_fault_while_another_works():
    """However long. Failed once with every overdue process blamed: a compile on one host would end the others."""
    for phase in ("start", "compile", "restore", "evaluate", "save", "data", "dispatch", "hooks"):
        assert blamed(seen(0, "wait", seconds=1e6), seen(1, phase, seconds=60.0, budget=300.0)) is None


def test_all_wait():
    """The one that dispatched least is to blame; alike, nobody is, but it is noticed. Within the budget: nothing."""
    assert blamed(seen(0, "wait", seconds=16), seen(1, "wait", seconds=16)) == ()
    assert blamed(seen(0, "wait", seconds=16), seen(1, "wait", seconds=16, dispatched=811)) == (1,)
    assert blamed(seen(0, "wait", seconds=16), seen(1, "wait", seconds=14)) is None
    assert verdict([seen(0, "wait", seconds=16)], NOW).text.startswith("process 0 waits for step 812")


def test_silence():
    """No beat for `alive` seconds outdoes everything else, in any phase, also under its budget."""
    for phase in FLOORS:
        assert blamed(seen(0, "data", seconds=99.0), seen(1, phase, silent=ALIVE + 1, budget=1e6)) == (1,)
        assert blamed(seen(1, phase, silent=ALIVE - 1, budget=1e6)) is None
    assert verdict([seen(0, "data", silent=1e6, budget=None)], NOW, 0.0) is None  # failed once: 0 blamed all
    told = verdict([seen(0, "wait"), seen(1, "save", silent=20.0, budget=300.0)], NOW).text
    assert told.startswith("process 1 has given no sign of life for 20 s, last seen saving at step 812")


def test_silent_seconds_count():
    """A beat of some seconds ago: the phase has gone on since. Failed once with the seconds of the beat alone."""
    assert blamed(seen(0, "data", seconds=10.0, silent=6.0)) == (0,)


def test_who_is_done_is_not_judged():
    assert blamed(seen(0, "end", seconds=1e6, silent=1e6)) is None
    assert blamed(seen(0, "end", silent=1e6), seen(1, "wait", seconds=16.0)) == ()


def test_furthest_behind_is_blamed():
    """Two over their budgets: the rest wait for the one at the earlier step. Failed once with both blamed."""
    assert blamed(seen(0, "save", 813, 20.0), seen(1, "data", 813, 16.0, dispatched=811)) == (1,)
    assert blamed(seen(0, "data", 812, 20.0), seen(1, "data", 812, 16.0)) == (0, 1)


def test_every_pair_of_states():
    """Over all phases and ages of two processes: an alarm exactly where the rules say."""
    states = list(itertools.product(PHASES, (0.0, 16.0), (0.0, 16.0)))
    for one, two in itertools.product(states, states):
        found = [seen(i, phase, seconds=s, silent=q) for i, (phase, s, q) in enumerate((one, two))]
        live = [f for f in found if f.beat.phase != "end"]
        late = [f.idle(NOW) > 15.0 for f in live]
        alone = [f.beat.phase != "wait" for f in live]
        silent = {f.beat.process for f in live if f.silent(NOW) > ALIVE}
        own = {f.beat.process for f, a, b in zip(live, late, alone, strict=True) if a and b}
        expected = silent or own or (set() if live and all(late) and not any(alone) else None)
        got = blamed(*found)
        assert (None if got is None else set(got)) == expected, (one, two)


def test_budgets():
    """Configured wins, 0 is any; else twenty medians, at least the floor, and a minute until three were seen."""
    assert budget_of("data", [], {}) == FIRST and budget_of("save", [], {}) == FLOORS["save"]
    assert budget_of("data", [0.1] * 3, {}) == FLOORS["data"]
    assert budget_of("data", [0.1, 2.0, 2.0, 90.0], {}) == 40.0
    assert budget_of("data", [9.0] * 9, {"data": 3.0}) == 3.0
    assert budget_of("data", [], {"data": 0.0}) is None and budget_of("end", [], {}) is None


def test_long_phases_of_a_minute_raise_no_alarm():
    """By the defaults, also when all before took a moment. Failed once with a floor of 30 s for saves."""
    for phase, times in itertools.product(
        ("start", "compile", "restore", "evaluate", "save"), ([], [0.01] * 9)
    ):
        budget = budget_of(phase, times, {})
        assert blamed(seen(0, phase, seconds=60.5, budget=budget), seen(1, "wait", seconds=60.5)) is None


def test_silence_grammar():
    assert parse_silence("") == {}
    assert parse_silence("data=60, alive=1.5,save=0") == {"data": 60.0, "alive": 1.5, "save": 0.0}
    for wrong in ("date=6", "data", "data=", "data=-1", "data=inf", "end=3"):
        with pytest.raises(ConfigError, match="--silence"):
            parse_silence(wrong)


def test_a_beat_survives_its_text():
    beat = Beat(3, 7, "data", 812, 1.5, 15.0, 811, "abc", "runs/x", {"data": 0.5})
    assert Beat.of(beat.text()) == beat
    assert Beat.of(beat.text()[:-3]) is None and Beat.of('{"odd": 1}') is None and Beat.of("[]") is None
    assert dataclasses.replace(beat, serial=8) != beat
