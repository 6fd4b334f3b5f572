"""Two processes of four devices train as one process of eight: same losses, one set of files."""

import json
import os
import socket
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "import sys; from shardtrain.cli import main; sys.exit(main(sys.argv[1:]))"]
FLAGS = "--steps 4 --eval-every 2 --eval-rows 32 --checkpoint-every 2 --global-batch 16 --sample-tokens 4"
SHAPE = "--model.layers 2 --model.embed 64 --monitor.tensorboard false --optimizer.decay constant --json"


def train(output, *flags, processes=1):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for index in range(processes):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [*COMMAND, "train", "configs/gpt.py:tiny", *FLAGS.split(), *SHAPE.split()]
        command += ["--devices", f"cpu:{8 // processes}", "--output", str(output), *flags]
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    results = [process.communicate(timeout=200) for process in running]
    for process, (_, err) in zip(running, results, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out) for out, _ in results]


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(tmp_path):
    """Then resumed by one process on another mesh. Failed once: both wrote metrics, and only one generated."""
    two = train(tmp_path / "two", processes=2)
    one = train(tmp_path / "one")
    for result in two:
        assert result["train_loss"] == pytest.approx(one[0]["train_loss"], rel=1e-6)
        assert result["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-6)
    assert [r["step"] for r in rows(tmp_path / "two") if "loss" in r] == [1, 2, 3, 4]
    assert (tmp_path / "two" / "report.html").exists()
    more = train(tmp_path / "one", "--mesh.data", "8", "--seed", "0")
    assert more[0]["resumed_from"] == 4
