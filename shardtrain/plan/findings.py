"""What is wrong with a compiled step: each check looks for one fault and names the line and the way out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from shardtrain.plan import hlo
from shardtrain.sharding.rules import mesh_text, spec_axes
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
LARGE = 64 * 1024  # bytes of one run; smaller collectives are latency, not bytes


@dataclasses.dataclass(frozen=True)
class Finding:
    """`path`: a leaf or a collective; `source`: `file.py:123` of the user; `fix`: the way out."""

    kind: str
    severity: Severity
    path: str
    source: str
    message: str
    fix: str

    def __str__(self) -> str:
        where = " ".join(part for part in (self.source, self.path) if part)
        return f"{self.severity}: {self.kind}: {where}: {self.message}\n  try: {self.fix}"


def findings(step: Compiled) -> list[Finding]:
    """All of them, worst first."""
    found = [finding for check in CHECKS for finding in check(step)]
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda f: -SEVERITIES.index(f.severity))


# --- what the plan alone tells -----------------------------------------------------------------------


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
            if plan.is_vector(path) or not any(dim % n == 0 and dim > n for dim in leaf.shape):
                continue
            yield Finding(
                "replicated-parameter",
                "warning",
                path,
                step.source_of(path),
                f"{bytes_text(size)} whole on every device along {axis}={n}; logical axes {leaf.logical}",
                f"a logical axis that the rules put on {axis} (st.logical, st.annotate), or rules.override",
            )


def optimizer_less_divided(step: Compiled) -> Iterator[Finding]:
    """Optimizer state that is less divided than its parameter."""
    plan = step.plan
    for path, leaf in flatten(plan.abstract_state.opt_state).items():
        owner = next((p for p in plan.leaves if f"/{path}".endswith(f"/{p}")), None)
        if owner is None or plan.leaves[owner].shape != tuple(leaf.shape):
            continue
        mine, parameters = (spec_axes(s) for s in (leaf.sharding.spec, plan.leaves[owner].spec))
        if parameters - mine:
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            yield Finding(
                "optimizer-less-divided",
                "error",
                f"opt_state/{path}",
                step.source_of(owner),
                f"{bytes_text(size)} per device: not divided over {'+'.join(sorted(parameters - mine))} "
                "as its parameter is",
                "rules whose optimizer map follows the parameters (leave optimizer= out)",
            )


def stack_gathered_whole(step: Compiled) -> Iterator[Finding]:
    """Layers that the model scans itself, gathered all at once before the scan."""
    plan = step.plan
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


# --- what the compiler said ------------------------------------------------------------------------------


def involuntary_remat(step: Compiled) -> Iterator[Finding]:
    """The partitioner replicated a tensor because it knew no way from one sharding to another."""
    for line in step.compiler_said().splitlines():
        if "nvoluntary full rematerialization" not in line:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', line)
        change = re.search(r"from sharding (\{.*?\}) to (\{.*?\})", line)
        yield Finding(
            "involuntary-replication",
            "error",
            name.group(1) if name else "",
            f"{file.group(1)}:{file.group(2)}"
            if file
            else step.source_of_operation(name.group(1) if name else ""),
            "the partitioner made a tensor whole on every device to change its sharding"
            + (f" from {change.group(1)} to {change.group(2)}" if change else ""),
            "st.constrain on both sides of the operation with shardings that differ in one dim only",
        )


def donation_failed(step: Compiled) -> Iterator[Finding]:
    """Parts of the state that the program does not write in place."""
    if not step.donated:
        return
    program = step.program()
    names = list(flatten(step.plan.abstract_state))
    kept = [name for index, name in enumerate(names) if index not in program.aliases]
    sizes = {
        name: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for name, leaf in zip(names, step.plan.abstract_state.leaves, strict=True)
    }
    kept = [name for name in kept if sizes[name] >= LARGE]
    if kept:
        yield Finding(
            "donation-failed",
            "error",
            kept[0],
            "",
            f"{len(kept)} leaves, {bytes_text(sum(sizes[n] for n in kept))} per device, are kept twice",
            "an update that keeps shapes, dtypes and shardings of the state",
        )


# --- what the program sends -----------------------------------------------------------------------------


def _large(step: Compiled) -> list[hlo.Collective]:
    return [c for c in step.collectives() if c.bytes >= LARGE and c.axes]


def reduced_in_loop(step: Compiled) -> Iterator[Finding]:
    """A reduction whose result is only added up by the loop around it: once after the loop would do."""
    program = step.program()
    for c in _large(step):
        if c.op in ("all-reduce", "reduce-scatter") and c.loops and _accumulates(program, c):
            yield Finding(
                "reduced-in-loop",
                "error",
                f"{c.op} over {c.axis}",
                c.source,
                f"{bytes_text(c.bytes)} reduced {c.count} times a step and then added up",
                "add up first and reduce once: leave the gradient to the plan (st.plan, plan.gradients)",
            )


def _accumulates(program: hlo.Program, c: hlo.Collective) -> bool:
    """Whether the loop only adds the result to a number of its state that nothing else reads."""
    body = {i.name: i for i in program.computations[c.computation]}
    users: dict[str, list[hlo.Instruction]] = {}
    for instruction in body.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    root = next(i for i in body.values() if i.root)
    frontier = [c.name]
    for _ in range(8):
        after: list[str] = []
        for name in frontier:
            for user in users.get(name, []):
                for position, operand in enumerate(user.operands):
                    place = _carry(body, operand)
                    if place is None or place >= len(root.operands) or not _adds(program, user, position):
                        continue
                    read_once = all(_only_feeds(users, reader, user.name) for reader in _readers(body, place))
                    if read_once and _reaches(body, root.operands[place], user.name):
                        return True
                # Of several arrays reduced together only large ones count.
                if (user.op in _PASSING or user.op == "fusion") and hlo.size(user.result) >= LARGE:
                    after.append(user.name)
        frontier = after
    return False


_PASSING = {
    "convert", "copy", "bitcast", "reshape", "transpose", "get-tuple-element", "all-reduce-done", "tuple",
    "reduce-scatter-done", "async-done", "copy-start", "copy-done", "multiply",
}  # fmt: skip


def _adds(program: hlo.Program, user: hlo.Instruction, position: int) -> bool:
    """Whether this operand is added to, in the instruction itself or as a term of its fusion's result."""
    if user.op == "add":
        return True
    called = user.attribute("calls") if user.op == "fusion" else None
    inside = {i.name: i for i in program.computations.get(called or "", ())}
    for instruction in inside.values():
        if instruction.op == "add":
            sources = {_parameter(inside, operand) for operand in instruction.operands}
            if position in sources and _is_result(inside, instruction.name):
                return True
    return False


