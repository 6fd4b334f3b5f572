"""Where a value in a program comes from, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from shardtrain.plan import hlo
from shardtrain.plan.findings.finding import LARGE

_MOVES = {
    "convert", "copy", "bitcast", "reshape", "transpose", "get-tuple-element", "tuple", "multiply", "select",
    "all-reduce-done", "reduce-scatter-done", "async-done", "fusion-done", "copy-start", "copy-done",
}  # fmt: skip
_SAME = {"copy", "bitcast", "get-tuple-element", "copy-start", "copy-done"}  # these change nothing
_FUSIONS = {"fusion", "fusion-start"}
_FIXED = {"constant", "iota", "partition-id", "replica-id"}
_MIXING = {"dot", "convolution", "custom-call", "reduce", "reduce-window", "scatter", "gather"}
_CHANGING = {"rng", "rng-bit-generator", "infeed", "recv", "custom-call", "while", "conditional"}


class Body:
    """What reads what in a computation; of a loop's body, which places of its state change."""

    def __init__(self, program: hlo.Program, name: str):
        self.program = program
        self.body = {i.name: i for i in program.computations[name]}
        self.root = next(i for i in self.body.values() if i.root)
        self.users: dict[str, list[hlo.Instruction]] = {}
        for instruction in self.body.values():
            for operand in instruction.operands:
                self.users.setdefault(operand, []).append(instruction)
        self._constant: dict[str, bool] = {}

    def flow(self, names: Iterable[str]) -> set[str]:
        """These values and what they become, moved, scaled, converted, or written into a larger array."""
        found, frontier = set(names), list(names)
        for _ in range(8):
            users = {user.name: user for name in frontier for user in self.users.get(name, [])}
            # Of several arrays reduced together only large ones count.
            frontier = [
                name
                for name, user in users.items()
                if name not in found and self._carries(user) and hlo.size(user.result) >= LARGE
            ]
            found.update(frontier)
        return found

    def _carries(self, user: hlo.Instruction) -> bool:
        if user.op in _MOVES or user.op == "dynamic-update-slice":
            return True
        inside = (
            self.program.computations.get(user.attribute("calls") or "", ()) if user.op in _FUSIONS else ()
        )
        return bool(inside) and not any(i.op in _MIXING for i in inside)

    def accumulates(self, names: Iterable[str]) -> bool:
        """Whether values are only added to a number of the loop's state that nothing else reads."""
        users = {user.name: user for name in self.flow(names) for user in self.users.get(name, [])}
        # A fusion that sums or multiplies before it adds makes something else of the value.
        adding = [user for user in users.values() if user.op == "add" or self._carries(user)]
        return any(self._adds_to(user, n) for user in adding for n in range(len(user.operands)))

    def written(self, names: Iterable[str]) -> list[int]:
        """Places of the loop's state that hold these values in the end."""
        flow = self.flow(names)
        return [n for n, operand in enumerate(self.root.operands) if flow & set(self.chain(operand))]

    def _adds_to(self, user: hlo.Instruction, position: int) -> bool:
        """Whether this operand is a total in the loop's state, and the user writes the next one."""
        place = self.place(user.operands[position])
        if place is None or place >= len(self.root.operands) or not _adds(self.program, user, position):
            return False
        readers = [
            i.name for i in self.body.values() if i.op == "get-tuple-element" and self.place(i.name) == place
        ]
        alone = all(self._only_feeds(reader, user.name) for reader in readers)
        return alone and user.name in _chain(self.body, self.root.operands[place])

    def _only_feeds(self, name: str, goal: str) -> bool:
        return all(
            user.name == goal or user.root or (user.op in _MOVES and self._only_feeds(user.name, goal))
            for user in self.users.get(name, [])
        )

    def place(self, name: str, through: Set[str] = _MOVES) -> int | None:
        """Place in the loop's state that a value was read from, but for moves."""
        for step in _chain(self.body, name, through):
            instruction = self.body[step]
            if instruction.op == "get-tuple-element":
                source = self.body.get(instruction.operands[0])
                return (
                    _number(instruction, "index=")
                    if source is not None and source.op == "parameter"
                    else None
                )
        return None

    def index(self, instruction: hlo.Instruction) -> int | None:
        """Which element a `get-tuple-element` takes."""
        return _number(instruction, "index=") if instruction.op == "get-tuple-element" else None

    def chain(self, name: str) -> list[str]:
        """A value and those that it was moved from."""
        return _chain(self.body, name)

    def parameter(self, name: str) -> int | None:
        """Number of the parameter that a value is, but for moves."""
        last = self.body.get(_chain(self.body, name)[-1])
        return _number(last, r"parameter\(") if last is not None and last.op == "parameter" else None

    def constant(self, name: str) -> bool:
        """Whether a value is the same in every run."""
        if name not in self._constant:
            self._constant[name] = False  # a value that needs itself is none
            self._constant[name] = self._is_constant(self.body.get(name))
        return self._constant[name]

    def _is_constant(self, instruction: hlo.Instruction | None) -> bool:
        if instruction is None or instruction.op in _CHANGING or instruction.op == "parameter":
            return False
        if instruction.op in _FIXED:
            return True
        if instruction.op == "get-tuple-element":
            place = self.place(instruction.name, _SAME)
            if place is not None:
                after = self.root.operands[place : place + 1]
                return any(self.place(name, _SAME) == place for name in after)
        return bool(instruction.operands) and all(map(self.constant, instruction.operands))


def _chain(body: dict[str, hlo.Instruction], name: str, through: Set[str] = _MOVES) -> list[str]:
    """A value and those that it was moved from."""
    found = [name]
    for _ in range(8):
        instruction = body.get(name)
        if instruction is None or instruction.op not in through or not instruction.operands:
            break
        name = _from(body, instruction)
        if name in body:
            found.append(name)
    return found


def _from(body: dict[str, hlo.Instruction], move: hlo.Instruction) -> str:
    """Of a select between a value and zeros (a total before the first turn): the value."""
    if move.op != "select":
        return move.operands[0]
    ops = {name: body[name].op for name in move.operands[1:] if name in body}
    return next((name for name, op in ops.items() if op not in ("broadcast", "constant")), move.operands[1])


def _number(instruction: hlo.Instruction, before: str) -> int | None:
    found = re.search(rf"{before}(\d+)", instruction.rest)
    return int(found.group(1)) if found else None


def _adds(program: hlo.Program, user: hlo.Instruction, position: int) -> bool:
    """Whether this operand is added to, in the instruction itself or as a term of its fusion's result."""
    if user.op == "add":
        return True
    called = user.attribute("calls") if user.op in _FUSIONS else None
    if called is None or called not in program.computations:
        return False
    inside = Body(program, called)
    results = {
        name for result in (inside.root.name, *inside.root.operands) for name in _chain(inside.body, result)
    }
    return any(
        i.op == "add" and i.name in results and position in map(inside.parameter, i.operands)
        for i in inside.body.values()
    )


def argument(instruction: hlo.Instruction) -> int | None:
    """Which argument of the step it is, or was made for: `leaves[3]` in its name; of a parameter without a name, its
    number. Arguments that a program does not use are no parameters of it, so names come first.
    """
    named = re.fullmatch(r"leaves\[(\d+)\]", instruction.op_name)
    if named:
        return int(named.group(1))
    return number(instruction) if instruction.op == "parameter" and not instruction.op_name else None


def number(parameter: hlo.Instruction) -> int:
    """Of a parameter, in its computation."""
    found = _number(parameter, r"parameter\(")
    assert found is not None
    return found
