"""One run has a store at a time, and one that has lost it writes nothing that counts."""

import logging
import os
import socket
import time

import pytest
from checkpoint_fakes import make_step

from shardtrain.checkpoint import head, list_steps, refuse_if_taken
from shardtrain.checkpoint.durable import Durable
from shardtrain.errors import CheckpointError

BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        make_step(path, step)
    return path


@pytest.fixture
def opened(bucket, url, saved, tmp_path):
    """Runs on folders of their own, with the steps of `saved`."""
    runs = []

    def make(name, wait=True):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        for step in (1, 2, 3):
            if not (path / str(step)).exists():
                (path / str(step)).symlink_to(saved / str(step))
        runs.append(Durable(url, path, None, None))
        runs[-1].open()
        return runs[-1]

    yield make
    for run in runs:
        leave(run)


def leave(run):
    """As a process that is killed, or held, for a while."""
    if run._lease is not None:
        run._lease._stop.set()
        run._lease._thread.join()


def steps(url):
    return [line["step"] for line in list_steps(url) if line["committed"]]


@BOTH
def test_a_second_run_is_refused(opened, url, tmp_path):
    """With the first one's name, as soon as there is a sign of it, and before any work; let in once it is gone. Failed
    when nothing renewed the lease."""
    first = opened("a")
    for attempt in (lambda: opened("b"), lambda: refuse_if_taken(url, tmp_path / "b")):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        said = f"in use by another run: host {socket.gethostname()}, process {os.getpid()}, run {first._lease.owner['run']}, since 20"
        assert said in caught.value.message and "another URL" in caught.value.fix
    first._send(1)
    first.close()
    refuse_if_taken(url, tmp_path / "b")
    assert list(opened("b")._lease.steps) == [1]


@BOTH
def test_a_run_that_gives_no_sign_is_taken_over_and_notices(opened, url, bucket, caplog):
    """What the first one still sends counts for nothing, it says so once, and stops. Failed with a head that was written without
    a condition."""
    first = opened("a")
    first._send(1)
    leave(first)  # held: it does not know that its lease runs out
    second = opened("b")
    assert "no sign of host" in caplog.text
    second._send(2)
    first._send(3)
    assert "taken over by another run" in caplog.text and "another run has it" in caplog.text
    assert second._lease.owner["run"] in first._lease.lost and not first.takes(True)
    asked = []
    bucket.fault = lambda n, method, name: asked.append(name)
    first._send(3)
    first.close()
    assert not [name for name in asked if "head.json" not in name] and steps(url) == [1, 2]
    second._send(3)
    assert steps(url) == [1, 2, 3]


@BOTH
def test_a_commit_that_comes_late(opened, url, bucket):
    """Taken over after the last look and before the write arrives, which then changes nothing. Failed with a head that
    was written without a condition."""
    first = opened("a")
    first._send(1)
    leave(first)
    others = []

    def take_over(n, method, name):
        if "head.json" in name and method in ("PUT", "POST") and not others:
            others.append(None)
            others[0] = opened("b")

    bucket.fault = take_over
    first._send(2)
    assert others and first._lease.lost and steps(url) == [1]
    others[0]._send(3)
    assert steps(url) == [1, 3]


def test_the_same_folder_does_not_wait(opened, url, monkeypatch):
    """Its lock says that the owner is dead; a copy of it elsewhere waits. Failed when the host alone was compared."""
    first = opened("a")
    leave(first)
    monkeypatch.setattr(head, "LEASE", 3600.0)

    def stop(_):
        raise InterruptedError

    monkeypatch.setattr(time, "sleep", stop)
    again = opened("a")
    assert again._lease.owner["folder"] == first._lease.owner["folder"]
    leave(again)
    (again._path.parent / "copy").mkdir()
    (again._path.parent / "copy" / head.NAMED).write_bytes((again._path / head.NAMED).read_bytes())
    with pytest.raises(InterruptedError):
        opened("copy")


def test_an_owner_long_gone_is_not_waited_for(opened, bucket, monkeypatch):
    """By the clock, if it says more than clocks are apart. The fault in mind: a minute at every start."""
    first = opened("a")
    leave(first)
    monkeypatch.setattr(head, "CLOCKS", -1000.0)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    opened("b")


def test_renewals_survive_a_store_that_fails(opened, bucket, caplog):
    """Answers that are lost are no other owner. Failed when a write of our own that had arrived was taken for another's."""
    caplog.set_level(logging.INFO, "shardtrain")
    first = opened("a")
    serial = first._lease.content["serial"]
    bucket.fault = lambda n, method, name: ("lost" if n % 2 else "drop") if n % 5 else 503
    deadline = time.monotonic() + 20
    while "not renewed" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    bucket.fault = lambda *_: None
    while first._lease.content["serial"] < serial + 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not first._lease.lost and first._lease.content["serial"] >= serial + 3
    with pytest.raises(CheckpointError, match="in use"):
        opened("b")
