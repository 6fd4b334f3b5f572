"""A plan's step partitioned on paper: no device and no vendor's compiler.

The step is lowered on an abstract mesh, Shardy's passes (which ship in jaxlib) divide it, and the StableHLO of one device
is read: FLOPs, collectives, arguments, and an estimate of temporaries. About a CPU second, whatever the size of
mesh and model. Manual regions are per device before, the automatic axes (tensor) become so here; both end in the same
operations.

Every private part of JAX that this needs is used here alone. Where one is missing, `unavailable` says which, and what
rests on this falls back to arithmetic, labelled as such.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jax

from shardtrain.errors import CompileError
from shardtrain.mesh import Target
from shardtrain.parallel.fused import on_paper
from shardtrain.plan.compiled import lower_step
from shardtrain.plan.hlo import Collectives, replica_groups
from shardtrain.plan.liveness import FUSED, Live, live
from shardtrain.plan.paper import (
    KINDS,
    TO_DEVICE,
    TO_HOST,
    Array,
    Block,
    Op,
    Paper,
    Work,
    count,
    to_and_fro,
    work,
)

try:
    from jax._src.interpreters import mlir as jax_mlir
    from jax._src.lib.mlir import ir, passmanager
    from jaxlib.mlir.dialects import stablehlo

    # Shardy does not divide CHLO's operations: they are spelled out before.
    stablehlo.register_stablehlo_passes()
    _MISSING = ""
except (ImportError, AttributeError) as error:  # another JAX keeps them elsewhere
    _MISSING = f"this jaxlib has no {error}"

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan

_PASSES = (
    "builtin.module(func.func(chlo-legalize-to-stablehlo),sdy-propagation-pipeline,"
    "func.func(sdy-insert-explicit-reshards{enable-full-version=true},sdy-reshard-to-collectives),"
    "sdy-convert-global-to-local)"
)
_RUNS = re.compile(r"branch_\d+_fun/runs_(\d+)_of_(\d+)")
_WIDTHS = {"i1": 1, "bf16": 2, "f16": 2, "i4": 0.5, "ui4": 0.5, "i2": 0.25, "ui2": 0.25, "index": 8}


@dataclasses.dataclass(frozen=True)
class Partitioned:
    """Of one device and step. `arguments`: bytes, exact. `live`: what is live when most is, an estimate of temporaries.

    `flops`: of products, loops multiplied, and of fused attention (half of the scores where it is causal).
    `work`: what it computes and moves in memory. `hosted`: bytes to the host's memory and back. `ops`: size of the program.
    """

    flops: float
    work: tuple[Work, ...]
    collectives: Collectives
    arguments: float
    live: Live
    hosted: float
    ops: int
    source: str

    @property
    def temporaries(self) -> float:
        """Bytes."""
        return self.live.bytes

    @property
    def peak(self) -> float:
        """Bytes: arguments (new state takes the place of the old) and temporaries."""
        return self.arguments + self.temporaries


def unavailable(mesh: Mapping[str, int]) -> str:
    """Why nothing can be partitioned over this mesh here; empty where it can."""
    if not _MISSING and jax.__version_info__ < (0, 12) and mesh.get("tensor", 1) > 1:
        # its sdy-convert-global-to-local aborts the process on products that sum over a divided dim
        return (
            f"Shardy of jaxlib {jax.lib.__version__} does not divide products over tensor, that of 0.12 does"
        )
    return _MISSING


def partition(plan: Plan, target: Target) -> Partitioned:
    """Lower the step for the target's platform, divide it, and read one device's part.

    Args:
        plan: on an abstract mesh (`target.mesh(...)`): nothing is allocated, no device is touched.

    Raises:
        CompileError: Shardy refused the program, or JAX has moved what this needs (see `unavailable`).
        HloError: a loop that computes or sends runs an unknown number of times.

    Its FLOPs are those of the compiled program, its collectives' bytes what a partitioner without further optimization
    sends; held to them by tests/unit/plan/test_partitioned.py.
    """
    if why := unavailable(plan.mesh.shape):
        raise CompileError(why, where=f"target {target}", fix="the versions of JAX that are tested")
    with on_paper():
        lowered = lower_step(plan, target.platform)
    paper = divide(lowered.compiler_ir("stablehlo"), dict(plan.mesh.shape), f"target {target}")
    flops, collectives = count(paper)
    return Partitioned(
        flops=flops,
        work=work(paper, FUSED),
        collectives=collectives,
        arguments=sum(paper.values[a].bytes for a in paper.entry.takes),
        live=live(paper, target.platform),
        hosted=to_and_fro(paper),
        ops=_size(paper.entry),
        source=f"partitioned by Shardy of jaxlib {jax.lib.__version__} for {target}, not compiled",
    )


def divide(module: Any, mesh: Mapping[str, int], where: str = "program") -> Paper:
    """One device's part of a lowered module. The module itself stays as it is."""
    with jax_mlir.make_ir_context():
        copy = ir.Module.parse(module.operation.get_asm(binary=False, enable_debug_info=True))
        try:
            passmanager.PassManager.parse(_PASSES).run(copy.operation)
        except Exception as error:  # MLIR's own kind, which has moved before
            raise CompileError(
                str(error).splitlines()[-1][:300], where=where, why="Shardy's passes", fix="another layout"
            ) from error
        return _Reader(copy, mesh).paper


