"""What chips can do, from public figures. Dense peaks, without sparsity."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    `flops`: peak dense FLOP/s by dtype. `hbm_bytes`, `hbm_bandwidth` (bytes/s).
    `ici_bandwidth`: bytes/s out of one device, one way, over all its fast links (ICI or NVLink).
    `dcn_bandwidth`: bytes/s out of one device over the network between slices or hosts.
    `source`: where the figures stand. `capability`: CUDA's, of NVIDIA devices.
    `ici_hop_seconds`, `dcn_hop_seconds`: latency of one step of a ring over either.
    `usable_bytes`: what a program may take of `hbm_bytes`; seen in the compiler's own refusals on v5e and v6e, on other
    TPUs the same quarter of a GiB less, on GPUs 92% (context of CUDA, buffers of NCCL): an assumption.
    `links`: ICI links, two along each dim of the torus; 0 where a switch joins all devices of a host.
    `host_bandwidth`: bytes/s between one device and the memory of its host, each way.
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    source: str
    capability: str = ""
    links: int = 0
    ici_hop_seconds: float = 1.9e-6
    dcn_hop_seconds: float = 4.0e-6
    host_bandwidth: float = 15e9

    @property
    def usable_bytes(self) -> float:
        return self.hbm_bytes - 0.25 * GIB if self.links else 0.92 * self.hbm_bytes


# Of NCCL's rings over NVLink and network: its table hwLat for LL128, nccl src/graph/tuning.cc. Of ICI: about a microsecond
# a hop, jax-ml.github.io/scaling-book. Between slices 10 microseconds, an assumption. To the host: there too, "typically"
# 15 GB/s of a TPU and 32 of a v6e (tpu7x taken for the same); of GPUs PCIe of 16 lanes, generation 4 on A100, else 5.
_TORUS: dict[str, Any] = dict(ici_hop_seconds=1e-6, dcn_hop_seconds=10e-6)
_TPU = "cloud.google.com/tpu/docs/{} (system architecture); DCN per chip: jax-ml.github.io/scaling-book, Hardware"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            {"bf16": 197 * TERA, "int8": 394 * TERA},
            16 * GIB,
            819 * GIGA,
            400e9 / 2,  # 400 GB/s both ways over 4 links
            3.125e9,
            _TPU.format("v5e"),
            links=4,
            **_TORUS,
        ),
        Chip(
            "v5p",
            {"bf16": 459 * TERA, "int8": 918 * TERA},
            95 * GIB,
            2765 * GIGA,
            1200e9 / 2,  # 1,200 GB/s both ways over 6 links
            6.25e9,
            _TPU.format("v5p"),
            links=6,
            **_TORUS,
        ),
        Chip(
            "v6e",
            {"bf16": 918 * TERA, "int8": 1836 * TERA},
            32 * GIB,
            1638 * GIGA,
            800e9 / 2,  # 800 GB/s both ways over 4 links
            12.5e9,
            _TPU.format("v6e"),
            links=4,
            host_bandwidth=32e9,
            **_TORUS,
        ),
        Chip(  # half a chip: JAX sees two devices
            "tpu7x",
            {"bf16": 2307 * TERA / 2, "fp8": 4614 * TERA / 2},
            192 * GIB / 2,
            7380 * GIGA / 2,
            1200e9 / 2 / 2,  # 1,200 GB/s both ways over 6 links
            12.5e9 / 2,
            _TPU.format("tpu7x"),
            links=6,
            host_bandwidth=32e9,
            **_TORUS,
        ),
        Chip(
            "a100",
            {
                "bf16": 312 * TERA,
                "f16": 312 * TERA,
                "tf32": 156 * TERA,
                "f32": 19.5 * TERA,
                "int8": 624 * TERA,
            },
            80 * GIB,
            2039 * GIGA,
            300 * GIGA,
            25 * GIGA,
            "NVIDIA A100 80GB SXM datasheet; NVLink 600 GB/s both ways; one 200 Gbit/s adapter per GPU (DGX A100)",
            "8.0",
            host_bandwidth=32e9,
        ),
        Chip(
            "h100",
            {
                "bf16": 989 * TERA,
                "f16": 989 * TERA,
                "tf32": 494.5 * TERA,
                "f32": 67 * TERA,
                "fp8": 1979 * TERA,
                "int8": 1979 * TERA,
            },
            80 * GIB,
            3352 * GIGA,
            450 * GIGA,
            50 * GIGA,
            "NVIDIA H100 SXM datasheet (dense); NVLink 900 GB/s both ways; one 400 Gbit/s adapter per GPU (DGX H100)",
            "9.0",
            host_bandwidth=64e9,
        ),
        Chip(
            "h200",
            {
                "bf16": 989 * TERA,
                "f16": 989 * TERA,
                "tf32": 494.5 * TERA,
                "f32": 67 * TERA,
                "fp8": 1979 * TERA,
                "int8": 1979 * TERA,
            },
            141 * GIGA,
            4800 * GIGA,
            450 * GIGA,
            50 * GIGA,
            "NVIDIA H200 SXM datasheet (dense); NVLink 900 GB/s both ways; one 400 Gbit/s adapter per GPU (DGX H200)",
            "9.0",
            host_bandwidth=64e9,
        ),
        Chip(
            "b200",
            {
                "bf16": 2250 * TERA,
                "f16": 2250 * TERA,
                "tf32": 1125 * TERA,
                "f32": 75 * TERA,
                "fp8": 4500 * TERA,
                "int8": 4500 * TERA,
            },
            180 * GIGA,
            7700 * GIGA,
            900 * GIGA,
            50 * GIGA,
            "NVIDIA HGX B200 datasheet (dense); NVLink 1.8 TB/s both ways; one 400 Gbit/s adapter per GPU (DGX B200)",
            "10.0",
            host_bandwidth=64e9,
        ),
    )
}


def device_of(mesh: Any) -> Any:
    """A device of the mesh, or what stands for one: anything with `platform` and `device_kind`."""
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device by its `device_kind`, or None where nothing is known (CPUs)."""
    kind = device.device_kind.lower()
    for words, name in (
        (("v5 lite", "v5e"), "v5e"),
        (("v6 lite", "v6e"), "v6e"),
        (("v5p", "tpu v5"), "v5p"),
        (("tpu7x", "tpu v7"), "tpu7x"),
        (("h200",), "h200"),
        (("h100",), "h100"),
        (("b200",), "b200"),
        (("a100",), "a100"),
    ):
        if any(word in kind for word in words):
            return CHIPS[name]
    return None