def _parameter(body: dict[str, hlo.Instruction], name: str) -> int | None:
    """Number of the parameter that a value is, but for moves."""
    for _ in range(6):
        instruction = body.get(name)
        if instruction is None:
            return None
        if instruction.op == "parameter":
            number = re.search(r"parameter\((\d+)\)", instruction.rest)
            return int(number.group(1)) if number else None
        if instruction.op not in _PASSING or not instruction.operands:
            return None
        name = instruction.operands[0]
    return None


def _is_result(body: dict[str, hlo.Instruction], name: str) -> bool:
    root = next((i for i in body.values() if i.root), None)
    if root is None:
        return False
    return root.name == name or any(_reaches(body, operand, name) for operand in (root.name, *root.operands))


def _readers(body: dict[str, hlo.Instruction], place: int) -> list[str]:
    return [i.name for i in body.values() if i.op == "get-tuple-element" and _carry(body, i.name) == place]


def _only_feeds(users: dict[str, list[hlo.Instruction]], name: str, goal: str) -> bool:
    for user in users.get(name, []):
        moved = user.op in _PASSING and _only_feeds(users, user.name, goal)
        if user.name != goal and not user.root and not moved:
            return False
    return True


def _carry(body: dict[str, hlo.Instruction], name: str) -> int | None:
    """Place in the loop's state that a value was read from."""
    for _ in range(6):
        instruction = body.get(name)
        if instruction is None:
            return None
        if instruction.op == "get-tuple-element":
            source = body.get(instruction.operands[0])
            index = re.search(r"index=(\d+)", instruction.rest)
            return int(index.group(1)) if source is not None and source.op == "parameter" and index else None
        if instruction.op not in _PASSING or not instruction.operands:
            return None
        name = instruction.operands[0]
    return None


def _reaches(body: dict[str, hlo.Instruction], start: str, goal: str) -> bool:
    name = start
    for _ in range(8):
        if name == goal:
            return True
        instruction = body.get(name)
        if instruction is None or instruction.op not in _PASSING or not instruction.operands:
            return False
        name = instruction.operands[0]
    return False


def wide_collective(step: Compiled) -> Iterator[Finding]:
    """Activations or weights sent in float32 although the step computes in 16 bits."""
    plan = step.plan
    if plan.compute.dtype != jnp.bfloat16 or step.platform == "cpu":  # the CPU compiler widens by itself
        return
    batch = set(plan.rules.batch_axes(plan.mesh))
    allowed = {jnp.dtype(leaf.shard.reduce) for leaf in plan.leaves.values()}
    for c in _large(step):
        gradient = set(c.axes) <= batch and c.op in ("all-reduce", "reduce-scatter")
        if c.dtype.startswith("f32") and not (gradient and jnp.dtype("float32") in allowed):
            yield Finding(
                "wide-collective",
                "warning",
                f"{c.op} over {c.axis}",
                c.source,
                f"float32 {c.shape}, {bytes_text(c.wire_bytes)} a step, in a bf16 step: twice the bytes",
                "convert to the activations' dtype before it crosses the axis (st.cross_entropy for a head)",
            )


