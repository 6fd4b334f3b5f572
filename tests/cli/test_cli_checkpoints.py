"""Checkpoints from the shell: what is verified, and what goes on."""

import json
import os
import shutil
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "import sys; from shardtrain.cli import main; sys.exit(main(sys.argv[1:]))"]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "copy")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_verify(run, as_json, shardtrain):
    """Exit 0, then 1 with the file's name. The fault in mind: exit 0 whatever was found."""
    code, found = as_json("ckpt", "verify", run)
    assert code == 0 and found["path"].endswith("copy/checkpoints")
    assert [(s["step"], s["committed"], s["intact"], s["problems"]) for s in found["steps"]] == [
        (4, True, True, []),
        (6, True, True, []),
    ]
    data = max((run / "checkpoints/6/arrays").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    flip(data)
    (run / "checkpoints/.saving/8").mkdir(parents=True)
    code, found = as_json("ckpt", "verify", run)
    assert code == 1 and [s["intact"] for s in found["steps"]] == [True, False, False]
    assert data.name in found["steps"][1]["problems"][0]
    assert as_json("ckpt", "verify", run, "--step", "4")[0] == 0
    code, out, _ = shardtrain("ckpt", "verify", run)
    assert code == 1 and data.name in out
    code, _, err = shardtrain("ckpt", "verify", run, "--step", "5")
    assert code == 2 and "no step 5" in err and "steps: 4, 6" in err


@pytest.fixture(scope="module")
def halves(config_in, tmp_path_factory):
    """A run of six steps, and the same one as it was at step 3."""
    from shardtrain.cli import main

    folder = tmp_path_factory.mktemp("halves")
    command = ["train", config_in(folder), "--optimizer.decay", "constant", "--eval-every", "0"]
    for name, steps in (("whole", 6), ("half", 3)):
        assert main([*command, "--steps", str(steps), "--output", str(folder / name)]) == 0
    return folder


def test_resume_is_bit_for_bit_on_the_same_mesh(halves, tmp_path, as_json, shardtrain):
    """As the dry run says. The fault in mind: the config's own output instead of RUN."""
    run = shutil.copytree(halves / "half", tmp_path / "moved")
    before = sorted(run.rglob("*"))
    code, found = as_json("resume", run, "--dry-run", "--steps", "6")
    assert code == 0 and found["bit_for_bit"] and found["close"] == [] and sorted(run.rglob("*")) == before
    assert (found["step"], found["cursor"], found["groups"], found["global_batch"]) == (3, 48, 4, 16)
    assert {line["what"] for line in found["identical"]} >= {"rows", "keys", "groups", "schedule"}
    code, found = as_json("resume", run, "--steps", "6")
    assert code == 0 and (found["resumed_from"], found["steps"], found["run"]) == (3, 6, str(run))
    assert losses(run) == losses(halves / "whole")
    code, found = as_json("resume", run, "--optimizer.learning-rate", "1")
    assert code == 2 and "learning_rate was 0.003" in found["error"]["message"]


def test_resume_on_fewer_devices(halves, tmp_path, as_json):
    """Groups kept, more microbatches; the dry run names the axes whose sums change, and the losses are close. The
    fault in mind: groups of the new mesh."""
    run = shutil.copytree(halves / "half", tmp_path / "run")
    code, found = as_json("resume", run, "--dry-run", "--steps", "6", "--devices", "2")
    assert code == 0 and not found["bit_for_bit"]
    assert (found["mesh"], found["groups"], found["microbatches"], found["global_batch"]) == (
        {"tensor": 2},
        4,
        4,
        16,
    )
    assert [line["what"] for line in found["close"]] == [
        "sums over data",
        "sums over fsdp",
        "sums over groups",
    ]
    assert "data=2 was, data=1 is" in found["close"][0]["why"]
    assert any("takes 4 microbatches a step, it took 1" in line["why"] for line in found["identical"])
    command = [*COMMAND, "resume", str(run), "--steps", "6", "--devices", "2", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["resumed_from"], found["groups"], found["mesh"]) == (3, 4, {"tensor": 2})
    resumed, whole = losses(run), losses(halves / "whole")
    assert resumed == pytest.approx(whole, rel=1e-5) and {s: resumed[s] for s in (1, 2, 3)} == {
        s: whole[s] for s in (1, 2, 3)
    }


def test_resume_says_what_is_damaged(halves, tmp_path, shardtrain):
    """And where it would go on. The fault in mind: the newest step, unread."""
    run = shutil.copytree(halves / "half", tmp_path / "run")
    (run / "checkpoints/3/manifest.json").unlink()
    code, out, _ = shardtrain("resume", run, "--dry-run")
    assert code == 0 and "step 3 is damaged" in out and "step 2 goes on at row 32" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], ["nowhere", "no config.json"]),
        (["RUN", "--dry-run", "--devices", "0"], ["0 devices", "--devices"]),
        (["RUN", "--dry-run", "--devices", "3"], ["3", "groups"]),
        (["RUN", "--dry-run", "--seed", "7"], ["seed was 0, is 7"]),
    ],
)
def test_resume_refuses(halves, arguments, said, shardtrain):
    """One message, exit 2. The fault in mind: a traceback of the mesh."""
    code, _, err = shardtrain("resume", *[halves / "half" if a == "RUN" else a for a in arguments])
    assert code == 2 and all(words in err for words in said), err
    assert "Traceback" not in err
