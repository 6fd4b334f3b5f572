"""Stand-ins for devices that are not here, from their compilers' packages."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

from shardtrain.mesh.target import Target

# Text protos of the GPUs' properties as the CUDA plugin states them for the same chips when they are present.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
_ACCELERATED = "feature_extension: ACCELERATED_FEATURES"
_HOPPER: dict[str, Any] = dict(
    shared=233472, optin=232448, cores=132, fpus=128, l2=52428800, clock=1.98, major=9, feature=_ACCELERATED
)
GPUS: dict[str, dict[str, Any]] = {
    "a100": dict(
        shared=167936, optin=166912, cores=108, fpus=64, bandwidth=2039000000000, l2=41943040, clock=1.41,
        memory=85100068864, major=8, feature="", name="NVIDIA A100-SXM4-80GB",
    ),
    "h100": dict(_HOPPER, bandwidth=3352320000000, memory=84942979072, name="NVIDIA H100 80GB HBM3"),
    "h200": dict(_HOPPER, bandwidth=4800000000000, memory=151397597184, name="NVIDIA H200"),
    "b200": dict(
        shared=233472, optin=232448, cores=148, fpus=128, bandwidth=7672000000000, l2=132644864, clock=1.965,
        memory=191514411008, major=10, feature=_ACCELERATED, name="NVIDIA B200",
    ),
}  # fmt: skip


def devices(target: Target) -> list[Any]:
    """Devices to compile for, in the order of the hardware; of `cpu`, simulated ones, in a process of their own."""
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", target.size)
        return list(jax.devices("cpu"))
    shape = "x".join(map(str, target.topology))
    if target.platform == "cuda":
        facts = _GPU.format(**GPUS[target.family])
        description = topologies.get_topology_desc(
            platform="cuda", target_config=facts, topology=f"1x{shape}"
        )
        return list(description.devices)
    options = {"num_slices": target.slices} if target.slices > 1 else {}
    return list(topologies.get_topology_desc(f"{target.family}:{shape}", platform="tpu", **options).devices)
