"""Devices, versions, and what is wrong with this machine. Exit code 1 when something is."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import time
from typing import Any

from shardtrain.cli import shell
from shardtrain.tree import table

_PACKAGES = (
    "shardtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy", "tokenizers",
    "tyro", "rich", "tensorboardX", "wandb", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", default="auto", help="auto, gpu, tpu or cpu:N")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config.devices import accelerator_files, start_devices
    from shardtrain.mesh import chip_of

    start_devices(options.devices)
    import jax

    devices = jax.devices()
    packages = {name: _version(name) for name in _PACKAGES}
    problems = [f"{n} is not installed" for n in _PACKAGES[:13] if packages[n] is None and n != "shardtrain"]
    if shutil.disk_usage(os.getcwd()).free < 2**30:
        problems.append(f"less than 1 GiB free in {os.getcwd()}")
    if devices[0].platform == "cpu" and options.devices == "auto" and (files := accelerator_files()):
        problems.append(
            f"{files[0][1]} is there, but JAX sees only CPUs: install an extra such as cuda13 or tpu"
        )
    chip = chip_of(devices[0])
    seconds, bandwidth = _sniff(devices)
    found = {
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "devices": [str(d) for d in devices],
        "device_kind": devices[0].device_kind,
        "chip": chip.name if chip else None,
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "packages": {n: v for n, v in packages.items() if v},
        "all_reduce_seconds": seconds,
        "all_reduce_bytes_per_second": bandwidth,
        "problems": problems,
    }
    if not options.json:
        print(
            f"{len(devices)} {devices[0].platform} device(s), {devices[0].device_kind}; {jax.process_count()} process(es)"
        )
        print(table(("package", "version"), [(n, v) for n, v in packages.items() if v]))
        if seconds is not None and bandwidth is not None:
            print(
                f"all-reduce of 4 MiB over {len(devices)} devices: {seconds * 1e3:.1f} ms, {bandwidth / 1e9:.2f} GB/s sent per device"
            )
        print("\n".join(f"problem: {p}" for p in problems) or "no problems found")
    return (shell.FOUND if problems else shell.DONE), found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sniff(devices: list[Any]) -> tuple[float | None, float | None]:
    """Time of one all-reduce over all devices: a sniff test of the interconnect, not a benchmark."""
    if len(devices) < 2:
        return None, None
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from shardtrain.mesh import make_mesh

    mesh = make_mesh(data=len(devices))
    x = jax.device_put(jnp.ones((len(devices), 2**20)), NamedSharding(mesh, PartitionSpec("data")))
    reduce = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    reduce(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        reduce(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    n = len(devices)
    return best, 2 * (n - 1) / n * 2**22 / best
