"""Where a run's time went: exact, by a clock that only the test moves."""

import json
import random

from shardtrain.watch import Ledger, goodput_lines, read_goodput
from shardtrain.watch.ledger import PARTS


class Clock:
    """Monotonic and wall clock together."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


def ledger(clock, old=None, **options):
    return Ledger(old, clock=clock, wall=lambda: clock.now + 1e9, **options)


def go(book, clock, *phases):
    for name, step, seconds in phases:
        book.enter(name, step)
        clock.go(seconds)


def parts(book):
    return {name: seconds for name, seconds in book.as_json()["parts"].items() if seconds}


def test_two_attempts():
    """Killed after step 4, resumed from 2: steps 3 and 4 are lost, and the pause is `restart`.

    Failed once without the pause, and once with lost work counted twice.
    """
    clock = Clock()
    first = ledger(clock, age=2.0)
    clock.go(1.0)
    go(first, clock, ("compile", 0, 8.0), ("restore", 0, 0.5))
    for step in (1, 2, 3, 4):
        go(first, clock, ("data", step, 0.25), ("dispatch", step, 0.5), ("wait", step, 1.0))
    go(first, clock, ("save", 4, 4.0), ("evaluate", 4, 3.0))
    assert parts(first) == {
        "start": 3.5, "compile": 8.0, "input": 1.0, "compute": 6.0, "checkpoint": 4.0, "evaluate": 3.0,
    }  # fmt: skip
    kept = json.loads(json.dumps(first.as_json()))
    clock.go(16.0)
    second = ledger(clock, kept, again=True, age=5.0)
    go(second, clock, ("compile", 0, 2.0), ("restore", 0, 1.0))
    second.resumed(2)
    go(second, clock, ("dispatch", 3, 1.5), ("dispatch", 4, 1.5), ("end", 4, 0.0))
    found = second.as_json()
    assert parts(second) == {
        "start": 3.5, "compile": 10.0, "input": 1.0, "compute": 6.0, "checkpoint": 4.0, "evaluate": 3.0,
        "restart": 17.0, "lost": 3.0,
    }  # fmt: skip
    assert found["wall_seconds"] == clock.now - 100.0 + 2.0 == 47.5
    assert found["attempts"] == 2 and found["goodput"] == 9.0 / 47.5


def test_resumed_by_hand():
    """A run that nobody restarted was not running in between. Failed once with the night counted."""
    clock = Clock()
    kept = ledger(clock).as_json()
    clock.go(36000.0)
    second = ledger(clock, kept, again=False, age=5.0)
    assert parts(second) == {"restart": 5.0}


def test_hidden_time_is_compute():
    """Data that was loaded beside the devices' work cost nothing. Failed once without."""
    clock = Clock()
    book = ledger(clock)
    go(book, clock, ("data", 1, 2.0))
    book.enter("dispatch", 1, hidden=True)
    go(book, clock, ("data", 2, 3.0))
    book.enter("dispatch", 2)
    assert parts(book) == {"compute": 2.0, "input": 3.0}


def test_parts_sum_to_the_wall():
    """Whatever happens in whatever order: attempts, resumes, pauses. The fault in mind: time between two phases."""
    chance = random.Random(0)
    clock, begun, book = Clock(), 100.0, None
    for _ in range(50):
        book = ledger(clock, None if book is None else json.loads(json.dumps(book.as_json())), again=True)
        for _ in range(200):
            name = chance.choice(("start", "compile", "restore", "data", "dispatch", "wait", "save", "hooks"))
            book.enter(name, chance.randrange(1, 3000), hidden=chance.random() < 0.5)
            clock.go(chance.random())
            if chance.random() < 0.02:
                book.resumed(chance.randrange(3000))
        book.as_json()
        clock.go(chance.random() * 10)
    found = book.as_json()
    assert abs(sum(found["parts"].values()) - (clock.now - begun)) < 1e-6
    assert min(found["parts"].values()) >= 0.0 and set(found["parts"]) == set(PARTS)


def test_file(tmp_path):
    """A file cut off counts as none."""
    clock = Clock()
    book = ledger(clock)
    go(book, clock, ("compile", 0, 1.0), ("wait", 1, 3.0), ("end", 1, 0.0))
    book.write(tmp_path)
    assert read_goodput(tmp_path)["goodput"] == 0.75
    assert goodput_lines(read_goodput(tmp_path)) == "goodput 75.0% of 4.0 s (compute 3.0 s, compile 1.0 s)"
    (tmp_path / "goodput.json").write_text((tmp_path / "goodput.json").read_text()[:40])
    assert read_goodput(tmp_path) == {} == read_goodput(tmp_path / "nowhere")
