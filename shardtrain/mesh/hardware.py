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
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    source: str
    capability: str = ""


_TPU = "cloud.google.com/tpu/docs/{} (system architecture); DCN per chip: jax-ml.github.io/scaling-book, Hardware"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            {"bf16": 197 * TERA, "int8": 394 * TERA},
            16 * GIB,
            819 * GIGA,
            1600e9 / 8 / 2,  # 1,600 Gbit/s per chip over 4 links, both ways counted
            3.125e9,
            _TPU.format("v5e"),
        ),
        Chip(
            "v5p",
            {"bf16": 459 * TERA, "int8": 918 * TERA},
            95 * GIB,
            2765 * GIGA,
            4800e9 / 8 / 2,  # 4,800 Gbit/s per chip over 6 links, both ways counted
            6.25e9,
            _TPU.format("v5p"),
        ),
        Chip(
            "v6e",
            {"bf16": 918 * TERA, "int8": 1836 * TERA},
            32 * GIB,
            1638 * GIGA,
            3584e9 / 8 / 2,  # 3,584 Gbit/s per chip over 4 links, both ways counted
            12.5e9,
            _TPU.format("v6e"),
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
        (("h100",), "h100"),
        (("a100",), "a100"),
    ):
        if any(word in kind for word in words):
            return CHIPS[name]
    return None
