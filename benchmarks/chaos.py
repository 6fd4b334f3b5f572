"""Signals at random moments of training: is anything lost? Prints JSON.

    python benchmarks/chaos.py --trials 200 --out trials.jsonl [--seed 0] [--json]

Each trial starts `shardtrain launch local` on two processes (sometimes four) of a small run on four simulated devices, waits
for a random step, or for a save to begin, and sends SIGKILL, SIGSTOP or SIGTERM to a random process, or SIGKILL to
the launcher. Then the launcher starts all again, or the same run is started on another number of processes. Trials are
appended to --out, one line each; those that are there are not run again, so it goes in pieces: `--trials` counts all.
The reference is a run that nothing happens to, on the same number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STEPS, ROWS = 14, 16
FAULTS = ("SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM", "launcher")
FORMULA = (
    "lost_commits: trials that went on from before the newest step committed when the signal was sent; corrupt_resumes: trials "
    "that did not end well; samples: rows of steps that are in the metrics twice or with other rows (repeated), or not "
    "at all (skipped), by each step's sums of row numbers and of their squares; curves_equal: every loss bit for bit as the "
    "reference's while the number of processes is the same, within 1e-5 on another; detection_seconds: signal to the "
    "launcher's line; recovery_seconds: signal to the next new step on record"
)
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


class Job:
    """`shardtrain launch local`, its lines with their times."""

    def __init__(self, work: Path, run: Path, processes: int, restarts: int, pace: float):
        command = [
            sys.executable,
            "-m",
            "shardtrain",
            "launch",
            "local",
            "--json",
            "--processes",
            str(processes),
        ]
        command += ["--max-restarts", str(restarts)]
        if pace:
            command += ["--inject", f"slow@step=1:attempt=all:seconds={pace}"]
        command += ["--", "train", f"{work / 'config.py'}:tiny", "--output", str(run), "--json"]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }
        kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        pipe = subprocess.PIPE
        # a benchmark that is cut off leaves no launcher behind
        command = [sys.executable, "-m", "shardtrain.launch.child", str(os.getpid()), *command]
        self.popen = subprocess.Popen(command, env=kept | cache, stdout=pipe, stderr=pipe, text=True)
        self.lines: list[tuple[float, str]] = []
        self.out = ""
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._err, self._read)]
        for thread in self._threads:
            thread.start()

    def _err(self) -> None:
        assert self.popen.stderr
        for line in self.popen.stderr:
            self.lines.append((time.monotonic(), line.rstrip()))

    def _read(self) -> None:
        assert self.popen.stdout
        self.out = self.popen.stdout.read()

    def said(self, *words: str) -> float | None:
        """When the launcher itself first said one of them."""
        return next((t for t, line in self.lines if line.startswith(words)), None)

    def workers(self) -> dict[int, int]:
        """Index -> id of the processes that train."""
        found = {}
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        for pid in map(int, children):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(v[15:]): pid for v in variables if v.startswith(b"JAX_PROCESS_ID=")}
        return found

    def end(self, seconds: float = 240.0) -> dict[str, Any]:
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for thread in self._threads:
            thread.join(5.0)
        try:
            return json.loads(self.out)
        except ValueError:
            return {}


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


def until(true: Any, job: Job, seconds: float = 200.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.popen.poll() is None:
        if true():
            return True
        time.sleep(0.004)
    return bool(true())


def trial(number: int, seed: int, work: Path, reference: Any) -> dict[str, Any]:
    rng = random.Random(f"{seed}-{number}")
    processes = 4 if rng.random() < 0.15 else 2
    fault = rng.choice(FAULTS)
    victim = rng.randrange(processes)
    in_save = rng.random() < 0.4
    step, pause = rng.randrange(1, 11), rng.random() * 0.15
    then = processes if rng.random() < 0.6 else rng.choice([n for n in (1, 2, 4) if n != processes])
    run = work / f"run-{seed}-{number}"
    shutil.rmtree(run, ignore_errors=True)
    same = then == processes and fault != "launcher"
    job = Job(work, run, processes, 3 if same else 0, 0.12)
    reached = until(lambda: len(rows(run)) >= step, job)
    if in_save:
        reached = until(lambda: any((run / "checkpoints").glob(".saving/*")), job, 30.0) and reached
        pause *= 0.2
    time.sleep(pause)
    before, at = committed(run), time.monotonic()
    on_launcher = fault == "launcher" or (fault == "SIGTERM" and not same)
    target = job.popen.pid if on_launcher else job.workers().get(victim, 0)
    sent = signal.SIGKILL if fault == "launcher" else signal.Signals[fault]
    missed = not reached or not target or job.popen.poll() is not None
    if not missed:
        os.kill(target, sent)
    if same:
        until(lambda: job.said("launch: process", "launch: all") is not None, job)
        detected = job.said("launch: process", "launch: all")
    else:
        job.end()
        detected = job.said("RunError") or time.monotonic()
        job = Job(work, run, then, 1, 0.0)
    least = len(rows(run))
    recovered = None
    while job.popen.poll() is None:
        seen = len(rows(run))
        if seen > least and recovered is None:
            recovered = time.monotonic()
            break
        least = min(least, seen)
        time.sleep(0.01)
    done = job.end()
    kept, whole = rows(run), reference(then)
    first = reference(processes)
    resumed = (done.get("result") or {}).get("resumed_from") or 0
    numbers = [row["step"] for row in kept]
    wrong = sum(
        (row["ids"], row["squares"]) != (whole[row["step"]]["ids"], whole[row["step"]]["squares"])
        for row in kept
    )
    equal = done.get("exit") == 0 and len(kept) == STEPS
    for row in kept:
        own = (first if row["step"] <= resumed else whole)[row["step"]]["loss"]
        close = row["loss"] == own if then == processes else abs(row["loss"] - own) <= 1e-5 * abs(own)
        equal = equal and close
    return {
        "trial": number,
        "seed": seed,
        "fault": fault,
        "processes": processes,
        "then": then,
        "in_save": in_save,
        "missed": missed,
        "committed_before": before,
        "resumed_from": resumed,
        "lost_commit": done.get("exit") == 0 and resumed < before,
        "corrupt_resume": done.get("exit") != 0,
        "samples_repeated": ROWS * (len(numbers) - len(set(numbers)) + wrong),
        "samples_skipped": ROWS * len(set(range(1, STEPS + 1)) - set(numbers)),
        "curve_equal": equal,
        # a SIGTERM is no failure to be detected; a launcher that is gone says nothing
        "detection_seconds": detected - at
        if detected and fault in ("SIGKILL", "SIGSTOP") and not missed
        else None,
        "recovery_seconds": recovered - at if recovered and same and not missed else None,
        **({"said": [line for _, line in job.lines[-12:]]} if not equal else {}),
    }


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": statistics.median(ordered), "p95": p95, "worst": ordered[-1], "count": len(ordered)}


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` gives. Recovery is told by kind: that of a stopped process has its detection in it."""

    def of(name: str, *faults: str) -> dict[str, float] | None:
        return spread([t[name] for t in trials if t[name] is not None and t["fault"] in faults])

    return {
        "trials": len(trials),
        "by_fault": {f: sum(t["fault"] == f for t in trials) for f in sorted(set(FAULTS))},
        "in_save": sum(t["in_save"] for t in trials),
        "on_another_number": sum(t["then"] != t["processes"] for t in trials),
        "came_too_late": sum(t["missed"] for t in trials),
        "lost_commits": sum(t["lost_commit"] for t in trials),
        "corrupt_resumes": sum(t["corrupt_resume"] for t in trials),
        "samples_repeated": sum(t["samples_repeated"] for t in trials),
        "samples_skipped": sum(t["samples_skipped"] for t in trials),
        "curves_equal": sum(t["curve_equal"] for t in trials),
        "detection_seconds": {
            "killed": of("detection_seconds", "SIGKILL"),
            "stopped": of("detection_seconds", "SIGSTOP"),
        },
        "recovery_seconds": {
            "killed": of("recovery_seconds", "SIGKILL"),
            "stopped": of("recovery_seconds", "SIGSTOP"),
            "preempted": of("recovery_seconds", "SIGTERM"),
        },
    }


