"""What ends or saves a run from the shell: steps that are no numbers."""

import json


def test_a_run_that_stopped_goes_on_with_a_guard(config, tmp_path, shardtrain, as_json, monkeypatch):
    """A loss that is none ends a run without a guard, exit 3; the same command with one goes on from the last commit and
    skips the batch. The fault in mind: a guard counts as another config."""
    monkeypatch.setenv("SHARDTRAIN_INJECT", "nan@step=5")
    command = ["train", config, "--mesh.data", "8", "--eval-rows", "16"]
    code, _, err = shardtrain(*command)
    assert code == 3 and "step 5: the loss is nan" in err and "Traceback" not in err
    code, found = as_json(*command, "--guard.on-bad", "skip")
    assert (code, found["steps"], found["resumed_from"], found["skipped"]) == (0, 6, 4, 1)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped") for r in rows if "loss" in r] == [None, None, None, None, 1, 0]
