"""Processes that wait for a restart: what they become, and that none is left behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from shardtrain.launch import child, spares

CONFIG = """
import json, os, sys
def told():
    print(json.dumps({"environment": dict(os.environ), "stdin": sys.stdin.read(), "argv": sys.argv, "path": sys.path[0],
                      "main": sys.modules["__main__"].__spec__.name, "jax": "jax" in sys.modules}), flush=True)
    os._exit(5)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "asked.py").write_text(CONFIG)
    return (sys.executable, "-m", "shardtrain", "train", f"{tmp_path / 'asked.py'}:told", "--steps", "3")


def gone(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def name(pid):
    return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()


def test_it_becomes_what_a_start_would_be(command):
    """The same process, the variables of the moment, nothing on stdin, the module's own `__main__`, its exit code.

    Failed once with stdin left open: it read the launcher's JSON to its end and no more, but a prompt would have waited.
    """
    waited = {"JAX_PROCESS_ID": "1", "SHARDTRAIN_ATTEMPT": "0"}
    with spares.Spares() as waiting:
        waiting.fill([(("x",), {}), (command, waited)])
        pid = waiting._waiting[1].pid
        assert until(lambda: name(pid) == child.WAITING)
        assert waiting.take(0, command, waited) is None
        popen = waiting.take(1, command, {**waited, "SHARDTRAIN_ATTEMPT": "7"})
        assert popen is not None and popen.pid == pid and os.getpgid(pid) == pid
        out, err = popen.communicate(timeout=60)
    assert popen.returncode == 5, err
    spare = json.loads(out)
    cold = spares.start(command, {**waited, "SHARDTRAIN_ATTEMPT": "7"})
    start = json.loads(cold.communicate(timeout=60)[0])
    assert float(spare["environment"].pop("SHARDTRAIN_WAITED")) > 0
    assert spare == start and spare["environment"]["SHARDTRAIN_ATTEMPT"] == "7"


def test_only_for_our_own_runs(command):
    """A script of one's own may have been started for anything: it starts as it did."""
    with spares.Spares() as waiting:
        script = (sys.executable, "script.py", "train")
        waiting.fill([(script, {}), ((sys.executable, "-m", "shardtrain", "verify", "x"), {})])
        assert not waiting._waiting


def test_one_that_died_is_not_taken(command):
    """Killed for its memory, say. The fault in mind: an attempt that waits for a process that is no more."""
    with spares.Spares() as waiting:
        waiting.fill([(command, {}), (command, {})])
        spare, second = waiting._waiting[0], waiting._waiting[1]
        spare.kill()
        assert until(lambda: gone(spare.pid))
        waiting.fill([(command, {})])  # one process less
        assert waiting._waiting == {0: spare} and until(lambda: gone(second.pid))
        assert waiting.take(0, command, {}) is None


def test_none_is_left(command):
    """When the launcher is done, and when it is killed. Failed once without the kernel's signal."""
    with spares.Spares() as waiting:
        waiting.fill([(command, {})])
        pid = waiting._waiting[0].pid
    assert gone(pid)
    code = (
        f"from shardtrain.launch import spares; import time; s = spares.Spares(); s.fill([({command!r}, {{}})]); "
        "print(s._waiting[0].pid, flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(launcher.stdout.readline())
    assert until(lambda: name(pid) == child.WAITING)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert until(lambda: gone(pid), 2.0)
