"""A run's own word of who started it, and what `status`, `logs` and `stop` make of it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from shardtrain.cli import main
from shardtrain.launch.record import process_of, read_record, started_again, write_record
from shardtrain.watch import Beat, Ledger, write_table


@pytest.fixture
def run(tmp_path):
    """A run's folder, and a process that stands for its launcher."""
    stands = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)
    (path / "checkpoints" / "4").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"steps": 10}))
    lines = [{"step": 4, "loss": 2.5}, {"step": 5, "loss": 2.25}, {"step": 5, "eval_loss": 2.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"step": 6, "lo')
    for i in (0, 2, 10):
        (path / "logs" / f"process-{i}.log").write_text(f"first of {i}\nlast of {i}\n")
    write_record(path, {"SHARDTRAIN_LAUNCH": json.dumps({"kind": "local", "pid": stands.pid})})
    yield path, stands
    stands.kill()
    stands.wait()


def test_status(run, capfd):
    """The last whole line counts, and a launcher that is gone is gone. Failed once on the line being written."""
    path, stands = run
    assert main(["status", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["step"], found["steps"], found["loss"], found["checkpoint"]) == (5, 10, 2.25, 4)
    assert found["running"] is True
    stands.kill()
    stands.wait()
    assert process_of(read_record(path)) is None


def test_status_says_where_the_time_went(run, capfd):
    """Goodput, the table of processes with the slow one, and what was kept of stuck ones. Failed once without the table."""
    path, _ = run
    rows = {0: {"data": 0.01, "wait": 0.09}, 1: {"data": 0.08, "wait": 0.02}}
    write_table(path, [Beat(p, 1, "wait", 5, 0.0, means=row) for p, row in rows.items()])
    Ledger(clock=iter(range(9)).__next__, age=3.0).write(path)
    (path / "stuck").mkdir()
    (path / "stuck" / "process-1.txt").write_text("where it was")
    capfd.readouterr()
    assert main(["status", str(path)]) == 0
    out = capfd.readouterr().out
    assert "process 1 is slow: 80.0 ms of a step in data" in out and "stuck/process-1.txt" in out
    assert "goodput 0.0% of 4.0 s (start 4.0 s)" in out
    assert main(["status", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["processes"]["slow"] == 1 and found["goodput"]["wall_seconds"] == 4.0


def test_stop_asks_the_launcher(run):
    """With SIGTERM, and only while it is the same process. The fault in mind: a number that is used again."""
    path, stands = run
    assert main(["stop", str(path)]) == 0
    assert stands.wait(10) == -signal.SIGTERM
    record = read_record(path)
    (path / "launch.json").write_text(json.dumps({**record, "pid": os.getpid()}))
    assert main(["stop", str(path)]) == 2  # this process was not started when that one was


def test_another_machine(run, capfd):
    """Its processes are not this machine's. The fault in mind: the same number here."""
    path, stands = run
    (path / "launch.json").write_text(json.dumps({**read_record(path), "host": "elsewhere"}))
    assert main(["stop", str(path)]) == 2 and "elsewhere" in capfd.readouterr().err
    assert stands.poll() is None


def test_logs(run, capfd):
    """Of all processes in their order, or of one. The fault in mind: process 10 before process 2."""
    path, _ = run
    assert main(["logs", str(path), "--lines", "1"]) == 0
    assert capfd.readouterr().out.splitlines() == ["0: last of 0", "2: last of 2", "10: last of 10"]
    assert main(["logs", str(path), "--process", "2"]) == 0
    assert capfd.readouterr().out.splitlines() == ["first of 2", "last of 2"]
    assert main(["logs", str(path), "--process", "7"]) == 2


def test_who_started(tmp_path, monkeypatch):
    """SLURM's own number of the job is kept; a damaged variable is nobody's. The fault in mind: a run that cannot start."""
    write_record(tmp_path, {"SHARDTRAIN_LAUNCH": '{"kind": "slurm"}', "SLURM_JOB_ID": "12"})
    assert read_record(tmp_path)["kind"] == "slurm" and read_record(tmp_path)["job"] == "12"
    for damaged in ("{", "3", "null"):
        write_record(tmp_path, {"SHARDTRAIN_LAUNCH": damaged})
        assert read_record(tmp_path)["kind"] == "alone" and read_record(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("environment", "again"),
    [
        ({}, False),
        ({"SHARDTRAIN_ATTEMPT": "0"}, False),
        ({"SHARDTRAIN_ATTEMPT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "2"}, True),
    ],
)
def test_started_again(environment, again):
    """Then `--fresh` is not meant: it would throw away what the attempt before saved. The fault in mind: it did."""
    assert started_again(environment) == again


@pytest.mark.parametrize("attempt", ["0", "1"])
def test_a_restart_is_never_fresh(attempt, monkeypatch, capfd):
    """`train --fresh` in a later attempt goes on. The fault in mind: each restart from step 0."""
    from shardtrain.config import run as config_run
    from shardtrain.errors import ConfigError

    asked = []

    def train(config, *, fresh, **_):
        asked.append(fresh)
        raise ConfigError("enough")

    monkeypatch.setattr(config_run, "train", train)
    monkeypatch.setenv("SHARDTRAIN_ATTEMPT", attempt)
    assert main(["train", "configs/gpt.py:tiny", "--fresh"]) == 2
    assert asked == [attempt == "0"]
