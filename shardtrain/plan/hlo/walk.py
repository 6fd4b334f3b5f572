"""How often every part of a program runs, and which collectives hide behind what."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from shardtrain.plan.hlo.collectives import KINDS
from shardtrain.plan.hlo.loops import known_state, trip_count
from shardtrain.plan.hlo.text import HloError, Instruction, Module

MEGASCALE = "_xla_megascale_transfer_type"
_RUNS = re.compile(r"\d+_fun/runs_(\d+)_of_(\d+)")
_CALLERS = {"fusion", "call", "custom-call", "conditional", "async-start"}
_STARTS = ("async-start", "call-start")


class Walk:
    """Runs, loops and asynchrony of every computation."""

    def __init__(self, module: Module):
        self.module = module
        self.bodies = {name: {i.name: i for i in body} for name, body in module.computations.items()}
        self.times: dict[str, Fraction | int] = collections.defaultdict(int)
        self.loops: dict[str, tuple[int, ...]] = {}
        self.reached: set[str] = set()
        self.asynchronous: set[str] = set()
        self.callers: dict[str, tuple[str, Instruction]] = {}
        self.matters = self._matters()

    def _matters(self) -> set[str]:
        """Computations that send or multiply, themselves or in what they call."""
        matters = {
            name
            for name, body in self.module.computations.items()
            if any(
                kind_of(i) or between_slices(i) or i.op in ("dot", "convolution", "custom-call") for i in body
            )
        }
        grew = True
        while grew:
            outer = {
                name
                for name, body in self.module.computations.items()
                if name not in matters and any(c in matters for i in body for c in called(i))
            }
            matters |= outer
            grew = bool(outer)
        return matters

    def visit(
        self, name: str, times: Fraction | int, loops: tuple[int, ...], hidden: bool, arguments: Sequence[Any]
    ) -> None:
        self.reached.add(name)
        self.times[name] += times
        if len(loops) >= len(self.loops.get(name, ())):
            self.loops[name] = loops
        if hidden:
            self.asynchronous.add(name)
        for instruction in self.module.computations[name]:
            inner = [c for c in called(instruction) if c in self.matters]
            for callee in inner:
                self.callers.setdefault(callee, (name, instruction))
            if not inner:
                continue
            if instruction.op == "while":
                trips = trip_count(self.bodies, name, instruction, arguments)
                if trips is None:
                    raise HloError(
                        f"loop {instruction.name} in {name} runs an unknown number of times",
                        why="it holds collectives or products, which cannot be counted then",
                        fix="a scan or fori_loop over a known number; it trains as it is",
                    )
                body = instruction.attribute("body")
                known = known_state(self.bodies, name, instruction, arguments)
                for callee in inner:
                    if callee == body:
                        self.visit(callee, times * trips, (*loops, trips), hidden, known)
                    else:
                        self.visit(callee, times * (trips + 1), loops, hidden, ())
            else:
                shares = {c: self._share(c) for c in inner} if instruction.op == "conditional" else {}
                apart = hidden or instruction.op in _STARTS or _overlapped(instruction)
                for callee in inner:
                    self.visit(callee, times * shares.get(callee, 1), loops, apart, ())

    def started_whole(self, name: str) -> bool:
        """Whether a computation is what one instruction starts and another ends, so that no piece of it stands elsewhere."""
        return name in self.callers and self.callers[name][1].op in _STARTS

    def _share(self, branch: str) -> Fraction:
        """How often a branch is taken, of all runs: what its trace was named by (`parallel.ticks.runs`), else 1."""
        names = (i.op_name.rpartition("branch_")[2] for i in self.module.computations[branch])
        inside = collections.Counter(named.groups() for name in names if (named := _RUNS.match(name)))
        if not inside:
            return Fraction(1)
        times, of = inside.most_common(1)[0][0]
        return Fraction(int(times), int(of))


def number(times: Fraction | int) -> int | float:
    return int(times) if times == int(times) else float(times)


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs; not those that combine two numbers in a reduction."""
    if instruction.op == "while":
        names = [instruction.attribute("body"), instruction.attribute("condition")]
        return [name for name in names if name]
    if instruction.op not in _CALLERS and not instruction.op.endswith("-start"):
        return []
    keys = ["calls", "true_computation", "false_computation"]
    if instruction.op in ("call", "call-start", "custom-call", "async-start"):
        keys.append("to_apply")
    names = [instruction.attribute(key) for key in keys]
    found = [name for name in names if name]
    for key in ("branch_computations", "called_computations", "calls"):
        found += [name for name in instruction.attributes(key) if name]
    return list(dict.fromkeys(found))


def kind_of(instruction: Instruction) -> str:
    kind = instruction.op.removesuffix("-start")
    return kind if kind in KINDS else ""


def between_slices(instruction: Instruction) -> bool:
    return instruction.op == "send" and MEGASCALE in instruction.rest


def _overlapped(instruction: Instruction) -> bool:
    """A TPU fusion of a collective with what runs meanwhile, or of its start or its end."""
    named = instruction.name.startswith(("async-collective", "async_collective"))
    return (
        named
        or "async_collective_fusion_config" in instruction.rest
        or "calls=%async_coll" in instruction.rest
    )