def _size(block: Block) -> int:
    return sum(1 + sum(map(_size, op.blocks)) for op in block.ops)


@functools.lru_cache(maxsize=4096)
def _array(text: str) -> Array:
    found = re.fullmatch(r"tensor<((?:\d+x)*)([^<>]+)>", text)
    if found is None:
        return Array(text, (), 0)
    dtype = found.group(2)
    bits = re.search(r"(\d+)", dtype.removeprefix("f8").removeprefix("bf8")) if dtype[:2] != "f8" else None
    width = _WIDTHS.get(dtype, 1 if dtype[:2] == "f8" else int(bits.group(1)) / 8 if bits else 4)
    return Array(dtype, tuple(int(n) for n in found.group(1).split("x") if n), width)


class _Reader:
    """MLIR into plain values; calls of functions are written out where they stand."""

    def __init__(self, module: Any, mesh: Mapping[str, int]):
        self.functions = {
            op.attributes["sym_name"].value: op
            for op in module.body.operations
            if op.operation.name == "func.func"
        }
        self.values: dict[int, Array] = {}
        self.mesh = mesh
        self.paper = Paper(self.block(self.functions["main"].regions[0].blocks[0], {}), self.values, mesh)

    def new(self, value: Any) -> int:
        number = len(self.values)
        self.values[number] = _array(str(value.type))
        return number

    def block(self, block: Any, outside: Mapping[Any, int]) -> Block:
        names = dict(outside)
        takes = []
        for argument in block.arguments:
            names[argument] = self.new(argument)
            takes.append(names[argument])
        ops: list[Op] = []
        gives = self.operations(block, names, ops)
        return Block(tuple(takes), tuple(ops), gives, _share(block))

    def operations(self, block: Any, names: dict[Any, int], ops: list[Op]) -> tuple[int, ...]:
        """Append what the block does; returns what it returns."""
        for view in block.operations:
            op = view.operation
            full = op.name
            if full in ("stablehlo.return", "func.return", "sdy.return"):
                return tuple(names[v] for v in op.operands)
            if full in ("func.call", "call"):
                body = self.functions[op.attributes["callee"].value].regions[0].blocks[0]
                inner = dict(zip(body.arguments, (names[v] for v in op.operands), strict=True))
                for result, gave in zip(op.results, self.operations(body, inner, ops), strict=True):
                    names[result] = gave
                continue
            ops.append(self.operation(op, full.rpartition(".")[2], names))
        return ()

    def operation(self, op: Any, name: str, names: dict[Any, int]) -> Op:
        reads = [names[v] for v in op.operands]
        if name == "custom_call" and op.attributes["call_target_name"].value == "annotate_device_placement":
            name = TO_HOST if "pinned_host" in str(op.attributes["mhlo.frontend_attributes"]) else TO_DEVICE
        nested = name in ("while", "case", "if")
        blocks = tuple(self.block(r.blocks[0], names) for r in op.regions) if nested else ()
        if name in ("case", "if"):  # branches see what is outside
            reads += sorted(_outside(blocks))
        makes = []
        for result in op.results:
            names[result] = self.new(result)
            makes.append(names[result])
        more: dict[str, Any] = {}
        if name in KINDS:
            more = _who(op, name, self.mesh)
        elif name == "constant" and self.values[makes[0]].shape == ():
            found = re.search(r"dense<(-?\d+)>", str(op.attributes["value"]))
            more = {"number": int(found.group(1)) if found else None}
        elif name == "compare":
            more = {"compares": str(op.attributes["comparison_direction"]).rpartition(" ")[2].strip(">")}
        else:
            more = {"flops": self.flops(op, name, reads, makes)}
        matters = more.get("flops") or name in KINDS or name == "while"
        source, scope = _location(op) if matters else ("", "")
        return Op(name, tuple(reads), tuple(makes), blocks, source=source, scope=scope, **more)

    def flops(self, op: Any, name: str, reads: list[int], makes: list[int]) -> float:
        """2 x multiplications of products; of our stand-in for a fused kernel what it says; convolutions as if nothing
        were padded."""
        shape = lambda number: self.values[number].shape  # noqa: E731
        if name == "dot_general":
            text = str(op.attributes["dot_dimension_numbers"])
            found = re.search(r"lhs_contracting_dimensions = \[([\d, ]*)\]", text)
            dims = [int(d) for d in found.group(1).split(",")] if found and found.group(1) else []
            return 2.0 * math.prod(shape(makes[0])) * math.prod(shape(reads[0])[d] for d in dims)
        if name == "ragged_dot":
            return 2.0 * math.prod(shape(makes[0])) * shape(reads[0])[-1]
        if name == "convolution":
            numbers = str(op.attributes["dimension_numbers"])
            kernel = re.search(r"x\[([^\]]*)\]", numbers)
            names = [part.strip() for part in kernel.group(1).split(",")] if kernel else []
            taps = math.prod(n for n, d in zip(shape(reads[1]), names, strict=True) if d != "o")
            return 2.0 * math.prod(shape(makes[0])) * taps
        if name == "custom_call" and "mhlo.backend_config" in op.attributes:
            found = re.search(r"\bflops = (\d+)", str(op.attributes["mhlo.backend_config"]))
            return float(found.group(1)) if found else 0.0
        return 0.0


