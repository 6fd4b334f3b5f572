"""Wrong inputs: exit code 2, one message with the way out, no traceback, nothing half-written."""

import errno
import json
import os
import pathlib

import pytest

BASE = ["--steps", "2", "--eval-every", "0"]


def write(folder, name, content):
    file = pathlib.Path(folder) / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


CASES = {
    "mesh product": (["--mesh.data", "3"], ["12 positions", "8 devices"]),
    "mesh too large": (["--mesh.data", "16"], ["64 positions"]),
    "two free axes": (["--mesh.data", "-1", "--mesh.fsdp", "-1"], ["-1", "data, fsdp"]),
    "unknown mesh axis": (["--mesh.model", "2"], ["mesh.model", "mesh."]),
    "axis that nothing uses": (
        ["--mesh.data", "1", "--mesh.expert", "2"],
        ["expert=2", "shards no parameter"],
    ),
    "rules do not use the mesh": (["--rules", "data"], ["fsdp=2", "carries nothing"]),
    "unknown rules": (["--rules", "fsdp_tenser"], ["fsdp_tensor"]),
    "indivisible heads": (["--mesh.tensor", "8"], ["heads", "4 is not divisible by 8"]),
    "heads do not divide embed": (["--model.heads", "5"], ["embed = 32", "heads = 5"]),
    "batch not divisible": (["--global-batch", "18"], ["18 rows", "4 groups"]),
    "no rows": (["--global-batch", "0"], ["global_batch", "1 or more"]),
    "too many groups": (["--groups", "64"], ["16 rows", "64 groups"]),
    "mistyped field": (["--optimizer.lerning-rate", "1"], ["optimizer.learning_rate"]),
    "initials": (["--optimizer.lr", "1"], ["optimizer.learning_rate"]),
    "wrong type": (["--steps", "many"], ["steps", "many"]),
    "wrong choice": (["--optimizer.name", "adam"], ["adam", "adamw"]),
    "no value": (["--seed"], ["seed", "needs a value"]),
    "stray argument": (["tiny"], ["unexpected argument 'tiny'"]),
    "negative learning rate": (["--optimizer.learning-rate", "-1"], ["learning_rate"]),
    "negative warmup": (["--optimizer.warmup", "-1"], ["warmup", "-1"]),
    "dropout": (["--model.dropout", "1.5"], ["1.5", "dropout"]),
    "remat": (["--model.remat", ","], ["remat"]),
    "sequence too long": (["--data.sequence", "64"], ["64 tokens", "32 positions"]),
    "vocabulary too small": (["--model.vocab", "256"], ["256 entries", "384"]),
    "tokenizer too small": (["--data.tokenizer", "bpe:10"], ["10 entries", "257"]),
    "no tokenizer": (["--data.tokenizer", "nothing.json"], ["nothing.json", "no such"]),
    "devices": (["--devices", "cpu8"], ["cpu8", "cpu:8"]),
    "no text": (["--data.source", "nothing.txt"], ["nothing.txt", "no such file"]),
    "guard": (["--guard.on-bad", "ignore"], ["on-bad", "rewind"]),
    "limit of a guard": (["--guard.limit", "0"], ["guard.limit", "1 or more"]),
    "replica check": (["--replica-check-every", "-1"], ["replica_check_every", "0 for never"]),
    "quarantine": (["--data.quarantine", "-1"], ["data.quarantine", "0 for none"]),
    "eval fraction": (["--data.eval-fraction", "1.5"], ["1.5"]),
}


def check(code, err, words):
    assert code == 2, err
    assert "Traceback" not in err and err.count("try:") == 1, err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"


@pytest.mark.parametrize("name", CASES)
def test_wrong_flags(name, config, tmp_path, shardtrain):
    """The faults in mind: a traceback, another exit code, training something else."""
    flags, words = CASES[name]
    code, out, err = shardtrain("train", config, *BASE, *flags)
    check(code, err, words)
    assert out == "" and not (tmp_path / "run").exists()


