"""When it saves, what it keeps, and how it leaves."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from checkpoint_fakes import FakePlan, at_step, mesh_of

from shardtrain.checkpoint import Checkpointer, folder
from shardtrain.errors import CheckpointError


@pytest.fixture
def plan():
    return FakePlan(mesh_of(fsdp=2))


def train(checkpointer, state, first, last):
    """Steps `first` to `last`; those that were saved."""
    return [n for n in range(first, last + 1) if checkpointer.save(at_step(state, n))]


def test_saves_when_due_and_keeps_what_was_asked(tmp_path, plan):
    """Failed when retention counted steps that keep_every holds among the newest two."""
    with Checkpointer(tmp_path, every=2, keep=2, keep_every=6) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        assert train(checkpointer, state, 1, 15) == [2, 4, 6, 8, 10, 12, 14]
        checkpointer.wait()
        assert checkpointer.steps() == [6, 12, 14] and checkpointer.latest_step() == 14
        assert checkpointer.save(at_step(state, 16), force=True)
        assert not checkpointer.save(at_step(state, 16), step=16, force=True)  # nothing is written twice
    assert folder.steps(tmp_path) == [6, 12, 14, 16]
    assert not list((tmp_path / ".trash").iterdir()) and not folder.unfinished(tmp_path)


def test_a_call_that_is_not_due_never_looks_at_the_state(tmp_path, plan):
    """Failed when `save` read `state.step` to know whether it is due."""
    with Checkpointer(tmp_path, every=100) as checkpointer:
        checkpointer.restore_or_init(plan)
        assert not any(checkpointer.save(None) for _ in range(99))
        assert not checkpointer.save(None, step=101)


def test_counting_another_stride_warns_and_saves_the_true_step(tmp_path, plan):
    """Failed when the folder was named by the count."""
    with Checkpointer(tmp_path, every=4) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        with pytest.warns(UserWarning, match="pass step="):
            saved = [n for n in range(2, 20, 2) if checkpointer.save(at_step(state, n))]
        assert saved[0] == 8  # the fourth call
    assert 8 in folder.steps(tmp_path) and json.loads((tmp_path / "8/manifest.json").read_text())["step"] == 8


def test_the_next_save_waits_for_the_one_under_way(tmp_path, plan, monkeypatch):
    """Failed when a save under way made the next one return False."""
    gate, publish = threading.Event(), folder.publish
    monkeypatch.setattr(folder, "publish", lambda *a, **k: gate.wait(20) and publish(*a, **k))
    with Checkpointer(tmp_path, every=1, keep=None) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        assert checkpointer.save(at_step(state, 1)) and checkpointer.latest_step() is None
        threading.Timer(0.3, gate.set).start()
        assert checkpointer.save(at_step(state, 2)) and gate.is_set()
    assert folder.steps(tmp_path) == [1, 2]


def test_a_failed_save_is_told_once_and_leaves_nothing(tmp_path, plan, monkeypatch):
    """Failed when the error stayed in the thread."""
    with Checkpointer(tmp_path, every=1) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        checkpointer.save(at_step(state, 1))
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(folder, "publish", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space")))
            checkpointer.save(at_step(state, 2))
            with pytest.raises(CheckpointError, match=r"No space.*\n.*free space"):
                checkpointer.wait()
        assert folder.steps(tmp_path) == [1] and not folder.unfinished(tmp_path)
        assert checkpointer.save(at_step(state, 2), step=2)
    assert folder.steps(tmp_path) == [1, 2]


def test_leaving_by_an_exception_keeps_the_exception(tmp_path, plan, monkeypatch):
    """Failed when the error of the save replaced that of the loop."""
    monkeypatch.setattr(folder, "publish", lambda *a, **k: (_ for _ in ()).throw(OSError(5, "broken disk")))
    with pytest.raises(ZeroDivisionError) as caught, Checkpointer(tmp_path, every=1) as checkpointer:
        checkpointer.save(plan.init(0))
        raise ZeroDivisionError
    assert "broken disk" in caught.value.__notes__[0]


def test_another_run_in_the_folder_is_refused(tmp_path, plan):
    """Failed when only equal step numbers were compared."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(plan.init(0), 9), force=True)
    with Checkpointer(tmp_path, every=100) as checkpointer:
        with pytest.raises(CheckpointError, match="holds step 9, and this run is at step 1"):
            checkpointer.save(at_step(plan.init(1), 1))
        assert checkpointer.save(at_step(plan.init(1), 10), step=10, force=True)