def _outside(blocks: tuple[Block, ...]) -> set[int]:
    """Values that blocks read and do not make themselves."""
    found: set[int] = set()
    for block in blocks:
        own = {*block.takes, *(m for op in block.ops for m in op.makes)}
        read = {r for op in block.ops for r in op.reads} | set(block.gives) | _outside_all(block)
        found |= read - own
    return found


def _outside_all(block: Block) -> set[int]:
    return {r for op in block.ops for r in _outside(op.blocks)}


def _share(block: Any) -> Fraction:
    """How often a branch is taken, of all runs: what its trace was named by (`parallel.ticks.runs`), else 1."""
    inside = collections.Counter(
        found[-1] for view in block.operations if (found := _RUNS.findall(str(view.operation.location)))
    )
    if not inside:
        return Fraction(1)
    times, of = inside.most_common(1)[0][0]
    return Fraction(int(times), int(of))


def _who(op: Any, name: str, mesh: Mapping[str, int]) -> dict[str, Any]:
    """The devices of a collective: mesh axes by name, or numbers."""
    attribute = op.attributes["source_target_pairs" if name == "collective_permute" else "replica_groups"]
    text = str(attribute)
    named = re.findall(r'name = "([^"]+)"(?:, sub_axis_info = \S*?\((\d+)\)(\d+))?', text)
    if any(size for _, _, size in named):  # in the spelling of XLA, which has a reader
        sizes = ",".join(f"'{axis}'={n}" for axis, n in mesh.items())
        parts = ",".join(f"'{axis}':({pre}){n}" if n else f"'{axis}'" for axis, pre, n in named)
        found = replica_groups(f"replica_groups=mesh[{sizes}] {{{parts}}}", mesh)
        return {"groups": tuple(map(tuple, found))}
    if named:
        return {"axes": tuple(a for a in mesh if a in {axis for axis, _, _ in named})}
    entries: Any = ir.DenseIntElementsAttr(attribute)
    rows, width = [int(n) for n in entries], ir.ShapedType(attribute.type).shape[1]
    return {"groups": tuple(tuple(rows[i : i + width]) for i in range(0, len(rows), width))}


def _location(op: Any) -> tuple[str, str]:
    """`file.py:123` of the user, and JAX's name of an operation."""
    text = str(op.location)
    names = re.findall(r'"([^"]*)"', text)
    files = re.findall(r'"([^"]+\.py)":(\d+)', text)
    own = [f for f in files if "/shardtrain/" not in f[0]] or files
    scope = next((n for n in names if "/" in n and not n.endswith(".py")), "")
    return (f"{own[0][0].rpartition('/')[2]}:{own[0][1]}" if own else ""), scope
