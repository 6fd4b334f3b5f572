"""Compiles the programs for devices that are not here: `python make.py tpu gpu`, or some of them with their names after
the targets; needs libtpu and the CUDA plugin."""

from __future__ import annotations

import os

os.environ.update(
    JAX_PLATFORMS="cpu",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_STDERR_LOG_LEVEL="3",
    TF_CPP_MIN_LOG_LEVEL="3",
)

import gzip
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

sys.path.insert(0, str(Path(__file__).parent))
from programs import PROGRAMS

HERE = Path(__file__).parent
TEXTS = HERE / "texts"
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(target: str) -> list[jax.Device]:
    """Eight devices: `tpu` v5e:2x4, `slices` two v5e:2x2, `tpu7x` 2x2x1 with two devices a chip, `gpu` eight H100."""
    if target == "gpu":
        return list(
            topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8").devices
        )
    name, more = {
        "tpu": ("v5e:2x4", {}),
        "slices": ("v5e:2x2", {"num_slices": 2}),
        "tpu7x": ("tpu7x:2x2x1", {}),
    }[target]
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **more).devices)


def mesh_of(target: str, axes: dict[str, int]) -> jax.sharding.Mesh:
    found, sizes = devices(target), tuple(axes.values())
    if target == "gpu":
        placed = np.array(found).reshape(sizes)
    elif target == "slices":  # the first axis goes from slice to slice
        inside, across = (1, *sizes[1:]), (sizes[0], *(1 for _ in sizes[1:]))
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, found, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, tuple(axes))


def portable(text: str) -> str:
    """The text without this machine's paths."""
    text = re.sub(r'"(?:/[^"/]*)+/site-packages/', '"/example/site-packages/', text)
    text = text.replace(str(HERE), "/example")
    return re.sub(r'"/(?!example)(?:[^"/ ]+/)+([^"/ ]+\.py)"', r'"/example/\1"', text)


def main(targets: list[str]) -> None:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")}
    for target in [t for t in targets if t not in PROGRAMS]:
        for name, program in PROGRAMS.items():
            wanted = [n for n in targets if n in PROGRAMS]
            if target not in program.targets or (wanted and name not in wanted):
                continue
            lowered = program.lower(mesh_of(target, program.mesh))
            text = lowered.compile(compiler_options=program.options or None).as_text()
            path = TEXTS / target / f"{name}.txt.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(portable(text).encode(), 9, mtime=0))
            print(target, name, len(text), path.stat().st_size, flush=True)
    (TEXTS / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["tpu", "gpu", "slices", "tpu7x"])
