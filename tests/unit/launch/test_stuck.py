"""The launcher and processes that end never: stopped, or stuck. They beat as training does, without JAX."""

import signal
import sys

import pytest

from shardtrain.errors import RunError
from shardtrain.launch import local

LOOP = """
import os, pathlib, signal, sys, time
from shardtrain.watch import Watch
me, attempt = int(os.environ['JAX_PROCESS_ID']), int(os.environ['SHARDTRAIN_ATTEMPT'])
run = pathlib.Path(sys.argv[1])
def stuck_here(fault):
    while fault == 'hang':
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGSTOP)
with Watch(me, run, environment=os.environ) as watch:
    watch.program = 'abc'
    for step in range(1, 9):
        watch.phase('data', step)
        time.sleep(0.02)
        if attempt == 0 and me == 1 and step == 6:
            stuck_here(sys.argv[2])
        watch.phase('dispatch', step)
        watch.phase('wait', step)
        while attempt == 0 and step == 6:
            time.sleep(0.1)
"""


@pytest.fixture
def stuck(tmp_path, monkeypatch):
    """Process 1 of two is stuck at step 6 of the first attempt: what the launcher says, and what was kept."""
    monkeypatch.setattr(local, "_DELAYS", (0.0,))

    def run(fault, silence, **options):
        lines = []
        command = (sys.executable, "-c", LOOP, str(tmp_path), fault)
        asked = local.Local(command, 2, silence=silence, **options)
        found = local.launch(asked, lines.append)
        return found, lines, [(tmp_path / "stuck" / f"process-{p}.txt").read_text() for p in (0, 1)]

    return run


def test_stuck_in_python(stuck):
    """Alive, and its thread beats; still it is named, with its stack, and all start again.

    Failed once with beats of the thread counted as progress: nobody was ever stuck.
    """
    found, lines, kept = stuck("hang", "data=1,wait=1")
    assert found["exit"] == 0 and found["restarts"] == 1
    end = found["attempts"][0]["end"]
    assert end.startswith("process 1 has been loading data at step 6 for ")
    assert end.endswith("the other is waiting for step 6's metrics")
    assert any(end in line for line in lines)
    assert "stuck_here" in kept[1] and "stuck_here" not in kept[0]
    assert "last dispatched step 5; program abc" in kept[1] and "last dispatched step 6" in kept[0]


def test_stopped(stuck):
    """SIGSTOP: no sign of life. It writes its stack too, once continued, right before its end."""
    # longer than a busy machine keeps a process from its first steps
    found, _, kept = stuck("stop", "alive=5")
    assert found["exit"] == 0
    assert "process 1 has given no sign of life" in found["attempts"][0]["end"]
    assert "stopped by a signal" in kept[1] and "stuck_here" in kept[1]


def test_restarts_used_up(stuck):
    with pytest.raises(RunError, match="process 1 has been loading data at step 6"):
        stuck("hang", "data=1,wait=1", max_restarts=0)


def test_stopped_before_the_first_beat(tmp_path, monkeypatch):
    """Nothing is known of it but that the kernel has stopped it. The fault in mind: beats alone are looked at."""
    monkeypatch.setattr(local, "_DELAYS", (0.0,))
    code = (
        f"import os; os.environ['SHARDTRAIN_ATTEMPT'] == '1' or os.kill(os.getpid(), {int(signal.SIGSTOP)})"
    )
    found = local.launch(local.Local((sys.executable, "-c", code), 1, silence="alive=1"), lambda _: None)
    assert found["attempts"][0]["end"] == "process 0 was stopped by a signal before it began"
    assert found["exit"] == 0
