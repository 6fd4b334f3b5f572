"""What the program sends: too wide, too much of it, or for nothing."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from shardtrain.mesh.build import SLOW
from shardtrain.plan import hlo
from shardtrain.plan.findings.dataflow import Body, argument
from shardtrain.plan.findings.finding import LARGE, Finding, large
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled
    from shardtrain.plan.plan import Plan


def wide_collective(step: Compiled) -> Iterator[Finding]:
    """Activations or weights sent in float32 although the step computes in 16 bits."""
    plan = step.plan
    if plan.compute.dtype != jnp.bfloat16 or step.platform == "cpu":  # the CPU compiler widens by itself
        return
    batch = set(plan.manual_axes)
    allowed = {jnp.dtype(leaf.shard.reduce) for leaf in plan.leaves.values()}
    total = step.collectives().wire_bytes
    # Across slices whole gradients are scattered, reduced and gathered again.
    across = any(plan.mesh.shape.get(a, 1) > 1 for a in SLOW)
    across = across and all(leaf.shard.dim is None for leaf in plan.leaves.values())
    for c in large(step):
        if c.wire_bytes < total / 1000:
            continue  # a few scalars a token, such as those of a softmax, are rightly float32
        reducing = c.op in ("all-reduce", "reduce-scatter") or (c.op == "all-gather" and across)
        gradient = set(c.axes) <= batch and reducing
        if c.dtype.startswith("f32") and not (gradient and jnp.dtype("float32") in allowed):
            yield Finding(
                "wide-collective",
                "warning",
                f"{c.op} over {c.axis}",
                c.source,
                f"float32 {c.shape}, {bytes_text(c.wire_bytes)} a step, in a bf16 step: twice the bytes",
                "bf16 where it crosses the axis, float32 after it: no preferred_element_type, modules without a float32 "
                "dtype of their own (nnx.Embed has one unless dtype= says otherwise), and gradients of the same dtype "
                "(a head in chunks: shardtrain.models.layers.cross_entropy)",
            )


def needless_permute(step: Compiled) -> Iterator[Finding]:
    """Data moved between neighbours that nobody asked for: a split of a fused dim, a roll, a misaligned slice."""
    moved: dict[tuple[str, str], list[hlo.Collective]] = defaultdict(list)
    for c in step.collectives():
        written = re.search(r"ppermute|all_to_all|sharding_constraint$", c.op_name)
        # A product in pieces, with its transfers between them.
        product = re.search(r"dot_general|conv_general|einsum|,.*->", c.op_name)
        if c.op in ("collective-permute", "all-to-all") and c.axes and not written and not product:
            moved[c.source, c.axis].append(c)
    for (source, axis), together in moved.items():
        total = sum(c.wire_bytes for c in together)
        most = max(together, key=lambda c: c.wire_bytes)
        yield Finding(
            "needless-permute",
            "warning" if total >= LARGE else "note",
            f"{most.op} over {axis}",
            source,
            f"{most.op_name.rsplit('/', 1)[-1] or 'an operation'} on a dim that {axis} divides: {bytes_text(total)} "
            f"a step move between devices, {sum(c.count for c in together)} times",
            "split, slice or roll along a dim of its own that no mesh axis divides (q, k, v in one kernel: a dim of 3), "
            "or st.constrain what goes in and what comes out alike",
        )


def gathered_activation(step: Compiled) -> Iterator[Finding]:
    """Logits, hidden states or the batch made whole."""
    plan = step.plan
    named = [zip(leaf.shape, leaf.logical or (), strict=False) for leaf in plan.leaves.values()]
    vocab = {size for dims in named for size, name in dims if name == "vocab"}
    batch = set(plan.manual_axes)
    for c in large(step):
        shapes = [
            tuple(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", c.shape)
        ]
        shape = max(shapes, key=math.prod, default=())
        if c.op != "all-gather" or _is_weight(plan, c, shape):
            continue
        if vocab & set(shape) and len(_squeezed(shape)) > 1:
            yield Finding(
                "gathered-logits",
                "error",
                f"all-gather over {c.axis}",
                c.source,
                f"{c.shape}: logits of the whole vocabulary on every device",
                "shardtrain.models.layers.cross_entropy, or a softmax whose maximum and sum are reductions over the "
                "divided vocabulary; st.constrain(logits, 'batch', 'seq_block', 'vocab')",
            )
        elif set(c.axes) & batch and "all_gather" not in c.op_name:
            yield Finding(
                "gathered-batch",
                "error",
                f"all-gather over {c.axis}",
                c.source,
                f"{c.shape}: rows of other devices, made whole on every device",
                "keep the rows divided: a computation of each row, or st.constrain(x, 'batch', ...)",
            )


def gathered_weight(step: Compiled) -> Iterator[Finding]:
    """A parameter that tensor divides, made whole: its products should stay divided."""
    program, batch = step.program(), set(step.plan.manual_axes)
    entry, names = Body(program, program.entry), list(flatten(step.plan.abstract_state))
    for c in large(step):
        if c.op != "all-gather" or c.computation != program.entry or set(c.axes) & batch:
            continue
        # The partitioner gives a gather of an argument the argument's name.
        gather = entry.body[c.name]
        index = (
            argument(gather) if gather.op_name else argument(entry.body[entry.chain(gather.operands[0])[-1]])
        )
        if index is not None and index < len(names) and names[index].startswith("params/"):
            path = names[index].removeprefix("params/")
            yield Finding(
                "gathered-weight",
                "warning",
                path,
                c.source,
                f"{c.shape}, {bytes_text(c.bytes)}: divided over {c.axis} at rest and made whole to be used",
                "constrain what it is multiplied into to the divided dim: st.constrain(y, ..., logical axis)",
            )


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return sorted(n for n in shape if n != 1)


def _is_weight(plan: Plan, c: hlo.Collective, shape: tuple[int, ...]) -> bool:
    """A parameter, or a layer of one, whole or as other axes divide it; reshaped or transposed."""
    others = [n for axis, n in plan.mesh.shape.items() if axis not in c.axes]
    parts = {math.prod(some) for r in range(len(others) + 1) for some in itertools.combinations(others, r)}
    mine, size = _squeezed(shape), math.prod(shape)
    for leaf in plan.leaves.values():
        for whole in (leaf.shape, leaf.shape[1:]):
            dims = _squeezed(whole)
            alike = len(dims) == len(mine) and all(b % a == 0 for a, b in zip(mine, dims, strict=True))
            if size == math.prod(whole) or (alike and math.prod(whole) // size in parts):
                return True
    return False


def scatter_would_do(step: Compiled) -> Iterator[Finding]:
    """An all-reduce of which each device then uses its part only."""
    program = step.program()
    for c in large(step):
        if step.platform == "cpu" and "psum" not in c.op_name:
            continue  # its compiler forms no reduce-scatters from what the partitioner writes
        users = [i for i in program.computations[c.computation] if c.name in i.operands]
        if c.op != "all-reduce" or not users or not all(_keeps_part(program, user, c.name) for user in users):
            continue
        instruction = next(i for i in program.computations[c.computation] if i.name == c.name)
        region = program.computations.get(instruction.attribute("to_apply") or "", ())
        written = any("reduce_scatter" in name for name in (c.op_name, *(i.op_name for i in region)))
        yield Finding(
            "scatter-would-do",
            "note" if written else "warning",
            f"all-reduce over {c.axis}",
            c.source,
            f"{c.shape}: every device keeps only its part: twice the bytes of a reduce-scatter"
            + (", which is what was written" if written else ""),
            "larger shards: the compiler prefers an all-reduce for small arrays and inner dims"
            if written
            else "constrain the result to the divided sharding right where it is made",
        )


def _keeps_part(program: hlo.Program, user: hlo.Instruction, name: str) -> bool:
    if user.op == "dynamic-slice":
        return user.operands[0] == name
    called = user.attribute("calls")
    if user.op != "fusion" or called is None:
        return False
    inside = program.computations.get(called, ())
    position = user.operands.index(name)
    mine = {i.name for i in inside if i.op == "parameter" and f"parameter({position})" in i.rest}
    reading = [i for i in inside if mine & set(i.operands)]
    return bool(reading) and all(i.op == "dynamic-slice" for i in reading)
