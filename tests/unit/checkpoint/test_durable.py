"""A store beside the folder: what comes back, what a failing store costs, and what is refused."""

import json
import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
from checkpoint_fakes import FakePlan, at_step, equal, files, make_step, mesh_of

from shardtrain.checkpoint import (
    Checkpointer,
    commit,
    digests,
    folder,
    head,
    inspect,
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


@pytest.fixture
def durable(url, tmp_path):
    """Durables that are open, on folders of their own unless one is given; all closed in the end."""
    made = []

    def make(path="new", keep=None, keep_every=None):
        path = tmp_path / path
        path.mkdir(exist_ok=True)
        made.append(Durable(url, path, keep, keep_every))
        made[-1].open()
        return made[-1]

    yield make
    for run in made:
        run.close()


@pytest.fixture
def sent(two, durable, url):
    """The steps of `two` in the store."""
    run = durable(two)
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


def test_a_new_machine_goes_on_from_the_store(tmp_path, plan, url, bucket, caplog):
    """Bit for bit, on another mesh, and the next save goes there; then nothing is there but what is named. The fault in
    mind: a run that begins anew beside its own checkpoints."""
    with Checkpointer(tmp_path / "a", every=1, keep=1, durable=url) as checkpointer:
        assert int(checkpointer.restore_or_init(plan).step) == 0
        for step in (1, 2):
            assert checkpointer.save(at_step(plan.init(step), step), force=True)
    assert folder.steps(tmp_path / "a") == steps(url) == [2]
    assert inspect(url)["parameters"] == inspect(tmp_path / "a")["parameters"] > 0
    other = FakePlan(mesh_of(tensor=2))
    with Checkpointer(tmp_path / "b", every=1, keep=1, durable=url) as checkpointer:
        state = checkpointer.restore_or_init(other)
        assert equal(state, at_step(plan.init(2), 2)) and checkpointer.restored["step"] == 2
        assert checkpointer.durable_step() == 2 and folder.steps(tmp_path / "b") == [2]
        assert checkpointer.save(at_step(state, 3))
    assert steps(url) == folder.steps(tmp_path / "b") == [3]
    named = head.place_of(3, (tmp_path / "b/3/manifest.json").read_bytes())
    assert {name.split("/")[1] for name in bucket.names()} == {"head.json", named}
    data = max((tmp_path / "b/3").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    data.write_bytes(flipped(data.read_bytes()))
    with Checkpointer(tmp_path / "b", durable=url) as checkpointer:  # damage here is made good by the store
        assert equal(checkpointer.restore_or_init(plan), at_step(plan.init(2), 3))
    assert folder.steps(tmp_path / "b") == [3] and (tmp_path / "b/3.damaged").is_dir()


def test_the_newer_of_folder_and_store(tmp_path, sent, durable):
    """An older folder takes what the store has; a newer one gives. The fault in mind: the folder always wins."""
    run = durable()
    assert run.fetch(2) is None and run.fetch(1) == 2
    run.goes_on(2)
    run.close()
    assert steps(sent) == [1, 2]
    make_step(tmp_path / "new", 4)
    run = durable(keep=2)
    assert run.fetch(4) is None
    run.goes_on(4)
    run.close()
    assert steps(sent) == [2, 4]


@BOTH
def test_what_is_kept(tmp_path, url, durable, bucket):
    """As in a folder. Failed when what keep_every holds counted among the newest two."""
    run = durable(keep=2, keep_every=3)
    for step in range(1, 7):
        make_step(tmp_path / "new", step)
        run._send(step)
    assert steps(url) == [3, 5, 6]
    assert sorted({int(name.split("/")[1].partition("-")[0]) for name in bucket.names() if "-" in name}) == [3, 5, 6]  # fmt: skip


def test_a_future_that_was_abandoned_leaves_with_the_commit(tmp_path, two, sent, durable):
    """Going on from step 1: step 2 is there until it is made anew, and 3 with it; what is made then stays. Failed with
    steps of this run counted among those of the abandoned one."""
    make_step(tmp_path / "new", 3)
    run = durable()
    run._send(3)
    assert steps(sent) == [1, 2, 3]
    run.goes_on(1)
    assert steps(sent) == [1, 2, 3]
    made = make_step(tmp_path / "new", 2, seed=9)
    run._send(2)
    assert steps(sent) == [1, 2] and inspect(sent, 2)["digests"] == manifest.read(made.parent, 2)["digests"]
    make_step(tmp_path / "new", 5)
    run._send(5)
    assert steps(sent) == [1, 2, 5]


def test_another_run_of_the_store_is_refused(tmp_path, plan, sent):
    """Without a restore, before anything there is replaced. The fault in mind: step 1 of a new run throws out the old steps."""
    with (
        pytest.raises(CheckpointError, match="store holds step 2, and this run is at step 1"),
        Checkpointer(tmp_path / "new", every=1, durable=sent) as checkpointer,
    ):
        checkpointer.save(at_step(plan.init(0), 1))
    assert steps(sent) == [1, 2]


@BOTH
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "manifest"])
def test_a_damaged_step_of_the_store(tmp_path, two, bucket, sent, durable, how, caplog):
    """Found before it is put in place, told, set aside with its files, and the step before is taken; `verify` finds it too.
    Failed when parts were not compared with their digests."""
    name = key(bucket, "manifest.json" if how == "manifest" else "d/data")
    if how == "gone":
        del bucket.objects[name]
    else:
        change(bucket, name, (lambda data: data[:-1]) if how == "cut" else flipped)
    kept = set(bucket.names())
    found = verify(sent)["steps"]
    assert [(s["step"], s["intact"]) for s in found] == [(1, True), (2, False)]
    assert ("manifest.json" if how == "manifest" else "d/data") in found[1]["problems"][0]
    run = durable()
    assert run.fetch(None) == 1 and steps(sent) == [1] and "passed over" in caplog.text
    assert not folder.saving_folder(tmp_path / "new", 2).exists()
    folder.publish(tmp_path / "new", 1)
    assert files(tmp_path / "new/1") == files(two / "1")
    make_step(tmp_path / "new", 2, seed=1)
    run.goes_on(1)
    run._send(2)
    assert steps(sent) == [1, 2] and kept <= set(bucket.names())


