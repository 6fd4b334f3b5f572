"""Processes on one machine: who failed, what is started again, and that nobody outlives the launcher.

The processes are short scripts without JAX; `tests/multihost` has those that train.
"""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from shardtrain.errors import LaunchError, RunError
from shardtrain.launch import local, processes

ME = (
    "import os, sys, time; me = int(os.environ['JAX_PROCESS_ID']); n = int(os.environ['JAX_NUM_PROCESSES']); "
)
TRY = "attempt = int(os.environ['SHARDTRAIN_ATTEMPT']); "


def asked(code, processes=2, **options):
    return local.Local((sys.executable, "-c", ME + TRY + code), processes, **options)


@pytest.fixture
def launch(monkeypatch):
    """Run without back-off: the summary or the error, and the lines that were said."""
    monkeypatch.setattr(local, "_DELAYS", (0.0,))
    lines = []

    def run(code, processes=2, **options):
        return local.launch(asked(code, processes, **options), lines.append)

    run.lines = lines
    return run


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_all_end_well(launch, capfd, tmp_path):
    """Lines carry their process, stdout stays stdout, logs are kept. The fault in mind: a line without its prefix."""
    found = launch("print('out', me); print('err', me, file=sys.stderr)", 3, logs=tmp_path / "logs")
    assert (found["exit"], found["restarts"]) == (0, 0)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"[{i}] out {i}" for i in range(3)]
    assert sorted(err.splitlines()) == [f"[{i}] err {i}" for i in range(3)]
    for i in range(3):
        assert sorted((tmp_path / "logs" / f"process-{i}.log").read_text().split()) == sorted(
            f"out {i} err {i}".split()
        )


def test_the_first_failure_ends_the_rest_and_is_named(launch):
    """Process 1 is killed; the others say that they lost it, as JAX does, and one never ends by itself.

    Failed once: the survivor that complained first was blamed.
    """
    code = (
        "print('last words', file=sys.stderr, flush=True) if me == 1 else None; "
        "os.kill(os.getpid(), 9) if me == 1 else None; "
        "time.sleep(0.1) if me == 0 else time.sleep(60); sys.exit(3)"
    )
    began = time.monotonic()
    with pytest.raises(RunError) as error:
        launch(code, 3, max_restarts=0)
    assert time.monotonic() - began < 8
    assert error.value.message == "process 1 of 3 was killed by SIGKILL" and "last words" in error.value.why


