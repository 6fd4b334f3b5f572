"""Processes that go on running and should not: stuck, slow, or training something else; and Open MPI as the starter."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from shardtrain.cli import main


def test_another_config_on_one_host(launch):
    """Named with the field before anything is compiled, and not started again. Failed once without the comparison: then
    the compiled programs differ, which names no field."""
    done = launch("config", "--processes", "2", config="CONFIG:another_config")
    assert done.code == 2
    assert "process 1 of 2 trains something else" in done.err
    assert "optimizer.learning_rate is 0.0125, elsewhere 0.01" in done.err
    assert not (done.output / "config.json").exists()


@pytest.mark.slow
def test_another_program_on_one_host(launch):
    """The same config, another loss: refused before the first step. Failed once without the comparison."""
    done = launch("program", "--processes", "2", config="CONFIG:another_program")
    assert done.code == 2
    assert "process 1 compiled another program" in done.err and "fingerprints 0: " in done.err
    assert not (done.output / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_stuck_in_a_step(launch, fault):
    """By the budgets that are learnt, or given: named within 25 s of its last step, and all go on from a save.

    The fault in mind: nobody notices, which is what JAX does of a process that hangs in Python.
    """
    # JAX's heartbeat finds a stopped process after 10 to 20 s, the launcher by itself after 15
    sooner = ["--silence", "alive=7"] if fault == "stop" else []
    words = ["--processes", "2", "--inject", f"{fault}@step=40:process=1", *sooner]
    done = launch(fault, *words, train=["--steps", "44"])
    assert done.code == 0, done.err[-3000:]
    assert done.json["restarts"] == 1
    end = done.json["attempts"][0]["end"]
    how = "has been dispatching at step 40" if fault == "hang" else "has given no sign of life for"
    assert end.startswith(f"process 1 {how}") and "the other is waiting for step" in end
    assert [row["step"] for row in done.rows] == list(range(1, 45))
    for process in (0, 1):
        text = (done.output / "stuck" / f"process-{process}.txt").read_text()
        assert end in text and "run_loop" in text and "program " in text
    seconds = json.loads((done.output / "goodput.json").read_text())["parts"]["lost"]
    assert fault == "stop" or seconds < 25.0


@pytest.mark.slow
def test_the_slow_process_is_named(launch, capfd):
    """Half a second before each dispatch on process 1. The fault in mind: the one that waits is blamed."""
    done = launch(
        "slow", "--processes", "2", "--inject", "slow@step=2:process=1:seconds=0.5", train=["--steps", "12"]
    )
    assert done.code == 0, done.err[-3000:]
    assert "process 1 is slow: " in done.err and "in dispatch" in done.err
    capfd.readouterr()
    assert main(["status", str(done.output)]) == 0
    assert "process 1 is slow: " in (out := capfd.readouterr().out) and "goodput" in out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not here")
def test_open_mpi_starts_it(launch, folder, one_of):
    """Two ranks find each other by JAX's own detection, and train as two processes of ours. The fault in mind: each alone."""
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        sys.executable,
        "-m",
        "shardtrain",
    ]
    command += ["train", f"{folder / 'my.py'}:tiny", "--output", str(folder / "mpi")]
    done = subprocess.run(command, env=one_of(folder), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "mpi" / "metrics.jsonl").read_text().splitlines()]
    two = launch("as-mpi", "--processes", "2")
    assert [row["loss"] for row in rows] == two.curve()
    assert (folder / "mpi" / "logs" / "process-1.log").exists()


@pytest.mark.slow
def test_hosts_without_a_common_launcher(folder, one_of):
    """Two launchers, as on two hosts: the processes judge each other by the coordination service, both leave word, and
    each launcher starts its own again. The fault in mind: each launcher sees its own process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "shardtrain",
        "launch",
        "local",
        "--hosts",
        "2",
        "--devices-per-process",
        "2",
    ]
    command += [
        "--coordinator",
        f"127.0.0.1:{port}",
        "--inject",
        "hang@step=6:process=1",
        "--max-restarts",
        "0",
    ]
    command += ["--silence", "dispatch=8,wait=8", "--mtls", "off"]
    rest = ["--", "train", f"{folder / 'my.py'}:tiny", "--output", str(folder / "hosts")]
    pipe = subprocess.PIPE
    hosts = [
        subprocess.Popen(
            [*command, "--host-index", str(i), *rest], env=one_of(folder), stderr=pipe, text=True
        )
        for i in (0, 1)
    ]
    said = [host.communicate(timeout=280)[1] for host in hosts]
    for text in said:
        assert "stuck: process 1 has been dispatching at step 6 for" in text, text[-3000:]
    assert "_cause" in (folder / "hosts" / "stuck" / "process-1.txt").read_text()
    assert "waiting for step 6's metrics" in (folder / "hosts" / "stuck" / "process-0.txt").read_text()