def test_no_step_of_the_store_is_intact(bucket, sent, durable):
    """Refused, however often, and nothing moved. The fault in mind: the second start begins anew."""
    for step in (1, 2):
        change(bucket, key(bucket, "_METADATA", step), flipped)
    for _ in range(2):
        run = durable()
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints in the store is intact"):
            run.fetch(None)
        assert run._lease.content["aside"] == {} and not folder.unfinished(run._path)
        run.close()


@BOTH
@pytest.mark.parametrize("fault", [503, 403, "drop", "lost", "short", 1.0])
def test_a_store_that_fails_costs_no_step_of_the_run(two, url, bucket, durable, fault, monkeypatch, caplog):
    """The run is told what is not kept, the last good step stays there, and the next try sends it. Failed for `short`
    without the look at the last byte, and for `drop` when an error of the store ended the thread."""
    monkeypatch.setattr(store, "ANSWER", 0.4)
    run = durable(two)
    run._send(1)
    spared = ("head.json", "manifest.json") if fault == "short" else ("head.json",)
    bucket.fault = lambda n, method, name: None if name.endswith(spared) else fault
    run._send(2)
    assert run.newest == 1 and "step 2 is in" in caplog.text and "newest there: step 1, since" in caplog.text
    bucket.fault = lambda *_: None
    assert steps(url) == [1]
    run._send(2)
    assert steps(url) == [1, 2] and all(s["intact"] for s in verify(url)["steps"])
    assert "planted-secret" not in caplog.text