def test_going_on_from_an_older_step_replaces_the_newer(tmp_path, plan):
    """Failed when step 8 of the abandoned run stayed the newest."""
    with Checkpointer(tmp_path, every=2, keep=None) as checkpointer:
        train(checkpointer, checkpointer.restore_or_init(plan), 1, 8)
        state = checkpointer.restore(plan, 4)
        assert not checkpointer.save(at_step(state, 5)) and checkpointer.steps() == [2, 4, 6, 8]
        assert checkpointer.save(at_step(state, 6))
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4, 6]


def test_a_last_save_after_one_that_failed_replaces_the_newer(tmp_path, plan):
    """It is tried in place of telling, and step 8 of the abandoned run leaves with it. Failed once: only the save that failed was to
    replace it, and the next start would have gone on from step 8."""
    with Checkpointer(tmp_path, every=2, keep=9) as checkpointer:
        train(checkpointer, checkpointer.restore_or_init(plan), 1, 8)

    def full():
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path, every=2, keep=9) as checkpointer:
        state = checkpointer.restore(plan, 4)
        checkpointer.fault = full
        checkpointer.save(at_step(state, 6), step=6)
        checkpointer._thread.join()
        checkpointer.fault = None
        assert checkpointer.save(at_step(state, 6), step=6, force=True)
    assert folder.steps(tmp_path) == [2, 4, 6]


def test_sigterm(tmp_path, plan):
    """Failed (killed the tests) without the handler; the save was missing when only `force` was looked at."""
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(tmp_path, every=1000) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        assert not checkpointer.save(at_step(state, 1)) and not checkpointer.preempted
        assert not checkpointer.save(at_step(state, 2))
        os.kill(os.getpid(), signal.SIGTERM)
        assert not checkpointer.preempted  # the answer of the save before: this step is not saved
        assert checkpointer.save(at_step(state, 3)) and checkpointer.preempted
        assert not checkpointer.save(at_step(state, 3), step=3, force=True) and checkpointer.preempted
    assert signal.getsignal(signal.SIGTERM) is before and folder.steps(tmp_path) == [3]
    with Checkpointer(tmp_path) as checkpointer:
        os.kill(os.getpid(), signal.SIGTERM)
        assert checkpointer.preempted  # asked without a save


def test_sigterm_while_the_last_save_is_written(tmp_path, plan, monkeypatch):
    """Failed (killed the tests) when the handler was removed before the wait."""
    publish = folder.publish

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*args, **options)

    monkeypatch.setattr(folder, "publish", interrupted)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(plan.init(0), 1), force=True)
    assert folder.steps(tmp_path) == [1]


def test_no_handler_outside_the_main_thread(tmp_path):
    """Failed with the ValueError of signal.signal."""
    failures = []

    def enter():
        try:
            with Checkpointer(tmp_path):
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.parametrize("options", [dict(every=0), dict(keep=0), dict(config={"f": object()})])
def test_wrong_arguments(tmp_path, options):
    """Failed when they were only met at the first save."""
    with pytest.raises(CheckpointError):
        Checkpointer(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    """Failed when the folder was made at the first save. (Root may write anywhere: a file is in the way.)"""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        Checkpointer(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="local or shared"):
        Checkpointer("gs://bucket/run")


def test_importing_does_not_import_orbax():
    """Failed when the package imported `arrays`."""
    code = "import sys, shardtrain.checkpoint; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
