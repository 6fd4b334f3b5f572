"""Hardware that a plan is compiled for, present or not."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from shardtrain.errors import MeshError, suggestion
from shardtrain.mesh.build import across_slices, named_sizes
from shardtrain.mesh.hardware import CHIPS, Chip

Platform = Literal["tpu", "cuda", "cpu"]


@dataclasses.dataclass(frozen=True)
class _Family:
    platform: Platform
    kind: str  # JAX's device_kind
    dims: int  # of a topology: TPU chips along each dim, GPU hosts x devices
    per_chip: int = 1  # JAX devices
    most: int = 0  # chips of a TPU's largest slice


_FAMILIES = {
    "v5e": _Family("tpu", "TPU v5 lite", 2),
    "v6e": _Family("tpu", "TPU v6 lite", 2),
    "v5p": _Family("tpu", "TPU v5", 3, most=6144),
    "tpu7x": _Family("tpu", "TPU7x", 3, 2, most=9216),
    "a100": _Family("cuda", "NVIDIA A100-SXM4-80GB", 2),
    "h100": _Family("cuda", "NVIDIA H100 80GB HBM3", 2),
    "h200": _Family("cuda", "NVIDIA H200", 2),
    "b200": _Family("cuda", "NVIDIA B200", 2),
    "cpu": _Family("cpu", "cpu", 1),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
"""Slices of v5e and v6e, and small ones of v5p and tpu7x. Source: Google Cloud's pages on these chips."""


@dataclasses.dataclass(frozen=True, init=False)
class Target:
    """`Target("v5e:4x4")`, `"2*v5e:16x16"` (slices), `"h100:8x8"` (hosts x devices), `"cpu:8"`.

    `family`: the chip's name. `platform`: whose compiler. `topology`: chips along each dim of one slice,
    or hosts and devices a host. `slices`: joined by the slow network. `size`: JAX devices in all.
    """

    name: str
    family: str
    platform: Platform
    topology: tuple[int, ...]
    slices: int
    size: int

    def __init__(self, name: str | Target):
        name = str(name)
        match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)", name.strip().lower())
        if match is None:
            raise MeshError(
                "not a target",
                where=f"target '{name}'",
                fix="FAMILY:SHAPE, such as v5e:4x4, h100:8x8 or cpu:8",
            )
        slices, family = int(match.group(1) or 1), match.group(2)
        if family not in _FAMILIES:
            raise MeshError(
                f"no family '{family}'",
                where=f"target '{name}'",
                fix=suggestion(family, _FAMILIES, "v5e, h100"),
            )
        facts = _FAMILIES[family]
        topology = tuple(int(n) for n in match.group(3).split("x"))
        if min(topology) < 1 or slices < 1:
            raise MeshError("a dim of 0", where=f"target '{name}'", fix="1 or more of everything")
        if len(topology) != facts.dims:
            shape = (
                "x".join(["4"] * facts.dims) if facts.platform == "tpu" else "8" if family == "cpu" else "2x8"
            )
            raise MeshError(
                f"a shape of {len(topology)} dims, {family} has {facts.dims}",
                where=f"target '{name}'",
                fix=f"{family}:{shape}",
            )
        if facts.platform == "tpu" and not _made(facts, topology):
            turned = tuple(sorted(topology))
            known = _FLAT if facts.dims == 2 else (*_SOLID, "and multiples of 4, rising, such as 4x4x8")
            shown = ["x".join(map(str, turned))] if _made(facts, turned) else known
            raise MeshError(
                "no slice of this shape is made",
                where=f"target '{name}'",
                fix=f"{family}:{', '.join(shown)}",
            )
        if slices > 1 and facts.platform != "tpu":
            raise MeshError(
                f"{slices} slices",
                where=f"target '{name}'",
                why="only TPUs come in slices; hosts are the first number of a GPU target",
                fix=f"{family}:{slices * topology[0]}x{topology[-1]}",
            )
        for field, value in (
            ("name", f"{slices}*" * (slices > 1) + f"{family}:{'x'.join(map(str, topology))}"),
            ("family", family),
            ("platform", facts.platform),
            ("topology", topology),
            ("slices", slices),
            ("size", slices * math.prod(topology) * facts.per_chip),
        ):
            object.__setattr__(self, field, value)

    def __str__(self) -> str:
        return self.name

    @property
    def chip(self) -> Chip | None:
        """What its devices can do; None where no figures are known."""
        return CHIPS.get(self.family)

    def mesh(self, *, dcn: Mapping[str, int] | None = None, **sizes: int) -> AbstractMesh:
        """A mesh over the target's devices, as `make_mesh` makes one of those that are here.

        Raises:
            MeshError: sizes that do not multiply to the number of devices; slices that no axis crosses.
        """
        shape = named_sizes(self.size, dcn=dcn, **sizes)
        if self.slices > 1:
            across_slices(shape, self.slices)
        return self._abstract(shape)

    @property
    def one_device(self) -> AbstractMesh:
        """A mesh of one of its devices."""
        return self.some_devices(data=1)

    def some_devices(self, **axes: int) -> AbstractMesh:
        """A mesh of as many of its devices as the axes take."""
        return self._abstract(axes)

    def _abstract(self, shape: Mapping[str, int]) -> AbstractMesh:
        platform = "gpu" if self.platform == "cuda" else self.platform
        device = AbstractDevice(device_kind=_FAMILIES[self.family].kind, num_cores=None, platform=platform)
        types = (AxisType.Auto,) * len(shape)
        return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=types, abstract_device=device)


def _made(facts: _Family, topology: tuple[int, ...]) -> bool:
    if "x".join(map(str, topology)) in (_FLAT if facts.dims == 2 else _SOLID):
        return True
    cubes = all(n % 4 == 0 for n in topology) and list(topology) == sorted(topology)
    return facts.dims == 3 and cubes and math.prod(topology) <= facts.most
