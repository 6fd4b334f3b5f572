"""A store beside the folder: what comes back, what a failing store costs, and what is refused."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
from checkpoint_fakes import FakePlan, at_step, equal, mesh_of

from shardtrain.checkpoint import (
    Checkpointer,
    digests,
    folder,
    head,
    list_steps,
    manifest,
    store,
    transfer,
    verify,
)
from shardtrain.checkpoint.durable import Durable
from shardtrain.errors import CheckpointError, RunError

BOTH = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture(scope="module")
def plan():
    return FakePlan(mesh_of(fsdp=2))


@pytest.fixture(scope="module")
def two(plan, tmp_path_factory):
    """A folder with steps 1 and 2; not to be changed."""
    path = tmp_path_factory.mktemp("two")
    with Checkpointer(path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(at_step(plan.init(step), step), force=True)
    return path


@pytest.fixture
def sent(two, url):
    """The steps of `two` in the store."""
    run = Durable(url, two, None, None)
    run.open()
    run._send(1)
    run._send(2)
    run.close()
    return url


def steps(url):
    return [line["step"] for line in list_steps(url) if line["committed"]]


def key(bucket, part, step=2):
    """An object of a step, by a part of its name."""
    return next(k for k in bucket.names() if f"/{step}-" in k and part in k)


def change(bucket, name, how):
    data, generation = bucket.objects[name]
    bucket.objects[name] = how(data), generation


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@BOTH
def test_a_new_machine_goes_on_from_the_store(tmp_path, plan, url, bucket, caplog):
    """Bit for bit, on another mesh, and the next save goes there; what is kept there is what `keep` says. The fault in mind:
    a run that begins anew beside its own checkpoints."""
    with Checkpointer(tmp_path / "a", every=1, keep=2, keep_every=3, durable=url) as checkpointer:
        assert int(checkpointer.restore_or_init(plan).step) == 0
        for step in range(1, 7):
            assert checkpointer.save(at_step(plan.init(step), step), force=True)
    assert folder.steps(tmp_path / "a") == steps(url) == [3, 5, 6]
    other = FakePlan(mesh_of(tensor=2))
    with Checkpointer(tmp_path / "b", every=1, keep=1, durable=url) as checkpointer:
        state = checkpointer.restore_or_init(other)
        assert equal(state, at_step(plan.init(6), 6)) and checkpointer.restored["step"] == 6
        assert checkpointer.durable_step() == 6 and folder.steps(tmp_path / "b") == [6]
        assert checkpointer.save(at_step(state, 7))
    assert steps(url) == folder.steps(tmp_path / "b") == [7]
    named = head.place_of(7, (tmp_path / "b/7/manifest.json").read_bytes())
    assert {name.split("/")[1] for name in bucket.names()} == {"head.json", named}
    assert "planted-secret" not in caplog.text + json.dumps([repr(v) for v in bucket.objects.values()])


def test_the_newer_of_folder_and_store(tmp_path, plan, two, sent):
    """An older folder takes what the store has; a newer one gives. The fault in mind: the folder always wins."""
    shutil.copytree(two / "1", tmp_path / "old/1")
    with Checkpointer(tmp_path / "old", durable=sent) as checkpointer:
        assert int(checkpointer.restore_or_init(plan).step) == 2
        assert folder.steps(tmp_path / "old") == [1, 2]
        assert checkpointer.save(at_step(plan.init(3), 3), step=3, force=True)
    shutil.copytree(tmp_path / "old/3", tmp_path / "new/9")
    with Checkpointer(tmp_path / "new") as checkpointer:
        checkpointer.save(at_step(plan.init(4), 4), force=True)
    shutil.rmtree(tmp_path / "new/9")
    with Checkpointer(tmp_path / "new", durable=sent) as checkpointer:
        assert int(checkpointer.restore_or_init(plan).step) == 4
    assert steps(sent) == [3, 4]  # the newest two, with nothing saved


def test_a_future_that_was_abandoned_leaves_with_the_commit(tmp_path, plan, url):
    """Going on from step 1: steps 2 and 3 are there until 2 is made anew, then gone with that commit. The fault in mind: a
    start that resumes the old step 3."""
    with Checkpointer(tmp_path, keep=None, durable=url) as checkpointer:
        checkpointer.restore_or_init(plan)
        for step in (1, 2, 3):
            checkpointer.save(at_step(plan.init(step), step), step=step, force=True)
    assert steps(url) == [1, 2, 3]
    with Checkpointer(tmp_path, keep=None, durable=url) as checkpointer:
        state = checkpointer.restore(plan, 1)
        assert steps(url) == [1, 2, 3]
        checkpointer.save(at_step(plan.init(9), 2), step=2, force=True)
        checkpointer.save(at_step(state, 4), step=4, force=True)
    assert steps(url) == [1, 2, 4]
    with Checkpointer(tmp_path / "new", durable=url) as checkpointer:
        checkpointer.restore_or_init(plan)
    assert equal(Checkpointer(tmp_path).restore(plan, 2), at_step(plan.init(9), 2))


def test_another_run_of_the_store_is_refused(tmp_path, plan, sent):
    """Without a restore, before anything there is replaced. The fault in mind: step 1 of a new run throws out the old steps."""
    with (
        pytest.raises(CheckpointError, match="store holds step 2, and this run is at step 1"),
        Checkpointer(tmp_path, every=1, durable=sent) as checkpointer,
    ):
        checkpointer.save(at_step(plan.init(0), 1))
    assert steps(sent) == [1, 2]


@BOTH
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "manifest"])
def test_a_damaged_step_of_the_store(tmp_path, plan, bucket, sent, how, caplog):
    """Found before it is put in place, told, set aside with its files, and the step before is taken; `verify` finds it too.
    Failed when parts were not compared with their digests."""
    name = key(bucket, "manifest.json" if how == "manifest" else "ocdbt.process_0/d")
    if how == "gone":
        del bucket.objects[name]
    else:
        change(bucket, name, (lambda data: data[:-1]) if how == "cut" else flipped)
    kept = set(bucket.names())
    found = verify(sent)["steps"]
    assert [(s["step"], s["intact"]) for s in found] == [(1, True), (2, False)]
    assert ("manifest.json" if how == "manifest" else "ocdbt.process_0") in found[1]["problems"][0]
    with Checkpointer(tmp_path, durable=sent) as checkpointer:
        assert equal(checkpointer.restore_or_init(plan), at_step(plan.init(1), 1))
        assert steps(sent) == folder.steps(tmp_path) == [1]
        assert "passed over" in caplog.text
        checkpointer.save(at_step(plan.init(2), 2), step=2, force=True)
    assert steps(sent) == [1, 2] and kept <= set(bucket.names())


def test_no_step_of_the_store_is_intact(tmp_path, plan, bucket, sent):
    """Refused, whoever asks and however often, and nothing moved. The fault in mind: the second start begins anew."""
    for step in (1, 2):
        change(bucket, key(bucket, "_METADATA", step), flipped)
    for _ in range(2):
        with Checkpointer(tmp_path, durable=sent) as checkpointer:
            with pytest.raises(CheckpointError, match="none of the 2 checkpoints in the store is intact"):
                checkpointer.restore_or_init(plan)
            assert checkpointer._durable._lease.content["aside"] == {} and not folder.unfinished(tmp_path)


def test_damage_in_the_folder_is_made_good_by_the_store(tmp_path, plan, two, sent):
    """The fault in mind: `none is intact` while the store has it whole."""
    shutil.copytree(two / "2", tmp_path / "2")
    data = max((tmp_path / "2").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    data.write_bytes(flipped(data.read_bytes()))
    with Checkpointer(tmp_path, durable=sent) as checkpointer:
        assert equal(checkpointer.restore_or_init(plan), at_step(plan.init(2), 2))
    assert folder.steps(tmp_path) == [2] and (tmp_path / "2.damaged").is_dir()


@BOTH
@pytest.mark.parametrize("fault", [503, 403, "drop", "lost", "short", 1.0])
def test_a_store_that_fails_costs_no_step_of_the_run(
    tmp_path, plan, two, url, bucket, fault, monkeypatch, caplog
):
    """The save is on disk, the run told what is not kept, the last good step stays there, and the next save tries again.
    Failed for `short` without the look at the last byte, for `drop` when an error of the store ended the thread."""
    monkeypatch.setattr(store, "ANSWER", 0.4)
    run = Durable(url, two, None, None)
    run.open()
    run._send(1)
    bucket.fault = lambda n, method, name: None if "head.json" in name else fault
    run._send(2)
    assert run.newest == 1 and "step 2 is in" in caplog.text and "newest there: step 1, since" in caplog.text
    bucket.fault = lambda *_: None
    assert steps(url) == [1]
    run._send(2)
    run.close()
    assert steps(url) == [1, 2] and all(s["intact"] for s in verify(url)["steps"])


def test_saving_goes_on_while_the_store_fails(tmp_path, plan, url, bucket, caplog):
    """Through the Checkpointer: saves come due, retention leaves what is on its way, the end waits and tells. The fault in
    mind: an exception in the loop."""
    caplog.set_level(logging.INFO, "shardtrain")
    with Checkpointer(tmp_path, every=1, keep=1, durable=url) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        bucket.fault = lambda *_: 503
        for step in (1, 2, 3):
            assert checkpointer.save(at_step(state, step), step=step, force=step == 3)
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
    assert (
        checkpointer.durable_step() is None
        and "step 3 is in" in caplog.text
        and "newest there: none" in caplog.text
    )
    assert "not released" in caplog.text
    bucket.fault = lambda *_: None
    with Checkpointer(
        tmp_path, durable=url
    ) as checkpointer:  # the same folder need not wait for a sign of itself
        checkpointer.restore_or_init(plan)
    assert checkpointer.durable_step() == 3 and steps(url) == [3]


def test_retention_leaves_what_is_on_its_way(tmp_path, plan, url, bucket):
    """Step 1 is still being sent when 2 and 3 replace it in the folder. Failed when retention did not ask."""
    gate = threading.Event()
    with Checkpointer(tmp_path, every=1, keep=1, durable=url) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        bucket.fault = lambda n, method, name: gate.wait(20) and None
        for step in (1, 2, 3):
            checkpointer.save(at_step(state, step), step=step)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
        gate.set()
    assert steps(url) == [1]  # 2 and 3 fell due while 1 was on its way
    with Checkpointer(tmp_path, durable=url) as checkpointer:
        checkpointer.restore_or_init(plan)
    assert steps(url) == [1, 3]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (403, CheckpointError, "PERMISSION_DENIED"),
        (503, RunError, "retry"),
        ("drop", RunError, "cannot be known"),
    ],
)
def test_a_store_that_cannot_be_asked_at_the_start(tmp_path, url, bucket, fault, kind, said):
    """Refused before step 0: as wrong input where no time heals it, else as a run to be tried again. Failed when only
    CheckpointErrors let go of the folder's lock."""
    bucket.fault = lambda *_: fault
    with pytest.raises(kind, match=said) as caught, Checkpointer(tmp_path, durable=url):
        pass
    assert caught.value.where == url and caught.value.fix
    with Checkpointer(tmp_path):
        pass


