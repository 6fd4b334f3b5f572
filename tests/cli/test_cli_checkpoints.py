"""Checkpoints from the shell: what is verified, and what goes on."""

import shutil

import pytest


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