def test_saving_goes_on_while_the_store_fails(tmp_path, plan, url, bucket, caplog):
    """Through the Checkpointer: saves come due, the end waits and tells, and a start sends what is missing. The fault in
    mind: an exception in the loop."""
    with Checkpointer(tmp_path, every=1, keep=1, durable=url) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        bucket.fault = lambda *_: 503
        for step in (1, 2):
            assert checkpointer.save(at_step(state, step), step=step, force=step == 2)
        checkpointer.wait()
        assert checkpointer.latest_step() == 2
    assert checkpointer.durable_step() is None
    assert (
        "step 2 is in" in caplog.text
        and "newest there: none" in caplog.text
        and "not released" in caplog.text
    )
    bucket.fault = lambda *_: None
    with Checkpointer(
        tmp_path, durable=url
    ) as checkpointer:  # the same folder need not wait for a sign of itself
        checkpointer.restore_or_init(plan)
    assert checkpointer.durable_step() == 2 and steps(url) == [2]


def test_retention_leaves_what_is_on_its_way(tmp_path, plan, url, bucket):
    """Step 1 is still being sent when 2 and 3 replace it in the folder; the last of these goes in the end. Failed when
    retention did not ask, and when only steps that had fallen due at a free moment were sent."""
    gate = threading.Event()
    with Checkpointer(tmp_path, every=1, keep=1, durable=url) as checkpointer:
        bucket.fault = lambda n, method, name: gate.wait(100) and None if "-" in name else None
        state = plan.init(0)
        for step in (1, 2, 3):
            checkpointer.save(at_step(state, step), step=step)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
        gate.set()
    assert steps(url) == [3]  # 2 and 3 fell due while 1 was on its way; the last one goes in the end


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (403, CheckpointError, "PERMISSION_DENIED"),
        (503, RunError, "retry"),
        ("drop", RunError, "cannot be known"),
    ],
)
def test_a_store_that_cannot_be_asked_at_the_start(tmp_path, url, bucket, fault, kind, said):
    """Refused before step 0: as wrong input where no time heals it, else as a run to be tried again. The fault in mind: the
    lock of the folder is kept."""
    bucket.fault = lambda *_: fault
    with pytest.raises(kind, match=said) as caught, Checkpointer(tmp_path, durable=url):
        pass
    assert caught.value.where == url and caught.value.fix
    with Checkpointer(tmp_path):
        pass


URLS = ["gs://bucket", "s3://b/../x", "http://b/x", "gs://b/x?y=1", "gs://B/x", "s3://b//x"]


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_none(tmp_path, url):
    """The fault in mind: the whole bucket as the folder."""
    with pytest.raises(CheckpointError, match="not the URL of a folder in a store"):
        Checkpointer(tmp_path, durable=url)


def test_a_bucket_that_is_not_there(tmp_path, bucket):
    """One message, with its name. The fault in mind: `missing` taken for `empty`."""
    run = Durable("gs://nowhere/run", tmp_path, None, None)
    with pytest.raises(CheckpointError, match="gs://nowhere/run") as caught:
        run.open()
    assert "NOT_FOUND" in caught.value.message


@BOTH
def test_large_files_travel_in_parts(tmp_path, url, bucket, durable, monkeypatch):
    """One object for each digest, put together again. Failed when a part was written at the start of its file."""
    monkeypatch.setattr(digests, "CHUNK", 1000)
    monkeypatch.setattr(digests, "BLOCK", 500)
    made = make_step(tmp_path / "a", 5)
    durable("a")._send(5)
    assert sorted(len(bucket.objects[name][0]) for name in bucket.names() if ".part-" in name) == [
        1,
        *[1000] * 4,
    ]
    run = durable("a")  # the same folder takes its own lease over
    run._path = tmp_path / "b"
    assert run.fetch(None) == 5
    assert files(tmp_path / "b/.saving/5") == files(made)


@pytest.mark.parametrize("name", ["../../out", "/out", "arrays/../../../out", "a\\b", "./out"])
def test_names_that_lead_elsewhere(tmp_path, bucket, sent, durable, name):
    """A manifest that was made to write outside its folder. Failed without the check: the file was there."""
    data = bucket.objects[key(bucket, "manifest.json", 2)][0]
    content = manifest.unseal(data.decode())
    content |= {"files": {name: 4}, "digests": {name: [digests.of(b"evil")]}}
    sealed = manifest.seal(content).encode()
    place = head.place_of(2, sealed)
    for part, data in ((folder.MANIFEST, sealed), (name, b"evil")):
        bucket.put(f"run/{place}/{part}", data, lambda old: True, False)
    run = durable()
    run._lease.change(lambda content: content["steps"].update({"2": {"place": place}}))
    assert run.fetch(None) == 1
    assert b"evil" not in files(tmp_path).values() and not Path("/out").exists()


