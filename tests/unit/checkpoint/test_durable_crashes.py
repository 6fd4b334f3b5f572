"""Cut off at any request: what a store names is whole, and the step before stays until the next one is named."""

import itertools
import shutil

import pytest
from checkpoint_fakes import files

from shardtrain.checkpoint import folder, head, store
from shardtrain.checkpoint.durable import Durable


def leave(run):
    """As a process does that is killed: no word to the store."""
    if run._lease is not None:
        run._lease._stop.set()
        run._lease._thread.join()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("last", ["drop", "lost"])
def test_cut_off_at_every_request(two, tmp_path, bucket, url, last):
    """A run that committed step 1 sends step 2, and dies before (or right after) its k-th request, for every k. A new
    machine then finds step 1 or 2, every byte of it, and step 2 where it was said to be there; the run itself goes on
    in its folder and leaves nothing but what is named. Failed when the head was written before the files, and when old files
    were removed before the head."""
    run = Durable(url, two, 1, None)
    run.open()
    run._send(1)
    run.close()
    before = dict(bucket.objects)

    def attempt(k):
        """Whether it came to an end before the k-th request; what it believes is there."""
        bucket.objects.clear()
        bucket.objects.update(before)
        bucket.count = 0
        bucket.fault = lambda n, *_: None if n < k else last if n == k else "drop"
        run = Durable(url, two, 1, None)
        try:
            run.open()
            run._send(2)
        except Exception:
            assert run._lease is None
        believed, ended = run.newest, bucket.count <= k
        leave(run)
        bucket.fault = lambda *_: None
        return ended, believed

    for k in itertools.count():
        ended, believed = attempt(k)
        there = tmp_path / f"new{k}"
        there.mkdir()
        other = Durable(url, there, 1, None)
        other.open()
        step = other.fetch(None)
        assert step == 2 if believed == 2 else step in (1, 2), (k, step, believed)
        folder.publish(there, step)
        assert files(there / str(step)) == files(two / str(step)), k
        other.close()
        shutil.rmtree(there)
        again = Durable(url, two, 1, None)
        again.open()
        again._send(2)
        again.close()
        assert {key.split("/")[1] for key in bucket.names()} == {
            "head.json",
            head.place_of(2, (two / "2/manifest.json").read_bytes()),
        }
        if ended:
            break
    assert k > 15 and (believed, step) == (2, 2)
    assert store.Store(url).names() == [key.removeprefix("run/") for key in bucket.names()]
