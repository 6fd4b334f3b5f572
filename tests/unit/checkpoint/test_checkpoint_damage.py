"""Killed, cut short, spoilt: what is listed is whole, and what is not whole says so."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_fakes import FakePlan, at_step, equal, mesh_of

from shardtrain.checkpoint import Checkpointer, folder, inspect, list_steps, restore
from shardtrain.errors import CheckpointError

KILLED = """
import os, signal, sys, shutil, time
import jax
from checkpoint_fakes import FakePlan, at_step, mesh_of
from shardtrain.checkpoint import Checkpointer, folder

path, moment = sys.argv[1:]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
plan = FakePlan(mesh_of(one=1))
with Checkpointer(path, keep=1) as checkpointer:
    checkpointer.save(at_step(plan.init(0), 10), force=True)
    checkpointer.wait()
    if moment == "publish":    # Orbax is done, the step is not in place
        folder.publish = die
    if moment == "retention":  # the old step is on its way out
        remove = shutil.rmtree
        def half(place, **k):
            if ".trash" in str(place):
                os.unlink(os.path.join(place, "manifest.json"))
                die()
            remove(place, **k)
        shutil.rmtree = half
    checkpointer.save(at_step(plan.init(1), 20), step=20, force=True)
    if moment == "write":
        die()
    time.sleep(30)
"""


@pytest.mark.parametrize("moment", ["write", "publish", "retention"])
def test_kill_in_a_save(tmp_path, moment):
    """Failed when retention removed a step where it stood, and when Orbax wrote into the listed folder."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    left = [*(tmp_path / ".saving").iterdir(), *tmp_path.glob(".trash/*")]
    assert len(left) == 1
    plan = FakePlan(mesh_of(fsdp=2))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert not [*(tmp_path / ".saving").glob("*"), *tmp_path.glob(".trash/*")]
        newest = 20 if moment == "retention" else 10
        state = checkpointer.restore_or_init(plan)
        assert checkpointer.steps() == [newest]
        assert equal(state, at_step(plan.init(newest // 10 - 1), newest))
        assert checkpointer.save(at_step(state, newest + 1), force=True)
    assert folder.steps(tmp_path) == [newest + 1]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"


@pytest.fixture
def two_steps(tmp_path):
    plan = FakePlan(mesh_of(fsdp=2))
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(plan.init(0), step), force=True)
    return tmp_path, plan


def largest(place: Path) -> Path:
    return max((file for file in place.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_truncated_missing_and_unreadable(two_steps):
    """Failed when sizes were not compared: TensorStore's text, or none at all for an unused file."""
    path, plan = two_steps
    for step, older in ((2, True), (1, False)):
        place, copy = path / str(step), path.parent / f"copy{step}"
        shutil.copytree(place, copy)
        data = largest(place / "arrays")
        spoil = {
            f"the file {data.relative_to(place)} has": lambda data=data: os.truncate(data, 100),
            "is missing": lambda data=data: data.unlink(),
            "manifest.json cannot be read": lambda p=place: (p / "manifest.json").write_text('{"format": 1'),
            "manifest.json cannot be read: No such file": lambda p=place: (p / "manifest.json").unlink(),
            # of the right size, and nonsense: Orbax's own refusal is passed on as ours
            "its arrays cannot be read": lambda p=place: (p / "arrays/state/_METADATA").write_bytes(
                b"?" * (p / "arrays/state/_METADATA").stat().st_size
            ),
        }
        for said, act in spoil.items():
            act()
            with pytest.raises(CheckpointError) as caught:
                restore(path, plan, step)
            assert said in caught.value.why and caught.value.where == str(place)
            assert ("step=1" in caught.value.fix) == older
            shutil.rmtree(place)
            shutil.copytree(copy, place)
        (path / str(step) / "manifest.json").unlink()
    with Checkpointer(path) as checkpointer, pytest.raises(CheckpointError, match="step 2 is damaged"):
        checkpointer.restore_or_init(plan)
    assert [entry["committed"] for entry in list_steps(path)] == [False, False]


def test_what_is_not_there(two_steps):
    """Failed when `restore` of an empty folder gave Orbax's FileNotFoundError."""
    path, plan = two_steps
    with pytest.raises(CheckpointError, match=r"no step 7 here\n.*steps: 1, 2"):
        restore(path, plan, 7)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        restore(path / "empty", plan)
    for look in (inspect, list_steps):
        with pytest.raises(CheckpointError, match="no such folder"):
            look(path / "empty")


def test_a_newer_format_is_refused(two_steps):
    """Failed when `format` was not looked at."""
    path, plan = two_steps
    file = path / "2" / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="format 99 is newer"):
        restore(path, plan)


def test_listing(two_steps):
    """Failed when the folder of the run, one level up, was not looked into."""
    path, _ = two_steps
    (path / ".saving" / "3").mkdir(parents=True)
    (path / "007").mkdir()
    run = path.parent / "run"
    run.mkdir()
    shutil.move(path, run / "checkpoints")
    one, two, three = list_steps(run)
    assert (one["step"], two["step"], three["step"]) == (1, 2, 3)
    assert one["committed"] and two["committed"] and not three["committed"]
    assert two["mesh"] == {"fsdp": 2} and two["parameters"] == 2 * 16 * 16 + 16
    assert two["bytes"] == sum(f.stat().st_size for f in (run / "checkpoints/2").rglob("*") if f.is_file())
    assert inspect(run)["step"] == 2 and inspect(run, 1)["step"] == 1
    path.mkdir()
