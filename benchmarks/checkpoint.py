"""What digests add to the background half of a save, what checking them adds to a restore, what saves cost a run that
trains meanwhile, and how much memory of the host one takes. Prints JSON.

    python benchmarks/checkpoint.py [--rounds 10] [--mib 64 256] [--only saves training memory]

Alternating within one process, in rounds of with / without / with again: wall seconds from the return of
`save` until the step is on disk (files synced in both), and CPU seconds of the process meanwhile. `added` is the
median over the rounds of (with + with again) / (2 without) - 1. Digests as such: GiB/s on one core, from memory.

Training: blocks of 20 steps of `configs/gpt.py:tiny` on its eight devices, in turn with one save after the first step and
with none, each block timed until its last step is done and its save is on disk: all that a save costs is in its own block.
Memory: a process of its own for each size, whose state is donated to steps right after a save began; the growth of its
resident memory at the highest point, less that of the same steps without a save, in units of the bytes of the state that it
holds. On CPU devices the host's copy is the device's buffer, which the save keeps: the steps then take new ones.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import optax

import shardtrain as st
from shardtrain.checkpoint import digests, intact


def small_plan(mib: int) -> Any:
    """A plan whose state is about `mib` MiB: parameters and the two moments of Adam, divided over eight devices."""
    rows = mib * 2**20 // (3 * 4 * 1024)
    init = lambda key: {"w": jax.random.normal(key, (rows // 8 * 8, 1024))}
    return st.plan(
        (init, lambda params, x: x @ params["w"].T),
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(8, 1024)),
        mesh=st.make_mesh(fsdp=8),
        annotations=st.annotate({"w": ("mlp", "embed")}),
    )


def measure(mib: int, rounds: int) -> dict[str, Any]:
    plan = small_plan(mib)
    state = plan.init(0)
    number, real = 0, digests.of_files

    def save(checkpointer: Any, with_digests: bool) -> tuple[float, float]:
        nonlocal number
        number += 1
        digests.of_files = real if with_digests else lambda place, sizes: {name: [] for name in sizes}
        at = state.replace(step=jnp.int32(number))
        checkpointer.save(at, step=number, force=True)
        wall, cpu = time.perf_counter(), time.process_time()
        checkpointer.wait()
        return time.perf_counter() - wall, time.process_time() - cpu

    rows = []
    with tempfile.TemporaryDirectory() as folder, st.Checkpointer(folder, keep=1) as checkpointer:
        for kind in (True, False):
            save(checkpointer, kind)
        for _ in range(rounds):
            rows.append([save(checkpointer, kind) for kind in (True, False, True)])
        digests.of_files = real
        save(checkpointer, True)
        start = time.perf_counter()
        assert not intact.problems_of(checkpointer.path, number)
        verified = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(plan).leaves)
        restored = time.perf_counter() - start
    column = lambda i, j: [row[i][j] for row in rows]
    ratios = lambda j: [(a[j] + c[j]) / (2 * b[j]) - 1 for a, b, c in rows]
    return {
        "state_bytes": sum(leaf.nbytes for leaf in state.leaves),
        "rounds": rounds,
        "seconds_with": statistics.median(column(0, 0) + column(2, 0)),
        "seconds_without": statistics.median(column(1, 0)),
        "added": statistics.median(ratios(0)),
        "added_cpu": statistics.median(ratios(1)),
        "verify_seconds": verified,
        "restore_seconds": restored,
    }


def training(rounds: int, steps: int = 20) -> dict[str, Any]:
    from shardtrain.config import load_config
    from shardtrain.config.build import build, make_plan

    config = load_config(str(Path(__file__).parents[1] / "configs" / "gpt.py") + ":tiny")
    pieces = build(config)
    plan = make_plan(config, pieces)
    step, state = plan.compile(), plan.init(0)
    batches = pieces.loader.for_rows(plan.rows).starting_at(0)
    number = 0

    def block(checkpointer: Any, saves: bool) -> tuple[float, float, float]:
        """Wall and CPU seconds of the block, and wall seconds of one step of it."""
        nonlocal state, number
        each = []
        wall, cpu = time.perf_counter(), time.process_time()
        for index in range(steps):
            began = time.perf_counter()
            state, metrics = step(state, plan.put(next(batches)))
            number += 1
            if saves and index == 0:
                checkpointer.save(state, step=number, force=True)
            jax.device_get(metrics)
            each.append(time.perf_counter() - began)
        checkpointer.wait()
        return time.perf_counter() - wall, time.process_time() - cpu, statistics.median(each)

    with tempfile.TemporaryDirectory() as folder, st.Checkpointer(folder, keep=2) as checkpointer:
        for saves in (True, False):
            block(checkpointer, saves)
        pairs = [(block(checkpointer, True), block(checkpointer, False)) for _ in range(rounds)]
    median = lambda side, what: statistics.median(pair[side][what] for pair in pairs)
    return {
        "steps_between_saves": steps,
        "rounds": rounds,
        "state_bytes": sum(leaf.nbytes for leaf in state.leaves),
        "seconds_with": median(0, 0),
        "seconds_without": median(1, 0),
        "added": median(0, 0) / median(1, 0) - 1,
        "added_cpu": median(0, 1) / median(1, 1) - 1,
        "step_seconds_with": median(0, 2),
        "step_seconds_without": median(1, 2),
        "added_to_a_step": median(0, 2) / median(1, 2) - 1,
        "added_per_round": [with_save[0] / without[0] - 1 for with_save, without in pairs],
    }


def memory(mib: int) -> dict[str, Any]:
    """Of this process, which should do nothing else."""
    plan = small_plan(mib)
    state = plan.init(0)
    held = sum(leaf.nbytes for leaf in state.leaves)

    def resident(which: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(which))

    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.block_until_ready(step(state))

    with tempfile.TemporaryDirectory() as folder, st.Checkpointer(folder, keep=1) as checkpointer:

        def highest(number: int) -> int:
            """Growth while the state is donated to steps, right after a save began; number 0 saves nothing."""
            nonlocal state
            if number:
                state = jax.block_until_ready(state.replace(step=jnp.int32(number)))
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier save took and the allocator kept
            Path("/proc/self/clear_refs").write_text("5")  # the highest point counts from here
            before = resident("VmRSS")
            if number:
                checkpointer.save(state, step=number, force=True)
            for _ in range(5):
                state = jax.block_until_ready(step(state))
            checkpointer.wait()
            return resident("VmHWM") - before

        highest(1)  # loads code
        grown = [(highest(number), highest(0)) for number in (20, 40, 60)]
    return {
        "state_bytes": held,
        "grown_with_a_save": [a for a, _ in grown],
        "grown_without": [b for _, b in grown],
        "ratio": max(a - b for a, b in grown) / held,
    }


def speed(digest: Any) -> float:
    data = os.urandom(1 << 26)
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        for at in range(0, len(data), digests.BLOCK):
            digest(data[at : at + digests.BLOCK])
        seconds.append(time.thread_time() - start)
    return len(data) / 2**30 / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--only", nargs="+", choices=("saves", "training", "memory"), default=None)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(memory(options.memory_of)))
        return
    only = options.only or ("saves", "training", "memory")
    result: dict[str, Any] = {
        "benchmark": "checkpoint",
        "formula": "added = median over rounds of (with + with again) / (2 without) - 1, of the background half; of training: "
        "median of the blocks with a save over that of those without, less 1; memory: the highest growth of a save over "
        "the bytes of the state",
    }
    if "saves" in only:
        result["gib_per_second"] = {
            "crc32": speed(digests.crc32),
            "crc32_zlib": speed(zlib.crc32),
            "sha256": speed(lambda data: hashlib.sha256(data).digest()),
            "blake2b": speed(lambda data: hashlib.blake2b(data).digest()),
        }
        result["saves"] = [measure(mib, options.rounds) for mib in options.mib]
    if "training" in only:
        result["training"] = training(options.rounds)
    if "memory" in only:
        command = [sys.executable, __file__, "--memory-of"]
        told = [subprocess.run([*command, str(m)], check=True, stdout=subprocess.PIPE) for m in options.mib]
        result["memory"] = [json.loads(done.stdout) for done in told]
    result |= {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, local disk, simulated devices",
        "load_average": os.getloadavg()[0],  # of all that ran on the machine in the last minute
        "versions": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "crc32": digests.crc32.__module__,
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