@pytest.mark.parametrize(
    "url", ["gs://bucket", "s3://b/../x", "http://b/x", "gs://b/x?y=1", "gs://B/x", "s3://b//x"]
)
def test_urls_that_are_none(tmp_path, url):
    """The fault in mind: the whole bucket as the folder."""
    with pytest.raises(CheckpointError, match="not the URL of a folder in a store"):
        Checkpointer(tmp_path, durable=url)


def test_a_bucket_that_is_not_there(tmp_path, bucket):
    """One message, with its name. The fault in mind: `missing` taken for `empty`."""
    with (
        pytest.raises(CheckpointError, match="gs://nowhere/run") as caught,
        Checkpointer(tmp_path, durable="gs://nowhere/run"),
    ):
        pass
    assert "NOT_FOUND" in caught.value.message


@BOTH
def test_large_files_travel_in_parts(tmp_path, plan, url, bucket, monkeypatch):
    """One object for each digest, put together again. Failed when a part was written at the start of its file."""
    monkeypatch.setattr(digests, "CHUNK", 1000)
    with Checkpointer(tmp_path / "a", durable=url) as checkpointer:
        checkpointer.save(at_step(plan.init(5), 5), force=True)
    parts = [name for name in bucket.names() if ".part-" in name]
    assert len(parts) > 5 and all(len(bucket.objects[name][0]) <= 1000 for name in parts)
    with Checkpointer(tmp_path / "b", durable=url) as checkpointer:
        assert equal(checkpointer.restore_or_init(plan), at_step(plan.init(5), 5))


