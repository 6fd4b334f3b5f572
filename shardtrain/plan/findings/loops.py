"""Collectives inside a loop that could stand outside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardtrain.plan import hlo
from shardtrain.plan.findings.dataflow import Body
from shardtrain.plan.findings.finding import Finding, Severity, large
from shardtrain.tree import bytes_text

if TYPE_CHECKING:
    from shardtrain.plan.compiled import Compiled


def reduced_in_loop(step: Compiled) -> Iterator[Finding]:
    """A reduction whose result is only added up by the loop around it: once after the loop would do."""
    program = step.program()
    reductions = (c for c in large(step) if c.op in ("all-reduce", "reduce-scatter") and c.loops)
    yield from _findings(
        step,
        [c for c in reductions if _accumulated(program, *_arrival(program, c))],
        "reduced-in-loop",
        "error",
        "reduced {count} times a step and then added up",
        "add up first, reduce once: leave the gradients to the plan (plan.step, plan.gradients)",
    )


def repeated_in_loop(step: Compiled) -> Iterator[Finding]:
    """A collective of something that no run of the loop changes: once before the loop would do."""
    program = step.program()
    yield from _findings(
        step,
        [c for c in large(step) if c.loops and _repeats(program, c)],
        "repeated-in-loop",
        "warning",
        "sent {count} times a step, the same each time",
        "once before the loop: constrain or gather it there, and close over it",
    )


def _findings(
    step: Compiled, some: list[hlo.Collective], kind: str, severity: Severity, message: str, fix: str
) -> Iterator[Finding]:
    """One for each; one note for all that the plan means: weights outside `held_leaves` that fsdp gathers, and whose
    gradients it reduces, for each microbatch, to keep none whole."""
    plan = step.plan
    divided = {
        a for path, leaf in plan.leaves.items() if path not in plan.held_leaves for a in leaf.shard.axes
    }
    meant = [c for c in some if step.trains and plan.microbatches > 1 and set(c.axes) <= divided]
    for c in some:
        if c not in meant:
            text = f"{bytes_text(c.bytes)} {message.format(count=c.count)}"
            yield Finding(kind, severity, f"{c.op} over {c.axis}", c.source, text, fix)
    if meant:
        most = max(meant, key=lambda c: c.wire_bytes)
        yield Finding(
            kind,
            "note",
            f"{most.op} over {most.axis}",
            most.source,
            f"{bytes_text(sum(c.wire_bytes for c in meant))} a step, for each of {plan.microbatches} microbatches, so "
            "that no weight is kept whole",
            "where memory allows, rules.override(hold=True): gathered and reduced once a step",
        )


def _arrival(program: hlo.Program, c: hlo.Collective) -> tuple[str, list[str]]:
    """Where the result can be used first. TPUs hide a collective behind others: a fusion starts it, others hold pieces of
    it, and the one that ends it gives the result. Followed from the start: others may share its channel and its shape."""
    caller, piece = _caller(program, c.computation), _piece(_instruction(program, c.computation, c.name))
    if caller is None or not piece[0]:
        return c.computation, [c.name]
    holds = {
        i.name: any(_piece(j) == piece for j in program.computations.get(i.attribute("calls") or "", ()))
        for i in program.computations[caller[0]]
    }
    users, way = Body(program, caller[0]).users, [caller[1]]
    for instruction in way:
        way += [
            user
            for user in users.get(instruction.name, [])
            if user not in way and (user.op == "get-tuple-element" or holds[user.name])
        ]
    ends = [i.name for i in way if holds[i.name] and not i.result.startswith("(")]
    return (caller[0], ends) if ends else (c.computation, [c.name])


def _piece(instruction: hlo.Instruction) -> tuple[str, float]:
    """Channel and bytes, which all pieces of a collective share."""
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return (found.group(1) if found else ""), hlo.size(instruction.result)


def _accumulated(program: hlo.Program, where: str, names: list[str]) -> bool:
    """Whether a loop adds values up, or a loop around it does, after layers have written theirs into a stack."""
    for _ in range(4):
        body = Body(program, where)
        if body.accumulates(names):
            return True
        places, loop = body.written(names), _loop(program, where)
        if loop is None or not places:
            return False
        where = loop[0]
        outer = Body(program, where)
        names = [i.name for i in outer.users.get(loop[1].name, []) if outer.index(i) in places]
    return False


def _loop(program: hlo.Program, body: str) -> tuple[str, hlo.Instruction] | None:
    """The loop that runs a body, and where it stands."""
    loops = (
        (w, i) for w, instructions in program.computations.items() for i in instructions if i.op == "while"
    )
    return next(((where, i) for where, i in loops if i.attribute("body") == body), None)


def _repeats(program: hlo.Program, c: hlo.Collective) -> bool:
    """Whether every operand is the same in all runs of the innermost loop around it."""
    where, names = c.computation, list(_instruction(program, c.computation, c.name).operands)
    bodies = {i.attribute("body") for body in program.computations.values() for i in body if i.op == "while"}
    for _ in range(4):  # out of the fusions and calls around it
        if where in bodies:
            body = Body(program, where)
            return all(body.constant(name) for name in names)
        inside = Body(program, where)
        numbers = [inside.parameter(name) for name in names]
        caller = _caller(program, where)
        if caller is None or any(n is None or n >= len(caller[1].operands) for n in numbers):
            return False
        where, names = caller[0], [caller[1].operands[n] for n in numbers if n is not None]
    return False


def _instruction(program: hlo.Program, where: str, name: str) -> hlo.Instruction:
    return next(i for i in program.computations[where] if i.name == name)


def _caller(program: hlo.Program, callee: str) -> tuple[str, hlo.Instruction] | None:
    for where, body in program.computations.items():
        for instruction in body:
            if instruction.attribute("calls") == callee or instruction.attribute("to_apply") == callee:
                return where, instruction
    return None