def needless_permute(step: Compiled) -> Iterator[Finding]:
    """Data moved between neighbours by the partitioner: a split of a fused dim, a roll, a misaligned slice."""
    for c in _large(step):
        written = c.op_name.rsplit("/", 1)[-1]
        if c.op not in ("collective-permute", "all-to-all") or re.search(
            r"ppermute|all_to_all|dot|conv", c.op_name
        ):
            continue
        if "einsum" in c.op_name or re.search(r",.*->", c.op_name):
            continue  # a product in pieces, with its transfers between them
        yield Finding(
            "needless-permute",
            "warning",
            f"{c.op} over {c.axis}",
            c.source,
            f"{written or 'an operation'} on a divided dim moves {bytes_text(c.wire_bytes)} a step between devices",
            "split, slice or roll along a dim of its own that no mesh axis divides (fused q, k, v: a dim of 3)",
        )


def gathered_activation(step: Compiled) -> Iterator[Finding]:
    """Logits, hidden states or the batch made whole."""
    plan = step.plan
    vocab = {
        n
        for leaf in plan.leaves.values()
        for n, a in zip(leaf.shape, leaf.logical or (), strict=False)
        if a == "vocab"
    }
    weights = {_squeezed(leaf.shape[s:]) for leaf in plan.leaves.values() for s in (0, 1)}
    batch = set(plan.rules.batch_axes(plan.mesh))
    for c in _large(step):
        shapes = [
            tuple(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", c.shape)
        ]
        if c.op != "all-gather" or not shapes:
            continue
        shape = max(shapes, key=math.prod)
        if vocab & set(shape) and len(_squeezed(shape)) > 1 and not _is_weight(shape, weights):
            yield Finding(
                "gathered-logits",
                "error",
                f"all-gather over {c.axis}",
                c.source,
                f"{c.shape}: logits of the whole vocabulary on every device",
                "st.models' cross_entropy, or a softmax written as reductions over the divided vocabulary",
            )
        elif set(c.axes) & batch and "embed" not in c.op_name and not _is_weight(shape, weights):
            yield Finding(
                "gathered-batch",
                "error",
                f"all-gather over {c.axis}",
                c.source,
                f"{c.dtype} {c.shape}: rows of other devices, made whole on every device",
                "keep the rows divided: a per-row computation, or st.constrain(x, 'batch', ...)",
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _is_weight(shape: tuple[int, ...], weights: set[tuple[int, ...]]) -> bool:
    """A weight, whole, its transpose, or what another axis leaves of it."""
    mine = sorted(_squeezed(shape))
    for weight in weights:
        other = sorted(weight)
        if mine == other or math.prod(mine) == math.prod(other):
            return True
        if len(mine) == len(other) and all(b % a == 0 for a, b in zip(mine, other, strict=True)):
            return True
    return False


def scatter_would_do(step: Compiled) -> Iterator[Finding]:
    """An all-reduce of which each device then uses its part only."""
    if step.platform == "cpu":
        return  # its compiler forms no reduce-scatters from these
    program = step.program()
    for c in _large(step):
        if c.op != "all-reduce":
            continue
        users = [i for i in program.computations[c.computation] if c.name in i.operands]
        if users and all(_slices(program, user, c.name) for user in users):
            yield Finding(
                "scatter-would-do",
                "warning",
                f"all-reduce over {c.axis}",
                c.source,
                f"{c.shape}: every device keeps only its part: twice the bytes of a reduce-scatter",
                "constrain the result to the divided sharding right where it is made",
            )


def _slices(program: hlo.Program, user: Any, name: str) -> bool:
    if user.op == "dynamic-slice":
        return user.operands[0] == name
    called = re.search(r"\bcalls=%?([\w.\-]+)", user.rest)
    if user.op != "fusion" or called is None:
        return False
    inside = program.computations.get(called.group(1), ())
    position = user.operands.index(name)
    mine = [i.name for i in inside if i.op == "parameter" and f"parameter({position})" in i.rest]
    reading = [i for i in inside if set(mine) & set(i.operands)]
    return bool(reading) and all(i.op == "dynamic-slice" for i in reading)


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


CHECKS: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    involuntary_remat,
    donation_failed,
    host_transfer,
    reduced_in_loop,
    gathered_activation,
    optimizer_less_divided,
    replicated_parameter,
    stack_gathered_whole,
    wide_collective,
    needless_permute,
    scatter_would_do,
)


def describe(step: Compiled) -> str:
    """`v5e:2x4, mesh fsdp=8`."""
    return f"{step.target or step.platform}, mesh {mesh_text(step.plan.mesh)}"