def run(trials: int, seed: int, out: Path | None, work: Path) -> dict[str, Any]:
    (work / "config.py").write_text(CONFIG)
    known: list[dict[str, Any]] = []
    if out is not None and out.exists():
        known = [json.loads(line) for line in out.read_text().splitlines()]
        known = [t for t in known if t["seed"] == seed]
    references: dict[int, dict[int, dict[str, Any]]] = {}

    def reference(processes: int) -> dict[int, dict[str, Any]]:
        if processes not in references:
            folder = work / f"whole-{processes}"
            done = Job(work, folder, processes, 0, 0.0).end()
            assert done.get("exit") == 0, f"the reference on {processes} processes did not end well: {done}"
            references[processes] = {row["step"]: row for row in rows(folder)}
        return references[processes]

    ran = {t["trial"] for t in known}
    for number in (n for n in range(trials) if n not in ran):
        found = trial(number, seed, work, reference)
        known.append(found)
        shutil.rmtree(work / f"run-{seed}-{number}", ignore_errors=True)
        print(json.dumps(found), file=sys.stderr, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    return summary(known)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="one line a trial; without it nothing is kept")
    parser.add_argument("--json", action="store_true", help="as always: one object on stdout")
    options = parser.parse_args()
    import jax

    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as work:
        found = run(options.trials, options.seed, options.out, Path(work))
    result = {
        "benchmark": "chaos",
        "formula": FORMULA,
        "seed": options.seed,
        "steps": STEPS,
        **found,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, local disk, simulated devices; load "
        f"{os.getloadavg()[1]:.1f}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