@pytest.mark.parametrize("code", ["sys.exit(3)", "sys.exit(75)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_started_again(launch, code):
    """After a failure, a preemption, a signal. Failed once with 75 taken for the end."""
    found = launch(
        f"(({code}) if attempt == 0 and me == 1 else sys.exit(75 if attempt == 0 and {'75' in code} else 0))"
    )
    assert (found["exit"], found["restarts"]) == (0, 1)
    assert any("restart 1" in line for line in launch.lines)


def test_who_saves_is_not_cut_off(launch, monkeypatch, tmp_path):
    """After one process has left with 75 the others may still be saving. Failed once with 75 as a failure."""
    monkeypatch.setattr("shardtrain.launch.processes._WITNESSES", 0.1)
    monkeypatch.setattr("shardtrain.launch.processes._LAST_WORDS", 0.1)
    saved = f"open({str(tmp_path / 'saved')!r}, 'w')"
    found = launch(f"sys.exit(0) if attempt else None; me or (time.sleep(1), {saved}); sys.exit(75)")
    assert found["restarts"] == 1 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("code", [2, 130])
def test_never_started_again(launch, code):
    """Wrong input stays wrong. The fault in mind: a loop over a typing error."""
    with pytest.raises(LaunchError, match=f"process 1 of 2 ended with {code}"):
        launch(f"sys.exit({code} if me else time.sleep(30))")
    assert not launch.lines


def test_a_crash_loop_ends_with_the_last_error(launch):
    """Preemptions do not count, failures do. Failed once with no limit."""
    code = "print('error', attempt, file=sys.stderr); sys.exit(75 if attempt == 1 else 3)"
    with pytest.raises(RunError) as error:
        launch(code, 1, max_restarts=2)
    assert sum("; restart" in line for line in launch.lines) == 3
    assert "error 3" in error.value.why and "after 2 restarts" in error.value.message


def test_elastic_goes_down_by_divisors(launch):
    """4 processes, then 2, then 1, as restarts are used up; the groups of a run divide by these alone.

    Failed once: 3 processes came after 4.
    """
    found = launch("sys.exit(3 if n > 1 else 0)", 4, max_restarts=1, elastic=True)
    assert [a["processes"] for a in found["attempts"]] == [4, 4, 2, 2, 1]
    assert "launch: going on with 2 of 4 processes" in launch.lines


def test_devices_are_passed_and_counted():
    """16 processes of 8 make 128, each GPU once. The fault in mind: every process took all GPUs of its host."""
    starts = local.starts(asked("", 16, devices_per_process=8), 16, 0, 1)
    ids = [int(i) for s in starts for i in s.environment["JAX_LOCAL_DEVICE_IDS"].split(",")]
    assert ids == list(range(128))
    assert {s.environment["SHARDTRAIN_TOTAL_DEVICES"] for s in starts} == {"128"}
    assert [s.environment["JAX_PROCESS_ID"] for s in starts] == [str(i) for i in range(16)]


def test_words_are_data(launch, tmp_path, capfd):
    """Spaces, quotes, `$(...)` and newlines reach the process as they are. The fault in mind: a shell in between."""
    words = ["a b", "it's", '"', f"$(touch {tmp_path}/made)", "two\nlines", "`id`", ";"]
    print_words = "import json, sys; print(json.dumps(sys.argv[1:]))"
    found = local.launch(local.Local((sys.executable, "-c", print_words, *words), 1), print)
    assert found["exit"] == 0 and not (tmp_path / "made").exists()
    assert json.loads(capfd.readouterr().out.removeprefix("[0] ")) == words


START = """
import sys
from shardtrain.errors import ShardTrainError
from shardtrain.launch import local, processes
try:
    found = local.launch(local.Local((sys.executable, "-c", {code!r}), 2, grace={grace}), lambda line: print(line, flush=True))
    print(found["exit"], found["attempts"])
except ShardTrainError as error:
    print(error)
"""


LOST = (
    (
        "E1126 17:10 coordination_service.cc:1518] UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):",
        "2",
        "3",
        "The tasks have crashed. Check the task logs for an earlier error",
        "F1126 17:10 client.h:86] Terminating process because the JAX distributed service detected fatal errors.",
        "RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/tensorflow.CoordinationServiceError='']",
    ),
    (
        "F1126 17:10 client.h:86] Terminating process because the JAX distributed service detected fatal errors.",
        "RPC: /xla.coordination.CoordinationService/Heartbeat",
    ),
)  # as JAX 0.12 wrote it when the cable of one of two hosts was out: the coordinator's side, and the other


def test_whom_jax_missed_is_named():
    """Not the survivor alone that JAX ended. The fault in mind: `process 0 was killed by SIGABRT` and a stack of addresses."""
    here, there = map(processes.missed, LOST)
    assert here == "no heartbeat of processes 2, 3: stopped, or the network is cut"
    assert there == "no answer from the coordinator, process 0: stopped, or the network is cut"
    gone = ("F1 Terminating process because", "RPC: /xla.coordination.CoordinationService/PollForError")
    assert processes.missed(gone).endswith("process 0: it ended, or the network is cut")
    assert not processes.missed(["RPC: /xla.coordination.CoordinationService/PollForError", "went on"])


def test_a_process_of_another_host_keeps_its_number(launch, tmp_path, capfd):
    """On the second of two hosts: numbers, prefixes and logs are those of all. What JAX says as it aborts is understood, its
    addresses are not shown again. Failed once: `process 0 of 1`, and two hosts that write one log."""
    words = "\n".join((*LOST[1], "    @     0x7f67764f81b4  absl::log_internal::LogMessage::SendToLog()"))
    code = f"sys.stderr.write({words!r} + chr(10)); sys.stderr.flush(); os.abort() if me == 3 else time.sleep(60)"
    logs = tmp_path / "logs"
    with pytest.raises(RunError) as error:
        where = {"hosts": 2, "host_index": 1, "coordinator": "one:1", "mtls": "off"}
        launch(code, 2, max_restarts=0, logs=logs, **where)
    said = "process 3 of 4 was killed by SIGABRT by JAX: no answer from the coordinator, process 0"
    assert str(error.value.message).startswith(said) and "0x7f" not in error.value.why
    assert {f.name for f in logs.iterdir()} == {"process-2.log", "process-3.log"}
    assert "[3] F1126" in capfd.readouterr().err


def started(tmp_path, code, grace=20.0):
    """A launcher of two processes that note their pids, once they are there."""
    note = f"import os, signal, time, sys, pathlib; folder = pathlib.Path({str(tmp_path)!r}); "
    note += "(folder / f'pid-{os.getpid()}').touch()\n"
    launcher = subprocess.Popen(
        [sys.executable, "-c", START.format(code=note + code, grace=grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    return launcher, [int(p.name.removeprefix("pid-")) for p in tmp_path.glob("pid-*")]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on the death of a parent is Linux's")
def test_nobody_outlives_the_launcher(tmp_path):
    """SIGKILL leaves it no chance to end them itself. Failed once with the call to prctl taken out."""
    launcher, pids = started(tmp_path, "time.sleep(60)")
    assert all(map(alive, pids))
    launcher.kill()
    launcher.wait()
    assert until(lambda: not any(map(alive, pids)), 2.0)
    launcher.stdout.close()


COUNTS = """
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
signal.signal(signal.SIGINT, lambda *_: got.append(2))
(folder / f'ready-{os.getpid()}').touch()
while not got: time.sleep(0.01)
time.sleep(0.5)
(folder / f'got-{os.getpid()}').write_text(str(got))
sys.exit(75 if got[0] == 1 else 0)
"""


@pytest.mark.parametrize(
    ("number", "got", "exit"), [(signal.SIGTERM, "[1]", "75"), (signal.SIGINT, "[2]", "0")]
)
def test_signals_are_passed_on_once(tmp_path, number, got, exit):
    """And nothing is started again. Failed once with the signal sent at every look."""
    launcher, pids = started(tmp_path, COUNTS)
    assert until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=20)
    assert out.split()[0] == exit, out
    assert [p.read_text() for p in tmp_path.glob("got-*")] == [got, got] and len(pids) == 2


def test_a_second_signal_does_not_wait(tmp_path):
    """Processes that swallow SIGTERM are killed. The fault in mind: a launcher that can only be killed."""
    launcher, pids = started(
        tmp_path,
        "signal.signal(15, signal.SIG_IGN); (folder / f'ready-{os.getpid()}').touch(); time.sleep(60)".replace(
            "me()", "os.getpid()"
        ),
    )
    assert until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.terminate()
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.terminate()
    out, _ = launcher.communicate(timeout=10)
    assert out.split()[0] == "75" and not any(map(alive, pids))


def test_grace_ends(tmp_path):
    """The same after `grace` seconds. The fault in mind: it waited for ever."""
    launcher, pids = started(
        tmp_path,
        "signal.signal(15, signal.SIG_IGN); (folder / f'ready-{os.getpid()}').touch(); time.sleep(60)",
        grace=0.5,
    )
    assert until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    launcher.terminate()
    out, _ = launcher.communicate(timeout=10)
    assert "75" in out and not any(map(alive, pids))
