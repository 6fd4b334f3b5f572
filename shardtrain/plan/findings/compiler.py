"""What the compiler said, and what it left undone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardtrain.plan import hlo
from shardtrain.plan.findings.dataflow import argument, number
from shardtrain.plan.findings.finding import LARGE, Finding
from shardtrain.plan.lines import user_line
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled


def does_not_fit(step: Compiled) -> Iterator[Finding]:
    """More memory than the target's chip has. The TPU compiler refuses such a program; the GPU's recomputes and gathers
    again what it can, which is seen as bytes too many, and says nothing."""
    chip = step.target.chip if step.target is not None else None
    peak = step.memory()["peak"]
    if chip is not None and peak > chip.hbm_bytes:
        yield Finding(
            "does-not-fit",
            "error",
            str(step.target),
            "",
            f"{bytes_text(peak)} at its peak, a device has {bytes_text(chip.hbm_bytes)}",
            "more microbatches, remat full, or more of the mesh on fsdp or tensor",
        )


def involuntary_replication(step: Compiled) -> Iterator[Finding]:
    """The partitioner replicated a tensor because it knew no way from one sharding to another."""
    for line in step.compiler_said().splitlines():
        if "nvoluntary full rematerialization" not in line:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        tensor = re.search(r"HLO operation %?[\w.\-]+ = (\w+\[[\d,]*\])", line)
        change = re.search(r"from sharding (\{.*\}) to (\{.*\}) efficiently", line)
        said = f"{tensor.group(1)} " if tensor else "a tensor "
        yield Finding(
            "involuntary-replication",
            "error",
            name.group(1) if name else "",
            _line(step, line, name.group(1) if name else ""),
            f"the partitioner made {said}whole on every device to change its sharding"
            + (f" from {_dims(change.group(1))} to {_dims(change.group(2))}" if change else ""),
            "st.constrain in between, to a sharding that differs from each side in one dim only",
        )


def _line(step: Compiled, said: str, op_name: str) -> str:
    """Warnings give a file and line, the number of a stack frame of the program, or a name only."""
    file = re.search(r'source_file="([^"]*)" source_line=(\d+)', said)
    if file:
        return f"{file.group(1)}:{file.group(2)}"
    frame = re.search(r"stack_frame_id=(\d+)", said)
    found = (
        user_line((f, n) for f, n, _ in step.program().frames.get(int(frame.group(1)), ())) if frame else ""
    )
    return found or step.source_of_operation(op_name)


def _dims(sharding: str) -> str:
    """`{mesh['a'=2], [{'a'}, {}]}` as `a .`; other spellings as they are."""
    dims = re.search(r"\], \[(.*)\]\}", sharding)
    if dims is None:
        return sharding
    return " ".join(
        re.sub(r"['\s]", "", d).replace(",", "+") or "." for d in re.findall(r"\{([^}]*)\}", dims.group(1))
    )


def donation_failed(step: Compiled) -> Iterator[Finding]:
    """Parts of the state that were given away and that the program does not write in place."""
    if not step.donated:
        return
    program, state = step.program(), step.plan.abstract_state
    parameters = [i for i in program.computations[program.entry] if i.op == "parameter"]
    # Leaves that the function does not use are no parameters of its program, and nothing is kept of them.
    there = {argument(i) for i in parameters} - {
        argument(i) for i in parameters if number(i) in program.aliases
    }
    sizes = {
        name: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for index, (name, leaf) in enumerate(zip(flatten(state), state.leaves, strict=True))
        if index in there
    }
    kept = [name for name, size in sizes.items() if size >= LARGE]
    if kept:
        named = step.changed or kept
        yield Finding(
            "donation-failed",
            "error",
            named[0] + (f" and {len(named) - 1} more" if len(named) > 1 else ""),
            step.source_of(named[0].removeprefix("params/")),
            f"{bytes_text(sum(sizes[n] for n in kept))} per device are kept twice, before and after the step"
            + (": returned in another shape or dtype" if step.changed else ""),
            "return every leaf of the state with the shape, dtype and sharding that it came with",
        )


def host_transfer(step: Compiled) -> Iterator[Finding]:
    """The step stops to talk to Python."""
    for instruction in hlo.host_transfers(step.program()):
        yield Finding(
            "host-transfer",
            "error",
            instruction.op_name or instruction.name,
            instruction.source,
            "the step waits for the host: a print or callback of a traced value",
            "return it as a metric (st.Loss(metrics={...})); remove the print from the training step",
        )
