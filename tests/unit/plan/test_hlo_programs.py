"""The HLO reader against counts by hand, on what three compilers make of the same small programs.

The texts for TPU and GPU are stored: hlo_programs/make.py compiles them without devices.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import pytest

from shardtrain.plan import hlo

HERE = Path(__file__).parent / "hlo_programs"
sys.path.insert(0, str(HERE))
from programs import PROGRAMS, Program, Row  # noqa: E402

CASES = [(name, target) for name, program in PROGRAMS.items() for target in program.targets]


def text_of(name: str, program: Program, target: str) -> str:
    if target != "cpu":
        return gzip.decompress((HERE / "texts" / target / f"{name}.txt.gz").read_bytes()).decode()
    devices = np.array(jax.devices()[:8]).reshape(tuple(program.mesh.values()))
    return program.lower(jax.sharding.Mesh(devices, tuple(program.mesh))).compile().as_text()


def added(rows: list[Row]) -> list[Row]:
    """Rows of the same collective as one: a compiler may peel a turn off a loop, or unroll it."""
    totals: dict[tuple[str, str, str, float], list[float]] = defaultdict(lambda: [0, 0.0])
    for row in rows:
        total = totals[(row.op, row.axis, row.dtype, float(row.bytes))]
        total[0] += row.count
        total[1] += row.wire
    return sorted(Row(*key[:3], int(count), key[3], wire) for key, (count, wire) in totals.items())


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{target}-{name}" for name, target in CASES])
def test_reader_agrees_with_the_count_by_hand(name: str, target: str) -> None:
    """Each of these faults in the reader was planted, and failed here:

    a loop's body counted once; trip counts not read off the condition (TPU), or a step of two taken for one; pieces of one
    asynchronous gather counted each, or added up (TPU); a line of a kernel's metadata that closes the computation; the
    closing line of a SparseCore thread not known, or its calls not followed; transfers between slices left out; a
    reduce-scatter in a fusion taken for an all-reduce; a part of an axis taken for all of it, or its stride ignored;
    every device of a permute counted as sending; the payload of a reduce-scatter its result, of a gather its operand,
    of a tuple its first array; windows of a convolution by order, not by label.
    """
    program = PROGRAMS[name]
    read = hlo.read(text_of(name, program, target), program.mesh)
    found = [Row(c.op, c.axis, c.dtype, c.count, c.bytes, c.wire_bytes) for c in read.collectives]
    assert added(found) == added(list(program.expected(target)))
    assert read.flops == program.other_flops.get(target, program.flops)
    for c in read.collectives:
        assert c.partial == program.partial
        # on two slices the first axis goes from slice to slice
        assert c.dcn == (target == "slices" and c.axes == ("data",))
        assert c.count % math.prod(c.loops) == 0


def test_every_kind_of_collective_is_counted_on_every_compiler() -> None:
    """At least twenty programs a compiler, and all five kinds of collective among what is asked for."""
    for target in ("cpu", "tpu", "gpu"):
        programs = [program for program in PROGRAMS.values() if target in program.targets]
        assert len(programs) >= 20
        kinds = {row.op for program in programs for row in program.rows}
        assert kinds == {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
