"""The run that `chaos.py` hits: a small model whose metrics tell its rows, and the launchers that train it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hosts import Hosts

from shardtrain.launch.child import WAITING

STEPS, ROWS, DEVICES = 14, 16, 4
CONFIG = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import shardtrain as st
from shardtrain.config import MeshSizes, Monitor, Optimizer, RunConfig, custom


class Net(nnx.Module):
    def __init__(self, rngs, width):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(8, width, rngs=rngs, kernel_init=st.logical(init, "embed", "mlp"))
        self.down = nnx.Linear(width, 8, rngs=rngs, kernel_init=st.logical(init, "mlp", "embed"))
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.gelu(self.up(x))))


def net(rngs, width=16):
    return Net(rngs, width)


def loss(model, batch, rngs):
    each = jnp.square(model(batch["x"]) - jnp.roll(batch["x"], 1, -1)).mean(-1)
    ids = batch["id"].astype(jnp.float32)
    sums = {"ids": (ids.sum(), 1.0), "squares": ((ids**2).sum(), 1.0)}
    return st.Loss(each.sum(), jnp.float32(each.size), sums)


def data(config):
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    return st.ArrayLoader({"x": x, "id": np.arange(200, dtype=np.int32)}, config.global_batch, seed=1)


def tiny():
    return RunConfig(
        model=custom(net, loss, data, width=16), mesh=MeshSizes(data=2, fsdp=2), global_batch=16, groups=4,
        optimizer=Optimizer(learning_rate=1e-2, decay="constant"),
        monitor=Monitor(tensorboard=False, progress=False),
        steps=14, eval_every=0, checkpoint_every=2, devices="cpu:4", output="",
    )
"""


class Launch:
    """`shardtrain launch local`, on one host or on several, its lines with their times.

    Args:
        options: of each host's launcher. train: the words after `train`. environment: beside this process's. hosts: where.
    """

    def __init__(
        self,
        options: Sequence[Sequence[str]],
        train: Sequence[str],
        environment: Mapping[str, str],
        hosts: Hosts | None = None,
    ):
        kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        self.lines: list[tuple[float, int, str]] = []
        self.outs = [""] * len(options)
        self.launchers = []
        self._threads = []
        for host, own in enumerate(options):
            words = [sys.executable, "-m", "shardtrain", "launch", "local", "--json", *own]
            words += ["--", "train", *train, "--json"]
            if hosts is not None:
                words = hosts.command(host, words)
            # a benchmark that is cut off leaves no launcher behind
            words = [sys.executable, "-m", "shardtrain.launch.child", str(os.getpid()), *words]
            pipe = subprocess.PIPE
            popen = subprocess.Popen(words, env=kept | environment, stdout=pipe, stderr=pipe, text=True)
            self.launchers.append(popen)
            for read in (self._err, self._out):
                self._threads.append(threading.Thread(target=read, args=(host, popen), daemon=True))
                self._threads[-1].start()

    def _err(self, host: int, popen: subprocess.Popen[str]) -> None:
        assert popen.stderr
        for line in popen.stderr:
            self.lines.append((time.monotonic(), host, line.rstrip()))

    def _out(self, host: int, popen: subprocess.Popen[str]) -> None:
        assert popen.stdout
        self.outs[host] = popen.stdout.read()

    def said(self, *words: str) -> float | None:
        """When the launchers themselves, the last of them, first said one of them; None where one did not."""
        first: dict[int, float] = {}
        for at, host, line in list(self.lines):
            if line.startswith(words):
                first.setdefault(host, at)
        return max(first.values()) if len(first) == len(self.launchers) else None

    @property
    def running(self) -> bool:
        return any(popen.poll() is None for popen in self.launchers)

    def workers(self) -> dict[int, int]:
        """Index -> id of the processes that train."""
        found = {}
        for popen in self.launchers:
            children = Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text().split()
            for pid in map(int, children):
                try:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if Path(f"/proc/{pid}/comm").read_text().strip() == WAITING:  # for the next attempt
                        continue
                except OSError:
                    continue
                found |= {int(v[15:]): pid for v in variables if v.startswith(b"JAX_PROCESS_ID=")}
        return found

    def end(self, seconds: float = 900.0) -> dict[str, Any]:
        """The JSON of the first host; empty where a launcher did not end in time, or one of several not with 0."""
        until = time.monotonic() + seconds
        late = False
        for popen in self.launchers:
            try:
                popen.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                popen.kill()
                popen.wait()
        for thread in self._threads:
            thread.join(5.0)
        if late or (len(self.launchers) > 1 and any(popen.returncode for popen in self.launchers)):
            return {}
        try:
            return json.loads(self.outs[0])
        except ValueError:
            return {}

    def kill(self) -> None:
        for popen in self.launchers:
            popen.kill()


def job(
    work: Path, run: Path, processes: int, restarts: int, pace: float, hosts: Hosts | None = None
) -> Launch:
    """The run of `CONFIG`, `pace` seconds before each step."""
    count = 1 if hosts is None else len(hosts.names)
    options = ["--processes", str(processes // count), "--max-restarts", str(restarts)]
    if pace:
        options += ["--inject", f"slow@step=1:attempt=all:seconds={pace}"]
    each = [options]
    if hosts is not None:
        options += ["--hosts", str(count), "--coordinator", f"{hosts.addresses[0]}:29517"]
        options += ["--mtls", "off", "--devices-per-process", str(DEVICES // processes)]
        each = [[*options, "--host-index", str(host)] for host in range(count)]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    return Launch(each, [f"{work / 'config.py'}:tiny", "--output", str(run)], environment, hosts)


def rows(run: Path) -> list[dict[str, Any]]:
    found = []
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in found if "loss" in row]


def committed(run: Path) -> int:
    folders = (run / "checkpoints").glob("*/manifest.json")
    return max((int(f.parent.name) for f in folders if f.parent.name.isdigit()), default=0)


def until(true: Any, job: Launch, seconds: float = 500.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.running:
        if true():
            return True
        time.sleep(0.004)
    return bool(true())
