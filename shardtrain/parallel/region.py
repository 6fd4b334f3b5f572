"""Regions in which a device sees its own part alone: nothing is left there to the partitioner."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax

from shardtrain.sharding import context


def free_axes() -> frozenset[str]:
    """Mesh axes that no `shard_map` around holds, and the partitioner has; none outside a Plan."""
    layout = context.current()
    if layout is None or layout.mesh is None:
        return frozenset()
    return frozenset(a for a in layout.mesh.shape if a not in layout.manual)


def on_parts(
    function: Callable[..., Any], ins: Any, outs: Any, axes: Collection[str], *, check_vma: bool = True
) -> Callable[..., Any]:
    """`function` on what each device holds: these automatic mesh axes are manual around it.

    Without this the partitioner makes arrays whole over them before a manual collective, or a kernel.

    Args:
        ins, outs: specs over `axes`. axes: none, and it is `function` itself. check_vma: False for a kernel, whose results
            do not say over which axes they vary, in whatever region is around.
    """
    if not axes and check_vma:
        return function
    layout = context.current()
    # Inside another region the mesh is the one around.
    mesh = None if layout is None or layout.manual else layout.mesh
    return jax.shard_map(
        function, mesh=mesh, in_specs=ins, out_specs=outs, axis_names=set(axes), check_vma=check_vma
    )
