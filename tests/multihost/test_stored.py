"""Several processes with a durable tier: each sends its own part, and a run whose folder is gone goes on from the store."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit/checkpoint"))
from fake_stores import BUCKET, FakeStore

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch):
    """One request in seven gets 503."""
    made = FakeStore()
    made.fault = lambda n, method, key: 503 if n % 7 == 3 else None
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", made.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield made
    made.shutdown()
    made.server_close()


def test_from_two_processes_to_two_and_to_one(launch, server):
    """Process 1 is killed and all start again; then the folder is lost, and two processes, and one, go on from the store as if
    nothing had been. Each process has sent files of its own. The fault in mind: process 0 alone asked what is there."""
    whole = launch("whole", train=["--steps", "12"])
    assert whole.code == 0, whole.err[-3000:]
    stored = ["--durable", f"gs://{BUCKET}/run"]
    first = launch("stored", "--processes", "2", "--inject", "kill@step=6:process=1", train=stored)
    assert first.code == 0 and first.json["restarts"] == 1, first.err[-3000:]
    head = json.loads(next(data for key, (data, _) in server.objects.items() if key.endswith("head.json")))
    assert "8" in json.dumps(head) and first.json["result"]["durable"]["step"] == 8
    senders = {key.partition("process_")[2][:1] for key in server.names() if "process_" in key}
    assert senders == {"0", "1"}
    kept = dict(server.objects)

    for processes in ("2", "1"):
        shutil.rmtree(first.output)
        server.objects.clear()
        server.objects.update(kept)
        more = launch("stored", "--processes", processes, train=[*stored, "--steps", "12"])
        assert more.code == 0, more.err[-3000:]
        assert more.json["result"]["resumed_from"] == 8 and more.json["result"]["durable"]["step"] == 12
        assert [row["step"] for row in more.rows] == [9, 10, 11, 12]
        assert more.curve("ids") == whole.curve("ids")[8:]
        assert more.curve() == pytest.approx(whole.curve()[8:], rel=1e-6)
