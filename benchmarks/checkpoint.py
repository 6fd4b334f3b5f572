"""What digests add to the background half of a save, and what checking them adds to a restore. Prints JSON.

    python benchmarks/checkpoint.py [--rounds 10] [--mib 64 256]

Alternating within one process, in rounds of with / without / with again: wall seconds from the return of
`save` until the step is on disk (files synced in both), and CPU seconds of the process meanwhile. `added` is the
median over the rounds of (with + with again) / (2 without) - 1. Digests as such: GiB/s on one core, from memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
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
    options = parser.parse_args()
    result = {
        "benchmark": "checkpoint",
        "formula": "added = median over rounds of (with + with again) / (2 without) - 1, of the background half",
        "gib_per_second": {
            "crc32": speed(digests.crc32),
            "crc32_zlib": speed(zlib.crc32),
            "sha256": speed(lambda data: hashlib.sha256(data).digest()),
            "blake2b": speed(lambda data: hashlib.blake2b(data).digest()),
        },
        "saves": [measure(mib, options.rounds) for mib in options.mib],
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
