"""One writer per folder; whoever comes second is told who was first."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoint_fakes import FakePlan, at_step, mesh_of

from shardtrain.checkpoint import Checkpointer, list_steps, refuse_if_held, restore, verify
from shardtrain.errors import CheckpointError

HOLDER = """
import sys, time
from shardtrain.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes in the folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, holder):
    """At once, with the owner named, nothing of the first touched; then taken over. Failed without the lock: the
    second purged the first one's save."""
    (tmp_path / ".saving" / "3").mkdir(parents=True)
    start = time.monotonic()
    for attempt in (lambda: Checkpointer(tmp_path).__enter__(), lambda: refuse_if_held(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert f"host {socket.gethostname()}, process {holder.pid}, run " in caught.value.message
        assert "since 20" in caught.value.message and "another folder" in caught.value.fix
    assert time.monotonic() - start < 2 and (tmp_path / ".saving" / "3").is_dir()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_if_held(tmp_path)
    with Checkpointer(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".saving").exists()
        with pytest.raises(CheckpointError, match="this process"):
            Checkpointer(tmp_path).__enter__()
    assert (tmp_path / ".lock").read_text() == ""
    with Checkpointer(tmp_path):
        pass


def test_readers_do_not_ask(tmp_path):
    """The fault in mind: a restore for generation waits for the training run."""
    plan = FakePlan(mesh_of(fsdp=2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(plan.init(0), 1), force=True)
        checkpointer.wait()
        assert int(restore(tmp_path, plan).step) == 1 and verify(tmp_path)["steps"][0]["intact"]
        assert [entry["step"] for entry in list_steps(tmp_path)] == [1]


def test_closing_lets_go_even_of_a_failed_save(tmp_path, monkeypatch):
    """The fault in mind: the lock was released only after a wait that raised."""
    from shardtrain.checkpoint import folder

    plan = FakePlan(mesh_of(fsdp=2))
    with monkeypatch.context() as patch:
        patch.setattr(folder, "publish", lambda *a, **k: (_ for _ in ()).throw(OSError(5, "broken disk")))
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(at_step(plan.init(0), 1), force=True)
        with pytest.raises(CheckpointError, match="broken disk"):
            checkpointer.close()
    refuse_if_held(tmp_path)


def test_a_forked_child_does_not_keep_it(tmp_path):
    """A data worker that outlives its run must not lock the folder. Failed without the fork hook."""
    script = HOLDER.replace(
        'print("held", flush=True)',
        "import os; child = os.fork(); child and print(child, flush=True); child and os.kill(os.getpid(), 9)",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert process.wait() == -signal.SIGKILL
        os.kill(child, 0)  # it lives
        refuse_if_held(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
