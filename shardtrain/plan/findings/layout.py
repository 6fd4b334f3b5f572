"""What the plan alone tells: where parameters, their optimizer state and their stacks live."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from shardtrain.parallel.stages import STAGE
from shardtrain.plan.findings.finding import LARGE, Finding
from shardtrain.sharding.rules import spec_axes
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled


def replicated_parameter(step: Compiled) -> Iterator[Finding]:
    """A large parameter that an axis leaves whole although the rules spread others over it."""
    plan = step.plan
    ruled = {a for axes in plan.rules.params.values() for a in axes}
    sizes = {axis: n for axis, n in plan.mesh.shape.items() if n > 1 and axis in ruled}
    total = sum(math.prod(leaf.shape) for leaf in plan.leaves.values())
    for path, leaf in plan.leaves.items():
        for axis, n in sizes.items():
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            if axis in spec_axes(leaf.spec) or len(leaf.shape) < 2 or size * 20 < total * leaf.dtype.itemsize:
                continue
            if (
                size < LARGE
                or plan.is_vector(path)
                or not any(dim % n == 0 and dim > n for dim in leaf.shape)
            ):
                continue
            fix = f"a logical axis that the rules put on {axis} (st.logical, st.annotate), or rules.override"
            if plan.pipeline is not None and axis == STAGE:
                if not plan.pipeline.owns(path):
                    continue  # what is outside the stack is on every stage
                deal = plan.pipeline.deal
                fix = f"layers that {deal.pieces} pieces divide; {deal.layers} are whole on every stage"
            yield Finding(
                "replicated-parameter",
                "warning",
                path,
                step.source_of(path),
                f"{bytes_text(size)} whole on every device along {axis}={n}; logical axes {leaf.logical}",
                fix,
            )


def optimizer_less_divided(step: Compiled) -> Iterator[Finding]:
    """Optimizer state that is less divided than the parameters that it is of."""
    plan = step.plan
    divided = {a for leaf in plan.leaves.values() for a in spec_axes(leaf.spec)}
    worst: dict[str, tuple[int, str, list[str]]] = {}
    for path, leaf in flatten(plan.abstract_state.opt_state).items():
        owner = next((p for p in plan.leaves if f"/{path}".endswith(f"/{p}")), None)
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if size < LARGE:
            continue
        wanted = divided if owner is None else spec_axes(plan.leaves[owner].spec)
        if owner is not None and plan.leaves[owner].shape != tuple(leaf.shape):
            continue  # factored statistics are small
        missing = "+".join(a for a in plan.mesh.shape if a in wanted - spec_axes(leaf.sharding.spec))
        if missing:
            worst.setdefault(missing, (size, owner or "", []))[2].append(path)
            if size > worst[missing][0]:
                worst[missing] = (size, owner or "", [path, *worst[missing][2][:-1]])
    for missing, (size, owner, paths) in worst.items():
        yield Finding(
            "optimizer-less-divided",
            "error",
            f"opt_state/{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""),
            step.source_of(owner),
            f"{bytes_text(size)} on each device, not divided over {missing} as "
            + ("its parameter is" if owner else "the parameters are"),
            "rules whose optimizer map follows the parameters (leave optimizer= out)"
            if owner
            else "an optimizer that keeps one array for each parameter, not all of them as one (optax.flatten)",
        )


def stack_gathered_whole(step: Compiled) -> Iterator[Finding]:
    """Layers that the model scans itself, gathered all at once before the scan."""
    plan = step.plan
    if not step.trains:
        return
    seen: set[str] = set()
    for path, source in plan.seen.scanned.items():
        leaf, top = plan.leaves[path], path.split("/")[0]
        if plan.held or leaf.shard.dim is None or top in seen or path.startswith(tuple(plan.stacks)):
            continue
        seen.add(top)
        whole = sum(
            math.prod(plan.leaves[p].shape) * jnp.dtype(leaf.shard.wire).itemsize
            for p in plan.seen.scanned
            if p.startswith(f"{top}/") or p == top
        )
        yield Finding(
            "stack-gathered-whole",
            "warning",
            top,
            source,
            f"the scan runs over layers of {bytes_text(whole)} that are all gathered before it starts, and kept",
            f'one line at the top of the scanned function: layer = st.gather(layer, "{top}")',
        )
