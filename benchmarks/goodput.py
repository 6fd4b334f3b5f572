"""Goodput of a job whose processes are killed now and then, and whether its ledger adds up. Prints JSON.

    python benchmarks/goodput.py [--minutes 20] [--kill-every 300] [--processes 2] [--config configs/gpt.py:tiny] [WORDS OF train]

`shardtrain launch local` trains until it is asked to stop; every so many seconds of that a random process is killed (SIGKILL), and
the launcher starts all again from the last commit. A run of two steps before has prepared the data and filled JAX's cache of
programs. Goodput is the run's own: compute and evaluations over the wall clock of all attempts, `RUN/goodput.json`.
`unaccounted`: the launcher's own clock, less what is after the last attempt's last word, against the sum of the ledger's parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chaos_job import Launch, rows

FORMULA = (
    "goodput = (compute + evaluate) / sum of parts; unaccounted = |clock - sum of parts| / clock, with clock = the ledger's last "
    "writing less the start of the launcher; recovery_seconds: a kill to the next new step on record"
)


def run(
    config: str, more: list[str], minutes: float, kill_every: float, processes: int, seed: int, folder: Path
) -> dict[str, Any]:
    rng = random.Random(seed)
    output = folder / "run"
    train = [
        config,
        "--optimizer.decay",
        "constant",
        "--monitor.tensorboard",
        "false",
        "--eval-every",
        "0",
        *more,
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    options = ["--processes", str(processes), "--max-restarts", "1000"]
    before = Launch([options], [*train, "--steps", "2", "--output", str(folder / "before")], cache)
    if before.end(300.0).get("exit") != 0:
        raise SystemExit("\n".join(line for _, _, line in before.lines[-20:]))
    began, wall = time.monotonic(), time.time()
    job = Launch([options], [*train, "--steps", "1000000", "--output", str(output)], cache)
    recovered = []
    try:
        end, due = began + 60 * minutes, began + kill_every
        while job.running and time.monotonic() < end:
            time.sleep(0.05)
            if time.monotonic() < due:
                continue
            due += kill_every
            workers = job.workers()
            if not workers:
                continue
            least, at = len(rows(output)), time.monotonic()
            os.kill(workers[rng.choice(sorted(workers))], signal.SIGKILL)
            while job.running and time.monotonic() < end:
                seen = len(rows(output))
                if seen > least:
                    recovered.append(time.monotonic() - at)
                    break
                least = min(least, seen)
                time.sleep(0.02)
        job.launchers[0].terminate()
        done = job.end(300.0)
    finally:
        job.kill()
    if not (output / "goodput.json").is_file():
        raise SystemExit("\n".join(line for _, _, line in job.lines[-20:]))
    kept = json.loads((output / "goodput.json").read_text())
    clock = kept["at"] - wall
    total = sum(kept["parts"].values())
    return {
        "exit": done.get("exit"),
        "restarts": done.get("restarts"),
        "steps": len(rows(output)),
        "goodput": kept["goodput"],
        "parts": kept["parts"],
        "clock_seconds": clock,
        "unaccounted": abs(clock - total) / clock,
        "recovery_seconds": recovered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "configs" / "gpt.py") + ":tiny")
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    options, more = parser.parse_known_args()
    more += ["--checkpoint-every", str(options.checkpoint_every)]
    with tempfile.TemporaryDirectory(prefix="goodput-", ignore_cleanup_errors=True) as folder:
        found = run(
            options.config,
            more,
            options.minutes,
            options.kill_every,
            options.processes,
            options.seed,
            Path(folder),
        )
    result = {
        "benchmark": "goodput",
        "formula": FORMULA,
        "config": Path(options.config).name,
        "train": more,
        "minutes": options.minutes,
        "kill_every_seconds": options.kill_every,
        "processes": options.processes,
        **found,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, local disk, simulated devices; load "
        f"{os.getloadavg()[1]:.1f}",
        "versions": {"jax": version("jax"), "python": platform.python_version()},
    }
    print(json.dumps(result, indent=1))
    sys.exit(0 if found["exit"] == 75 else 1)


if __name__ == "__main__":
    main()