@pytest.mark.parametrize("how", ["gone", "spoilt"])
def test_a_head_that_is_lost(bucket, sent, durable, how, caplog):
    """Steps that are whole are found by their manifests; what was cut off is not among them. The fault in mind: an empty
    store, and all of its steps purged."""
    del bucket.objects[key(bucket, "manifest.json", 1)]
    if how == "gone":
        del bucket.objects["run/head.json"]
    else:
        change(bucket, "run/head.json", flipped)
    run = durable()
    assert run.fetch(None) == 2 and list(run._lease.steps) == [2] and steps(sent) == [2]
    assert f"head.json is {'missing' if how == 'gone' else 'damaged'}" in caplog.text
    assert [(s["step"], s["committed"]) for s in verify(sent)["steps"]] == [(1, False), (2, True)]


def test_a_head_of_a_newer_shardtrain(sent, bucket):
    """Refused. The fault in mind: rebuilt, and what it does not know of thrown away."""
    change(bucket, "run/head.json", lambda data: manifest.seal({"format": 2}).encode())
    with pytest.raises(CheckpointError, match="newer than this shardtrain"):
        list_steps(sent)


def test_each_process_sends_its_own_files(two, url, bucket, monkeypatch):
    """Process 0 commits once the parts of process 1 are there, and not without. Failed when it did not wait."""
    monkeypatch.setattr(transfer, "PATIENCE", 0.1)
    monkeypatch.setattr(commit, "writer", lambda name: int("ocdbt.process_0" in name))
    kept = store.Store(url)
    with pytest.raises(store.StoreError, match="has not got 1 parts of other processes"):
        transfer.upload(kept, two, 2, process=0, processes=2)
    assert not [name for name in bucket.names() if "ocdbt.process_0" in name or "manifest.json" in name]
    monkeypatch.setattr(transfer, "PATIENCE", 100)
    other = threading.Timer(0.3, transfer.upload, (kept, two, 2), {"process": 1, "processes": 2})
    other.start()
    entry = transfer.upload(kept, two, 2, process=0, processes=2)
    other.join()
    assert entry["place"] == head.place_of(2, (two / "2/manifest.json").read_bytes())
    assert f"run/{entry['place']}/manifest.json" in bucket.names()


def test_what_is_there_is_not_sent_again(two, url, bucket):
    """After two of three parts went through. The fault in mind: a slow link that begins from the start at every save."""
    kept, sent = store.Store(url), []

    def late(n, method, name):  # parts go side by side: this one fails when the others are there
        if "d/data" not in name:
            return None
        end = time.monotonic() + 10
        while len(bucket.names()) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return 503

    bucket.fault = late
    with pytest.raises(store.StoreError):
        transfer.upload(kept, two, 2)
    first = set(bucket.names())
    bucket.fault = lambda n, method, name: sent.append(name) if method == "POST" else None
    transfer.upload(kept, two, 2)
    assert {name.rpartition("/")[2] for name in set(bucket.names()) - first} == {"data", "manifest.json"}
    assert not first & set(sent) and set(sent) | first == set(bucket.names())


def test_damage_here_is_not_sent(tmp_path, two, url, bucket, durable, caplog):
    """What the disk lost after the save never becomes a commit. The fault in mind: a store that holds it under a good name."""
    shutil.copytree(two / "2", tmp_path / "new/2")
    file = tmp_path / "new/2/arrays/d/data"
    file.write_bytes(flipped(file.read_bytes()))
    caplog.set_level(logging.INFO, "shardtrain")
    durable()._send(2)
    assert "arrays/d/data is not what was written" in caplog.text and steps(url) == []
    assert "data" not in json.dumps(bucket.names())
