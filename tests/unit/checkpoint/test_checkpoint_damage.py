"""Killed, cut short, spoilt: what is listed is whole, and what is not whole says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from checkpoint_fakes import FakePlan, at_step, equal, mesh_of

from shardtrain.checkpoint import (
    Checkpointer,
    digests,
    folder,
    inspect,
    list_steps,
    manifest,
    restore,
    verify,
)
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


def flip(file: Path, after: bytes = b"", at: int = 40) -> None:
    """One bit, `at` bytes behind `after`."""
    content = bytearray(file.read_bytes())
    content[content.index(after) + at] ^= 4
    file.write_bytes(content)


def largest(place: Path) -> Path:
    return max((file for file in place.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_truncated_missing_and_unreadable(two_steps):
    """Failed when sizes were not compared, and when contents were not: Orbax gave wrong values, or TensorStore's text."""
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
            f"the file {data.relative_to(place)} is not what was written": lambda data=data: flip(data),
            "manifest.json is not what was written": lambda p=place: flip(
                p / "manifest.json", b'"cursor"', 3
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
    assert [entry["committed"] for entry in list_steps(path)] == [False, False]


def test_arrays_that_orbax_refuses(two_steps, monkeypatch):
    """Sound files, and an error of Orbax: told as ours. The fault in mind: a traceback of another library."""
    from shardtrain.checkpoint import arrays

    path, plan = two_steps
    monkeypatch.setattr(arrays, "load", lambda *a, **k: (_ for _ in ()).throw(ValueError("no such thing")))
    with pytest.raises(CheckpointError, match="its arrays cannot be read: ValueError: no such thing"):
        restore(path, plan)


def test_a_damaged_step_is_passed_over_and_set_aside(two_steps, caplog):
    """One loud line, the older step bit for bit, nothing removed. Failed when the newest was restored unread, and
    when the damaged step was removed."""
    path, plan = two_steps
    data = largest(path / "2" / "arrays")
    flip(data)
    spoilt = data.read_bytes()
    with Checkpointer(path, keep=1) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        assert equal(state, at_step(plan.init(0), 1))
        line = next(r.getMessage() for r in caplog.records if r.levelname == "ERROR")
        assert f"{path}/2 is damaged: the file {data.relative_to(path / '2')} is not what was written" in line
        assert "going on from step 1" in line and "moved to 2.damaged" in line
        assert folder.steps(path) == [1]
        assert checkpointer.save(at_step(state, 2), force=True)
    assert folder.steps(path) == [2] and equal(restore(path, plan), at_step(plan.init(0), 2))
    assert (path / "2.damaged" / data.relative_to(path / "2")).read_bytes() == spoilt


def test_reading_passes_over_but_moves_nothing(two_steps, caplog):
    """The fault in mind: a reader that changes a folder in which somebody trains."""
    path, plan = two_steps
    (path / "2" / "manifest.json").unlink()
    before = sorted(path.rglob("*"))
    assert int(restore(path, plan).step) == 1 and "passed over" in caplog.text
    assert sorted(path.rglob("*")) == before


def test_none_intact_is_no_new_start(two_steps):
    """Failed when a folder of damaged steps was taken for an empty one, and the run began anew."""
    path, plan = two_steps
    for step in (1, 2):
        flip(largest(path / str(step) / "arrays"))
    with Checkpointer(path) as checkpointer:
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints here is intact") as caught:
            checkpointer.restore_or_init(plan)
        assert len(caught.value.why.splitlines()) == 2 and plan.inits == 2
    assert folder.steps(path) == [1, 2]


def test_retention_keeps_the_good_one(two_steps):
    """A step cut short after its commit is not counted. Failed when every folder with a manifest was."""
    path, plan = two_steps
    os.truncate(largest(path / "2" / "arrays"), 10)
    with Checkpointer(path, keep=2) as checkpointer:
        checkpointer.save(at_step(plan.init(0), 3), step=3, force=True)
    assert folder.steps(path) == [1, 2, 3]


def test_verify_reads_every_byte(two_steps):
    """The fault in mind: sizes only."""
    path, _ = two_steps
    (path / ".saving" / "3").mkdir(parents=True)
    flip(largest(path / "1" / "arrays"), at=0)
    (path / "2" / "arrays" / "commit_success.txt").unlink()
    one, two, three = verify(path)["steps"]
    assert (one["step"], one["committed"], one["intact"], len(one["problems"])) == (1, True, False, 1)
    assert "bytes 0 to" in one["problems"][0] and "is missing" in two["problems"][0]
    assert not three["committed"] and not three["intact"]
    with pytest.raises(CheckpointError, match="no step 7"):
        verify(path, 7)


def test_a_step_under_another_number(two_steps):
    """A folder that was renamed by hand would resume at the wrong rows. Failed when the number was not compared."""
    path, plan = two_steps
    (path / "1").rename(path / "7")
    assert verify(path, 7)["steps"][0]["problems"] == ["manifest.json is that of step 1"]
    assert int(restore(path, plan).step) == 2


def test_written_before_digests(two_steps, caplog):
    """A manifest of format 1 restores with a warning, and is not called intact."""
    path, plan = two_steps
    file = path / "2" / "manifest.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("digest", "digests")}
    file.write_text(json.dumps({**old, "format": 1}))
    assert equal(restore(path, plan, 2), at_step(plan.init(0), 2)) and "without digests" in caplog.text
    assert "format 1" in verify(path, 2)["steps"][0]["problems"][0]


def test_a_digest_per_chunk(tmp_path, monkeypatch):
    """Several chunks in a file, and a last one that is short. Failed when only the first chunk was read."""
    monkeypatch.setattr(digests, "CHUNK", 1000)
    (tmp_path / "file").write_bytes(bytes(range(250)) * 10)
    known = digests.of_files(tmp_path, {"file": 2500})
    assert known["file"] == [
        f"{zlib.crc32((bytes(range(250)) * 10)[i : i + 1000]):08x}" for i in (0, 1000, 2000)
    ]
    flip(tmp_path / "file", at=2400)
    assert "bytes 2000 to 2500 of 2500" in digests.differences(tmp_path, {"file": 2500}, known)[0]


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
    """And not passed over as damaged. Failed when `format` was not looked at."""
    path, plan = two_steps
    file = path / "2" / "manifest.json"
    content = json.loads(file.read_text())
    del content["digest"]
    file.write_text(manifest.seal({**content, "format": 99}))
    for step in (None, 2):
        with pytest.raises(CheckpointError, match="format 99 is newer"):
            restore(path, plan, step)


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


FULL = """
import logging, resource, sys
import jax.numpy as jnp, numpy as np, optax
import shardtrain as st

def limit(step, metrics):  # what a quota does: writes fail, in the kernel
    size = {3: 3000, 9: resource.RLIM_INFINITY}.get(step)
    if size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

st.simulate_devices(2)
st.fit(
    (lambda key: {"w": jnp.ones((64, 64))}, lambda p, x: x @ p["w"]),
    lambda model, batch: jnp.square(model(batch["x"])).mean(),
    optax.adam(1e-3),
    [{"x": np.ones((8, 64), np.float32)} for _ in range(14)],
    mesh=st.make_mesh(data=2), steps=14, output=sys.argv[1], checkpoint_every=2, hooks=[limit],
)
"""


def test_a_quota_that_is_reached_and_raised(tmp_path):
    """Training goes on and says what it could not keep; nothing is left over; later saves are whole. The fault in mind: the
    metrics' OSError ended the run."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "a checkpoint could not be written" in done.stderr and "File too large" in done.stderr
    place = tmp_path / "checkpoints"
    assert folder.steps(place) == [12, 14] and not folder.unfinished(place)
    assert all(step["intact"] for step in verify(place)["steps"])