@pytest.mark.parametrize("name", ["../../out", "/out", "arrays/../../../out", "a\\b", "./out"])
def test_names_that_lead_elsewhere(tmp_path, bucket, sent, name):
    """A manifest that was made to write outside its folder. Failed without the check: the file was there."""
    run = Durable(sent, tmp_path / "new", None, None)
    (tmp_path / "new").mkdir()
    data = bucket.objects[key(bucket, "manifest.json", 2)][0]
    content = manifest.unseal(data.decode())
    content["files"] = {name: 4}
    content["digests"] = {name: [digests.of(b"evil")]}
    sealed = manifest.seal(content).encode()
    place = head.place_of(2, sealed)
    run.store.write(f"{place}/{folder.MANIFEST}", sealed)
    run.store.write(f"{place}/{name}".replace("//", "/"), b"evil")
    run.open()
    run._lease.change(lambda content: content["steps"].update({"2": {"place": place}}))
    before = set(tmp_path.rglob("*"))
    assert run.fetch(None) == 1
    run.close()
    new = [
        file for file in set(tmp_path.rglob("*")) - before if file.is_file() and file.read_bytes() == b"evil"
    ]
    assert not new and not Path("/out").exists()


@pytest.mark.parametrize("how", ["gone", "spoilt"])
def test_a_head_that_is_lost(tmp_path, plan, bucket, sent, how, caplog):
    """Steps that are whole are found by their manifests; what was cut off is not among them. The fault in mind: an empty
    store, and all of its steps purged."""
    del bucket.objects[key(bucket, "manifest.json", 1)]
    if how == "gone":
        del bucket.objects["run/head.json"]
    else:
        change(bucket, "run/head.json", flipped)
    with Checkpointer(tmp_path, durable=sent) as checkpointer:
        assert equal(checkpointer.restore_or_init(plan), at_step(plan.init(2), 2))
    assert f"head.json is {'missing' if how == 'gone' else 'damaged'}" in caplog.text and steps(sent) == [2]


