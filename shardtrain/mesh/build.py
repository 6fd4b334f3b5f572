"""A mesh from axis sizes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardtrain.errors import MeshError

AnyMesh = Mesh | AbstractMesh
"""Of devices that are here, or of a target's."""

AXES = ("slice", "slice_fsdp", "stage", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outer to inner. `slice` and `slice_fsdp` are the slow network between slices or nodes."""

SLOW = ("slice", "slice_fsdp")
_ACROSS = {
    "data": "slice",
    "fsdp": "slice_fsdp",
    "stage": "stage",
}  # what an axis is called across the slow network


def make_mesh(
    *, dcn: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None, **sizes: int
) -> Mesh:
    """A `jax.sharding.Mesh` with the named axes in their order, all of them Auto.

    Args:
        sizes: axis name -> size, e.g. `data=2, fsdp=-1, tensor=2`. One may be -1: what is left of
            the devices. No sizes at all means `data=-1`. Axes of your own come last, in the order
            given (inner-most: neighbours), and mean what your rules say.
        dcn: axes that also span the slow network, so many times: `{"data": 2}` adds the mesh axis `slice=2`, which
            carries rows; `{"fsdp": 2}` adds `slice_fsdp=2`, over which parameters are divided too and gathered;
            `{"stage": 2}` needs no axis of its own: there are twice as many stages, the outermost mesh axis, and so half
            of them in each slice.
        devices: defaults to `jax.devices()`.

    Returns:
        A mesh with only the axes that were named. Neighbours on inner axes are neighbours on the
        interconnect where the hardware says so.

    Raises:
        MeshError: sizes that do not multiply to the number of devices, more than one free axis.

    Source: device order from `jax.experimental.mesh_utils`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = named_sizes(len(devices), dcn=dcn, **sizes)
    grid = device_grid(shape, devices)
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def named_sizes(count: int, *, dcn: Mapping[str, int] | None = None, **sizes: int) -> dict[str, int]:
    """Axis sizes for `count` devices, in the order of a mesh; see `make_mesh`."""
    sizes = dict(sizes) or {"data": -1}
    for axis, size in (dcn or {}).items():
        across = _ACROSS.get(axis)
        if across is None:
            raise MeshError(
                f"dcn={{'{axis}': {size}}}: {', '.join(_ACROSS)} cross the slow network by name",
                where="make_mesh",
                why="what the others send is too much for it",
                fix=f"make_mesh(slice={size}, ...) and rules of your own that use slice",
            )
        if axis != across and across in sizes:
            raise MeshError(f"both dcn= and {across}= were given", where="make_mesh", fix="give one of them")
        if sizes.get(across) == -1:
            raise MeshError(
                f"{across}=-1 and dcn={{'{axis}': {size}}}", where="make_mesh", fix=f"a size for {across}"
            )
        sizes[across] = size * sizes.get(across, 1) if _positive(size) else size
    for axis, size in sizes.items():
        if not _positive(size) and size != -1:
            raise MeshError(
                f"size {size!r} is not a positive integer",
                where=f"mesh axis '{axis}'",
                fix=f"{axis}=-1 for the rest",
            )
    names = [a for a in AXES if a in sizes] + [a for a in sizes if a not in AXES]
    return resolve_sizes({a: sizes[a] for a in names}, count)


def _positive(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def across_slices(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """How many parts of each mesh axis are in different slices: all of `slice` and `slice_fsdp`, and of `stage` the rest.

    Raises:
        MeshError: another number of slices.
    """
    outer = {a: n if a in SLOW else 1 for a, n in shape.items()}
    rest, left = divmod(slices, math.prod(outer.values()))
    if not left and rest > 1 and shape.get("stage", 1) % rest == 0:
        outer["stage"], rest = rest, 1
    if left or rest != 1:
        said = " ".join(f"{a}={shape[a]}" for a in (*SLOW, "stage") if a in shape) or "slice=1"
        raise MeshError(
            f"the devices are in {slices} slices, the mesh says {said}",
            where="mesh",
            fix=f"dcn={{'data': {slices}}}, or fsdp or stage in its place",
        )
    return outer


def resolve_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Fill in the one free axis and check the product against the number of devices."""
    text = " x ".join(f"{a}={n}" for a, n in sizes.items())
    free = [a for a, n in sizes.items() if n == -1]
    if len(free) > 1:
        raise MeshError(
            f"more than one axis is -1: {', '.join(free)}", where=f"mesh {text}", fix=f"a size for {free[0]}"
        )
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if free:
        if count % fixed:
            raise MeshError(
                f"{count} devices cannot be divided by {fixed}, so {free[0]} has no size",
                where=f"mesh {text}",
                fix=f"sizes whose product divides {count}",
            )
        return {a: count // fixed if n == -1 else n for a, n in sizes.items()}
    if fixed != count:
        last = next((a for a in reversed(list(sizes)) if count % (fixed // sizes[a]) == 0), None)
        fits = [f"{last}={count // (fixed // sizes[last])}"] if last else []
        raise MeshError(
            f"the mesh has {fixed} positions, but there are {count} devices",
            where=f"mesh {text}",
            fix=", ".join(
                [*fits, "-1 for one axis", f"or {fixed} devices (for simulated ones: cpu:{fixed})"]
            ),
        )
    return dict(sizes)


def device_grid(shape: Mapping[str, int], devices: list[Any]) -> np.ndarray:
    """The devices in mesh order, neighbours on the interconnect where the hardware says so."""
    sizes = tuple(shape.values())
    if devices[0].platform != "tpu":
        # CPU ids are sparse over processes, so never index by id; hosts stay contiguous.
        ordered = sorted(devices, key=lambda d: (d.process_index, d.id)) if _default(devices) else devices
        return np.array(ordered, dtype=object).reshape(sizes)
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) > 1:
        outer = across_slices(shape, len(slices))
        inner = [n // outer[a] for a, n in shape.items()]
        return mesh_utils.create_hybrid_device_mesh(
            inner, list(outer.values()), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _default(devices: list[Any]) -> bool:
    """Whether these are all devices of the run, whose order is ours to choose."""
    return len(devices) == jax.device_count() and set(devices) == set(jax.devices())


def simulate_devices(count: int) -> None:
    """Make this process see `count` CPU devices, for notebooks and tests. Call it before using JAX.

    Raises:
        MeshError: JAX has already started with other devices; they cannot be changed any more.
    """
    if count < 1:
        raise MeshError(f"{count} devices", where="simulate_devices", fix="a positive number")
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    try:
        jax.config.update("jax_platforms", "cpu")
        if flag is None or int(flag.group(1)) != count:
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    found = jax.devices()
    if len(found) != count or found[0].platform != "cpu":
        raise MeshError(
            f"JAX has already started with {len(found)} {found[0].platform} device(s), {count} were asked for",
            where="simulate_devices",
            why="devices are fixed when JAX first touches them",
            fix="restart the process or kernel and call simulate_devices before anything that uses JAX",
        )