TEXTS = {
    "empty.txt": (b"", ["is empty"]),
    "blank.txt": (b"  \n ", ["is empty"]),
    "binary.txt": (b"\x7fELF\x02\x01\0\0", ["binary", "offset 6"]),
    "latin.txt": (b"caf\xe9 " * 50, ["not UTF-8", "0xe9", "offset 3"]),
    "cut.txt.gz": (b"\x1f\x8b\x08\0\0\0\0\0", ["gzip"]),
    "short.txt": (b"two\nlines\n", ["tokens", "takes 33"]),
    "one-line.txt": (b"one line " * 500, ["one line cannot be divided"]),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "'text'", "body"]),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', ["line 2", "JSON"]),
    "two.npy": (b"\x93NUMPY", ["npy"]),
    "odd.bin": (b"\0\1\2", ["3 bytes", "uint16"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_text(name, config, tmp_path, shardtrain):
    """The fault in mind: a failure deep inside, without the file's name."""
    content, words = TEXTS[name]
    file = write(tmp_path, name, content)
    cache = tmp_path / "cache"
    code, _, err = shardtrain("train", config, *BASE, "--data.source", file, "--data.cache", cache)
    check(code, err, words)
    assert not (tmp_path / "run").exists()
    assert not [p for p in cache.glob("*") if p.is_dir() and not (p / "manifest.json").exists()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.py:tiny", ["nothing.py", "no such file"]),
        ("my_config.py", ["which function?", "tiny"]),
        ("my_config.py:tinny", ["tinny", "'tiny'"]),
        ("my_config.py:number", ["int", "RunConfig"]),
        ("my_config.py:needs", ["needs", "without arguments"]),
        ("wrong.py:tiny", ["line 1"]),
        ("cut.json", ["not JSON", "line 1"]),
        ("list.json", ["list"]),
        ("field.json", ["lerning_rate", "learning_rate"]),
        ("type.json", ["steps", "str"]),
        ("kind.json", ["gpd", "gpt"]),
        ("nothing.json", ["no such file"]),
        ("tiny", ["FILE.py:FUNCTION"]),
    ],
)
def test_wrong_config(name, words, config, tmp_path, shardtrain, monkeypatch):
    """The fault in mind: a traceback."""
    from shardtrain.config import load_config, to_json

    monkeypatch.chdir(tmp_path)
    good = to_json(load_config(config))
    write(tmp_path, "wrong.py", "def tiny(:\n")
    write(tmp_path, "cut.json", json.dumps(good)[:40])
    write(tmp_path, "list.json", "[]")
    write(tmp_path, "field.json", json.dumps({**good, "optimizer": {"lerning_rate": 1.0}}))
    write(tmp_path, "type.json", json.dumps({**good, "steps": "6"}))
    write(tmp_path, "kind.json", json.dumps({**good, "model": {**good["model"], "kind": "gpd"}}))
    code, _, err = shardtrain("train", name, *BASE)
    check(code, err, words)


def test_output_that_cannot_be(config, tmp_path, shardtrain):
    """A path under a file. The fault in mind: after compiling for a minute."""
    file = write(tmp_path, "file", "x")
    code, _, err = shardtrain("train", config, *BASE, "--output", f"{file}/run")
    check(code, err, ["cannot be written"])


def test_a_run_whose_log_cannot_be_written(config, tmp_path, shardtrain):
    """A folder in the log's place, since a test may run as root. Failed once: exit code 3."""
    (tmp_path / "run" / "logs" / "process-0.log").mkdir(parents=True)
    code, _, err = shardtrain("train", config, *BASE)
    check(code, err, ["cannot be written", "--output"])


def test_nothing_is_left_of_a_run_that_did_not_begin(config, tmp_path, shardtrain, monkeypatch):
    """A monitor that refuses comes after the folder was made. Failed once: `logs/` and W&B's id stayed."""
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = shardtrain("train", config, *BASE, "--monitor.wandb", "words")
    check(code, err, ["shardtrain[wandb]"])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    assert shardtrain("train", config, *BASE, "--monitor.wandb", "words")[0] == 2
    assert (tmp_path / "run" / "mine").exists()  # a folder that was there is never removed


def test_damaged_and_foreign_checkpoints(config, tmp_path, shardtrain):
    """A cut-off array file, and a checkpoint of another model. The fault in mind: either read without a word."""
    import shutil

    run, other = tmp_path / "run", tmp_path / "other"
    assert shardtrain("train", config, *BASE)[0] == 0
    assert shardtrain("train", config, *BASE, "--output", other, "--model.embed", "64")[0] == 0
    kept = tmp_path / "kept"
    shutil.copytree(run / "checkpoints", kept)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    code, _, err = shardtrain("train", config, *BASE)
    check(code, err, ["another model", "blocks/mlp/down_kernel", "shape [2, 256, 64]", "[2, 128, 32] here"])
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(kept, run / "checkpoints")
    largest = max(
        (p for p in (run / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    code, _, err = shardtrain("train", config, *BASE)
    assert code == 2 and "Traceback" not in err and "try:" in err, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'train'"]),
        (["generate", "nowhere", "--prompt", "a"], ["nowhere", "config.json"]),
        (["generate", "nowhere"], ["--prompt"]),
        (["ckpt", "ls", "nowhere"], ["nowhere", "no such folder"]),
        (["ckpt", "list", "nowhere"], ["list"]),
        (["data", "prepare", "nothing.txt", "--output", "out"], ["nothing.txt"]),
        (["doctor", "--device", "cpu:8"], ["--devices"]),
        (["launch", "locla", "--", "train", "x"], ["locla", "local"]),
        (["launch", "local"], ["no command", "-- train CONFIG"]),
        (["launch", "local", "--", "trian", "x"], ["'trian'", "'train'"]),
        (["launch", "local", "--", "python"], ["python without a script"]),
        (["launch", "local", "--processes", "0", "--", "train", "x"], ["--processes", "1 or more"]),
        (["launch", "local", "--process", "2", "--", "train", "x"], ["'--process'", "'--processes'"]),
        (["launch", "local", "--max-restarts", "-1", "--", "train", "x"], ["--max-restarts", "0 or more"]),
        (["launch", "local", "--host", "203.0.113.7", "--", "train", "x"], ["203.0.113.7", "this machine"]),
        (["launch", "local", "--hosts", "2", "--", "train", "x"], ["2 hosts", "--coordinator"]),
        (["launch", "local", "--hosts", "2", "--host-index", "2", "--", "train", "x"], ["2 of 2"]),
        (
            ["launch", "local", "--output-logs", "file/logs", "--", "train", "x"],
            ["file/logs", "cannot be written"],
        ),
        (["launch", "local", "--partition", "gpu", "--", "train", "x"], ["--partition", "not for local"]),
        (["launch", "local", "--inject", "kil@step=1", "--", "train", "x"], ["'kil'", "'kill'"]),
        (["launch", "local", "--inject", "kill@process=1", "--", "train", "x"], ["no step"]),
        (["launch", "local", "--inject", "kill@step=x", "--", "train", "x"], ["step=x", "no number"]),
        (
            ["launch", "local", "--inject", "nan@step=3:process=1", "--", "train", "x"],
            ["process", "all have it"],
        ),
        (["launch", "slurm", "--processes", "4", "--", "train", "x"], ["--processes", "not for slurm"]),
        (["launch", "slurm", "--hosts", "0", "--", "train", "x"], ["--hosts", "1 or more"]),
        (["launch", "slurm", "--set", "zone=a", "--", "train", "x"], ["'zone'", "gpus"]),
        (["launch", "slurm", "--secret", "KEY=hunter2", "--", "train", "x"], ["secrets.KEY", "env:KEY"]),
        (["launch", "slurm", "--env", "KEY", "--", "train", "x"], ["'KEY'", "NAME=VALUE"]),
        (["launch", "slurm", "--env", "A B=1", "--", "train", "x"], ["'A B'"]),
        (["launch", "slurm", "--profile", "big", "--", "train", "x"], ["launch.toml", "cannot be read"]),
        (["launch", "slurm", "--mount", "/a:/a", "--", "train", "x"], ["without an image"]),
        (["launch", "jobset", "--", "train", "x"], ["--image"]),
        (["launch", "jobset", "--name", "a b", "--image", "i", "--", "train", "x"], ["'a b'", "Kubernetes"]),
        (["launch", "jobset", "--image", "i", "--set", "provider=aks", "--", "train", "x"], ["'aks'", "eks"]),
        (
            ["launch", "jobset", "--image", "i", "--mount", "data", "--", "train", "x"],
            ["'data'", "CLAIM:/path"],
        ),
        (
            [
                "launch",
                "jobset",
                "--image",
                "i",
                "--accelerator",
                "t",
                "--hosts",
                "3",
                "--devices-per-process",
                "4",
                "--set",
                "provider=gke-tpu",
                "--set",
                "topology=4x4",
                "--",
                "train",
                "x",
            ],
            ["16 chips", "are 12"],
        ),
        (["launch", "tpu-vm", "--", "train", "x"], ["kind and zone"]),
        (
            ["launch", "aws", "--set", "engine=batch", "--", "train", "x"],
            ["'batch'", "eks or parallelcluster"],
        ),
        (["launch", "sky", "--secret", "KEY=env:OTHER", "--", "train", "x"], ["env:KEY"]),
        (["status", "nowhere"], ["nowhere", "no such run"]),
        (["logs", "."], ["no run in this folder"]),
        (["stop", "tpu-vm:name"], ["where?", "tpu-vm:JOB@PLACE"]),
    ],
)
def test_other_commands(arguments, words, tmp_path, shardtrain, monkeypatch):
    """The fault in mind: argparse's own message, or a traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, _, err = shardtrain(*arguments)
    check(code, err, words)


def test_json_errors(config, as_json):
    """The error object of the contract. The fault in mind: an empty stdout."""
    code, found = as_json("train", config, "--mesh.data", "3")
    assert code == 2 and set(found["error"]) == {"kind", "where", "message", "try"}
    assert found["error"]["kind"] == "MeshError" and "12 positions" in found["error"]["message"]
    code, found = as_json("trian")
    assert code == 2 and found["error"]["kind"] == "ConfigError"


@pytest.mark.parametrize(
    ("call", "says"),
    [("write_text", ".launch.json.tmp"), ("write_bytes", "checkpoints: checkpoints cannot be written here")],
)
def test_a_full_disk_is_no_wrong_input(call, says, config, shardtrain, monkeypatch):
    """It may have room later: exit code 3, after which launchers try again. Failed once: a restart while it was full was told
    that its input is wrong, and was the last (found by benchmarks/chaos.py); or 'the run failed', with a line of Python's."""
    assert shardtrain("train", config, *BASE)[0] == 0

    def refuses(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(f"pathlib.Path.{call}", refuses)
    code, _, err = shardtrain("train", config, *BASE)
    assert code == 3 and says in err and "No space left on device" in err
    assert "try: " in err and "the run failed" not in err and "Traceback" not in err