def test_a_head_of_a_newer_shardtrain(sent, bucket):
    """Refused. The fault in mind: rebuilt, and what it does not know of thrown away."""
    change(bucket, "run/head.json", lambda data: data.replace(b'"format": 1', b'"format": 2'))
    change(bucket, "run/head.json", lambda data: manifest.seal({"format": 2}).encode())
    with pytest.raises(CheckpointError, match="newer than this shardtrain"):
        list_steps(sent)


def test_each_process_sends_its_own_files(tmp_path, two, url, bucket, monkeypatch):
    """Process 0 commits once the parts of process 1 are there, and not without. Failed when it did not wait."""
    monkeypatch.setattr(transfer, "PATIENCE", 0.1)
    monkeypatch.setattr(transfer.commit, "writer", lambda name: int("ocdbt.process_0" in name))
    kept = store.Store(url)
    with pytest.raises(store.StoreError, match=r"has not got \d parts of other processes"):
        transfer.upload(kept, two, 2, process=0, processes=2)
    assert not [name for name in bucket.names() if "ocdbt.process_0" in name or "manifest.json" in name]
    monkeypatch.setattr(transfer, "PATIENCE", 20)
    other = threading.Timer(0.3, transfer.upload, (kept, two, 2), {"process": 1, "processes": 2})
    other.start()
    entry = transfer.upload(kept, two, 2, process=0, processes=2)
    other.join()
    assert entry["place"] == head.place_of(2, (two / "2/manifest.json").read_bytes())
    assert f"run/{entry['place']}/manifest.json" in bucket.names()


def test_what_is_there_is_not_sent_again(two, url, bucket):
    """After half of it went through. The fault in mind: a slow link that begins from the start at every save."""
    kept, sent = store.Store(url), []
    bucket.fault = lambda n, method, name: sent.append((method, name)) or (503 if len(sent) > 8 else None)
    with pytest.raises(store.StoreError):
        transfer.upload(kept, two, 2)
    first = {name for method, name in sent[:7] if method == "POST"} & set(bucket.names())
    sent.clear()
    bucket.fault = lambda n, method, name: sent.append((method, name))
    transfer.upload(kept, two, 2)
    assert len(first) >= 3 and not first & {name for method, name in sent if method == "POST"}
    assert {name for method, name in sent if method == "POST"} | first == set(bucket.names())
