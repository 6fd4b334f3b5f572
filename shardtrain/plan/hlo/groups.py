"""Replica groups, in every spelling of XLA, and the mesh axes that they run over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from shardtrain.plan.hlo.text import HloError

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(?\[?([^{]*?)\]?\)?)? ?\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x.strip()]


def replica_groups(rest: str, mesh: Mapping[str, int]) -> list[list[int]]:
    """Groups of positions in the mesh; of a permute, its pairs (source, target).

    Raises:
        HloError: a spelling that is not known.
    """
    if found := _PAIRS.search(rest):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", found.group(1))]
    if found := _MESH.search(rest):
        return _of_mesh(*found.groups(default=""))
    if found := _IOTA.search(rest):
        shape, dims = _ints(found.group(1)), _ints(found.group(2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found.group(3):
            ids = ids.transpose(_ints(found.group(3)))
        return ids.reshape(shape).tolist()
    if found := _LISTS.search(rest):
        return [_ints(group) for group in re.findall(r"\{([\d,]*)\}", found.group(1))] or _all(mesh)
    if found := re.search(r"replica_groups=(\S+)", rest):
        raise HloError(f"replica groups that are not understood: {found.group(1)[:120]}")
    return _all(mesh)


def _all(mesh: Mapping[str, int]) -> list[list[int]]:
    return [list(range(math.prod(mesh.values())))]


def _of_mesh(axes: str, devices: str, chosen: str) -> list[list[int]]:
    """`mesh['x'=8,'y'=4] {'x':(2)2,'y'}`: `:(pre)size` takes a part of an axis."""
    sizes = [(name, int(n)) for name, n in re.findall(r"'?([\w.\-]+)'?=(\d+)", axes)]
    ids = np.arange(math.prod(n for _, n in sizes))
    if devices:
        ids = _device_ids(devices, ids.size)
    wanted = re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", chosen)
    order: dict[tuple[str, int], int] = {}
    shape: list[int] = []
    for name, n in sizes:
        parts = sorted((int(pre), int(size)) for axis, pre, size in wanted if axis == name and pre)
        if not parts:
            order[name, 0] = len(shape)
            shape.append(n)
            continue
        done = 1
        for pre, size in parts:
            if pre > done:
                shape.append(pre // done)
            order[name, pre] = len(shape)
            shape.append(size)
            done = pre * size
        if done < n:
            shape.append(n // done)
    selected = [order[name, int(pre or 0)] for name, pre, _ in wanted]
    others = [d for d in range(len(shape)) if d not in selected]
    grid = ids.reshape(shape).transpose(others + selected)
    return grid.reshape(-1, math.prod(shape[d] for d in selected)).tolist()


def _device_ids(text: str, count: int) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`, `[4,2]T(1,0)`, or a list."""
    iota = re.match(r"\[?([\d,]+)\]?<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        ids = np.arange(count).reshape(_ints(iota.group(2)))
        return (ids.transpose(_ints(iota.group(3))) if iota.group(3) else ids).reshape(-1)
    turned = re.match(r"\[?([\d,]+)\]?T\(([\d,]+)\)", text)
    if turned:
        return np.arange(count).reshape(_ints(turned.group(1))).transpose(_ints(turned.group(2))).reshape(-1)
    listed = _ints(re.sub(r"[^\d,]", "", text))
    if len(listed) != count:
        raise HloError(f"device ids that are not understood: {text[:120]}")
    return np.array(listed)


def mesh_axes(groups: Iterable[Iterable[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    shape = tuple(mesh.values())
    varying: set[int] = set()
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.array(list(group)), shape))
        varying |= {i for i in range(len(shape)) if (coordinates[i] != coordinates[i][0]).any()}
    return tuple(name for i, name in enumerate(mesh) if i in varying)
