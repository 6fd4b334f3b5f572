"""A run with a durable tier from the shell: on a new machine, with a store that fails, with another run's store."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit/checkpoint"))
from fake_stores import BUCKET, FakeStore

URL = f"gs://{BUCKET}/run"
SMALL = ["--mesh.data", "8", "--mesh.fsdp", "1", "--mesh.tensor", "1", "--eval-every", "0", "--sample", ""]
COMMAND = [*SMALL, "--model.layers", "1", "--optimizer.decay", "constant", "--durable", URL]


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        found = FakeStore()
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", found.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "planted-secret")
        yield found
        found.shutdown()
        found.server_close()


@pytest.fixture(autouse=True)
def impatient(server, monkeypatch):
    from shardtrain.checkpoint import head, store

    monkeypatch.setattr(store, "RETRIES", {"max_retries": 1, "initial_delay": "1ms", "max_delay": "2ms"})
    monkeypatch.setattr(head, "LEASE", 0.5)
    server.fault = lambda *_: None


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_from_machine_to_machine(config_in, tmp_path_factory, server, as_json, shardtrain):
    """Three steps on one machine, the last one kept by it alone (exit 3); the same command sends it. Two new machines, an empty
    folder each, go on by `train` and by `resume`, and end as one does that never stopped. Failed when a run from the store had
    no config.json, and when the exit code did not look at the store."""
    tmp = tmp_path_factory.mktemp("durable")
    config = config_in(tmp)
    first = ["train", config, *COMMAND, "--output", str(tmp / "a"), "--steps", "3"]
    server.fault = lambda n, method, key: 503 if method == "POST" and "/3-" in key else None
    code, found = as_json(*first)
    assert (code, found["steps"], found["durable"]) == (3, 3, {"url": URL, "step": 2})
    server.fault = lambda *_: None
    code, found = as_json(*first)
    assert (code, found["resumed_from"], found["durable"]["step"]) == (0, 3, 3)
    code, listed = as_json("ckpt", "ls", URL)
    assert code == 0 and [(s["step"], s["committed"]) for s in listed["steps"]] == [(2, True), (3, True)]
    assert as_json("ckpt", "inspect", URL)[1]["step"] == 3

    code, out, _ = shardtrain("resume", tmp / "b", "--dry-run", "--durable", URL, "--steps", "6")
    assert code == 0 and "step 3 goes on at row 48" in out and not (tmp / "b").exists()
    stored = dict(server.objects)
    code, found = as_json("resume", tmp / "b", "--durable", URL, "--steps", "6")
    assert (code, found["resumed_from"], found["steps"], found["durable"]["step"]) == (0, 3, 6, 6)
    server.objects.clear()
    server.objects.update(stored)
    code, found = as_json("train", config, *COMMAND, "--output", str(tmp / "c"), "--steps", "6")
    assert (code, found["resumed_from"]) == (0, 3) and losses(tmp / "c") == losses(tmp / "b")
    code, found = as_json("train", config, *COMMAND[:-2], "--output", str(tmp / "d"), "--steps", "6")
    assert found["durable"] is None and {s: losses(tmp / "d")[s] for s in (4, 5, 6)} == losses(tmp / "b")
    assert json.loads((tmp / "c/config.json").read_text())["groups"] == 8
    code, found = as_json("ckpt", "verify", URL)
    assert code == 0 and all(step["intact"] for step in found["steps"])

    for more, said in (
        (["--seed", "7"], ["holds a run of another config", URL, "seed was 0, is 7"]),
        (["--fresh"], ["the store holds checkpoints", "another --durable"]),
    ):
        code, _, err = shardtrain(
            "train", config, *COMMAND, "--output", str(tmp / "e"), "--steps", "6", *more
        )
        assert code == 2 and all(words in err for words in said) and "Traceback" not in err
        assert not (tmp / "e").exists()
    texts = [f.read_text(errors="ignore") for f in tmp.rglob("*") if f.suffix in (".log", ".json", ".jsonl")]
    assert "planted-secret" not in "".join(texts)


@pytest.mark.parametrize(
    ("arguments", "fault", "code", "said"),
    [
        (["ckpt", "ls", "gs://bucket/other"], None, 0, []),
        (["ckpt", "verify", "gs://bucket/other"], None, 2, ["no checkpoint here", "gs://bucket/other"]),
        (["ckpt", "ls", "http://bucket/run"], None, 2, ["not the URL of a folder in a store"]),
        (["ckpt", "ls", URL], 403, 2, ["PERMISSION_DENIED", "credentials"]),
        (["ckpt", "ls", URL], 503, 3, ["the store did not give head.json"]),
        (
            ["resume", "RUN", "--durable", "gs://bucket/other"],
            None,
            2,
            ["no config.json", "gs://bucket/other"],
        ),
        (["resume", "RUN"], None, 2, ["no config.json", "--durable URL"]),
    ],
)
def test_refused_in_one_message(tmp_path, server, shardtrain, arguments, fault, code, said):
    """The fault in mind: a traceback of TensorStore."""
    server.fault = lambda *_: fault
    found, _, err = shardtrain(*[str(tmp_path / "run") if a == "RUN" else a for a in arguments])
    assert found == code and all(words in err for words in said) and "Traceback" not in err
