"""One process's watch, the table of all, and judging over a board that hosts share."""

import json
import threading
import time

import pytest

from shardtrain.watch import Beat, Watch, read_goodput, read_table, slow, table_lines, write_table
from shardtrain.watch import watch as module


class Shared:
    """A board in memory, as the coordination service is one."""

    def __init__(self):
        self.texts = {}

    def put(self, process, text):
        self.texts[process] = text

    def all(self):
        return list(self.texts.values())


def test_beats_say_where_it_is(tmp_path):
    """The phase, the last dispatched step, and means without the first step. Failed once: dispatched was one ahead."""
    watch = Watch(1, tmp_path, environment={})
    for step in range(1, 6):
        for phase in ("data", "dispatch"):
            watch.phase(phase, step)
        watch.phase("data", step + 1)
        watch.phase("wait", step - 1)
    beat = watch.beat()
    assert (beat.phase, beat.step, beat.dispatched, beat.serial) == ("wait", 4, 5, 1)
    assert set(beat.means) == {"data", "dispatch", "wait", "hooks", "save"} and beat.run == str(tmp_path)
    watch.phase("dispatch", 6)
    assert watch.beat().dispatched == 5 and watch.beat().serial == 3


def test_a_run_keeps_its_ledger(tmp_path):
    """Written while it runs, and at the end. A watch without a folder writes nothing anywhere."""
    with Watch(0, tmp_path, environment={}) as watch:
        watch.phase("compile", 0)
    assert read_goodput(tmp_path)["attempts"] == 1
    with Watch(0, tmp_path, environment={}, again=True):
        pass
    assert read_goodput(tmp_path)["attempts"] == 2 and {f.name for f in tmp_path.iterdir()} == {
        "goodput.json"
    }


def test_hosts_judge_each_other(tmp_path, monkeypatch, capfd):
    """Process 1 stays in data: both write where they were and leave with 3. Failed once with only process 0 judging."""
    monkeypatch.setattr(module, "EVERY", 0.02)
    monkeypatch.setattr(module, "LAST_WORDS", 0.2)
    board, left = Shared(), {}
    gone = threading.Semaphore(0)

    def leave(process):
        def end(code):
            left.setdefault(process, code)
            gone.release()

        return end

    given = {"SHARDTRAIN_SILENCE": "data=0.3,wait=0.1,alive=5"}
    watches = [Watch(p, tmp_path, service=board, environment=given, leave=leave(p)) for p in (0, 1)]
    for watch in watches:
        watch.program = "abc"
    watches[0].phase("wait", 6)
    watches[1].phase("data", 7)
    for watch in watches:
        watch.__enter__()
    assert all(gone.acquire(timeout=20) for _ in watches)
    assert left == {0: 3, 1: 3}
    told = (
        "stuck: process 1 has been loading data at step 7 for 0 s; the other is waiting for step 6's metrics"
    )
    assert told in capfd.readouterr().err
    for process, phase in ((0, "waiting for step 6's metrics"), (1, "loading data at step 7")):
        text = (tmp_path / "stuck" / f"process-{process}.txt").read_text()
        assert f"process {process}: {phase}" in text and "program abc" in text
        assert "test_hosts_judge_each_other" in text, "the main thread's stack"


class Cut(Shared):
    """A coordinator behind a network that is down: calls raise, or do not come back."""

    def __init__(self, hangs):
        super().__init__()
        self.hangs, self.over = hangs, threading.Event()

    def all(self):
        if self.hangs:
            self.over.wait(30)
        raise RuntimeError("UNAVAILABLE")


@pytest.mark.parametrize("hangs", [False, True])
def test_cut_off_from_the_coordinator(tmp_path, monkeypatch, capfd, hangs):
    """Who gets no answer leaves, says so and keeps where it was. Failed once without `_listens`: it was left to JAX's heartbeat."""
    monkeypatch.setattr(module, "EVERY", 0.02)
    monkeypatch.setattr(module, "LAST_WORDS", 0.0)
    board, left, gone = Cut(hangs), [], threading.Event()

    def leave(code):
        left.append(code)
        gone.set()

    given = {"SHARDTRAIN_SILENCE": "alive=0.6"}
    with Watch(1, tmp_path, service=board, environment=given, leave=leave) as watch:
        watch.phase("wait", 6)
        assert gone.wait(20)
        board.over.set()
    assert left == [3]
    told = "stuck: process 1 is cut off: no answer from the coordinator, process 0, for 0 s"
    assert told in capfd.readouterr().err
    text = (tmp_path / "stuck" / "process-1.txt").read_text()
    assert "is cut off" in text and "waiting for step 6's metrics" in text


def test_an_answer_now_and_then_is_enough(tmp_path, monkeypatch):
    """Nor does `alive=0` judge anybody. Failed once with a count that no answer sets back."""
    monkeypatch.setattr(module, "EVERY", 0.01)
    monkeypatch.setattr(module, "LAST_WORDS", 0.0)
    left = []
    for silence in ("alive=0.3", "alive=0"):
        watch = Watch(0, service=Shared(), environment={"SHARDTRAIN_SILENCE": silence}, leave=left.append)
        with watch:
            watch.phase("wait", 6)
            seen = 0
            while seen < 40:  # twice the bound of the first
                seen = watch.beat().serial
                time.sleep(0.02)
    assert not left


def test_no_judge_where_the_launcher_reads(tmp_path):
    """One opinion, not two. The folder gets beats and a file for stacks."""
    board = Shared()
    with Watch(0, environment={"SHARDTRAIN_BEATS": str(tmp_path)}, service=board):
        end = time.monotonic() + 10
        while not (tmp_path / "process-0.beat").exists() and time.monotonic() < end:
            time.sleep(0.01)
    assert not board.texts and Beat.of((tmp_path / "process-0.beat").read_text()).phase == "end"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((10, 10, 10, 40), 3),  # four times the rest
        ((10, 10, 10, 14), None),  # under 1.5 times
        ((1, 1, 1, 4), None),  # four times, and next to nothing of a step of 100
        ((40, 10), 0),
        ((10,), None),
    ],
)
def test_the_slow_one(own, expected, tmp_path):
    """Steps of 100 ms: who works longer waits less. Failed once with the longest wait as the slow one."""
    rows = {p: {"data": ms / 1000, "wait": 0.1 - ms / 1000} for p, ms in enumerate(own)}
    assert slow(rows) == expected
    write_table(tmp_path, [Beat(p, 1, "wait", 5, 0.0, means=row) for p, row in rows.items()])
    if len(own) > 1:
        assert read_table(tmp_path) == rows
        assert json.loads((tmp_path / "processes.json").read_text())["slow"] == expected
        named = f"process {expected} is slow: {own[expected or 0]:.1f} ms of a step in data"
        assert (table_lines(rows)[-1] == named) == (expected is not None)
