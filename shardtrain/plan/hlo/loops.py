"""How often a loop runs, where the compiler does not say."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.plan.hlo.text import Instruction

Computations = Mapping[str, Mapping[str, Instruction]]
_THROUGH = {
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "opt-barrier",
    "optimization-barrier",
}
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}


@dataclasses.dataclass(frozen=True)
class _State:
    """The loop's whole state, or one number of it plus a constant."""

    index: int | None = None
    plus: int = 0


@dataclasses.dataclass(frozen=True)
class _Compare:
    direction: str
    left: Any
    right: Any


class _Scope:
    """A computation with the values of its parameters, as far as they are known. Each value is found once."""

    def __init__(self, computations: Computations, name: str | None, arguments: Sequence[Any]):
        self.computations, self.arguments = computations, arguments
        self._body: Mapping[str, Instruction] = computations.get(name or "", {})
        self._known: dict[str, Any] = {}

    def value(self, name: str, depth: int = 0) -> Any:
        """A number, a `_State`, a `_Compare`, a list (of a tuple's values), or None where it cannot be told."""
        if name not in self._known:
            self._known[name] = self._find(name, depth)
        return self._known[name]

    def _find(self, name: str, depth: int) -> Any:
        instruction = self._body.get(name)
        if instruction is None or depth > 60 or not _may_count(instruction):
            return None
        op, operands = instruction.op, instruction.operands
        if op == "constant":
            number = re.search(r"constant\((-?\d+)\)", instruction.rest)
            return int(number.group(1)) if number else None
        if op == "parameter":
            number = re.search(r"parameter\((\d+)\)", instruction.rest)
            index = int(number.group(1)) if number else len(self.arguments)
            return self.arguments[index] if index < len(self.arguments) else None
        if op in _THROUGH and operands:
            return self.value(operands[0], depth + 1)
        if op == "tuple":
            return [self.value(operand, depth + 1) for operand in operands]
        if op == "get-tuple-element":
            found = re.search(r"index=(\d+)", instruction.rest)
            inside = self.value(operands[0], depth + 1)
            if found is None:
                return None
            index = int(found.group(1))
            if isinstance(inside, list):
                return inside[index] if index < len(inside) else None
            return _State(index) if inside == _State() else None
        if op in ("add", "subtract") and len(operands) == 2:
            left, right = (self.value(o, depth + 1) for o in operands)
            return _sum(left, right, 1 if op == "add" else -1)
        if op == "compare" and len(operands) == 2:
            left, right = (self.value(o, depth + 1) for o in operands)
            return _Compare(instruction.attribute("direction") or "", left, right)
        if op in ("fusion", "call"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            if called not in self.computations:
                return None
            inner = _Scope(self.computations, called, [self.value(o, depth + 1) for o in operands])
            return inner.root(depth + 1)
        return None

    def root(self, depth: int = 0) -> Any:
        last = next((i for i in self._body.values() if i.root), None)
        return None if last is None else self.value(last.name, depth)


def _may_count(instruction: Instruction) -> bool:
    """Counters are integers, and what holds or compares them; nothing else is worth following."""
    return instruction.result.startswith(("(", "s32[]", "u32[]", "s64[]", "u64[]", "pred[]"))


def _sum(a: Any, b: Any, sign: int) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a + sign * b
    if isinstance(a, _State) and a.index is not None and isinstance(b, int):
        return _State(a.index, a.plus + sign * b)
    if isinstance(b, _State) and b.index is not None and isinstance(a, int) and sign == 1:
        return _State(b.index, b.plus + a)
    return None


def trip_count(
    computations: Computations, where: str, loop: Instruction, arguments: Sequence[Any] = ()
) -> int | None:
    """Runs of the body of a `while`, or None where it cannot be told.

    Args:
        where: the computation that holds the loop. arguments: what is known of its parameters.
    """
    said = re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.rest)
    if said:
        return int(said.group(1))
    condition, body = loop.attribute("condition"), loop.attribute("body")
    if condition not in computations or body not in computations or not loop.operands:
        return None
    test = _Scope(computations, condition, [_State()]).root()
    after = _Scope(computations, body, [_State()]).root()
    before = _Scope(computations, where, arguments).value(loop.operands[0])
    if not isinstance(test, _Compare) or not isinstance(after, list) or not isinstance(before, list):
        return None
    left, right, direction = test.left, test.right, test.direction
    if not _counts(left, after):
        left, right, direction = right, left, _FLIPPED.get(direction, "")
    if not _counts(left, after):
        return None
    step = after[left.index].plus
    start, limit = before[left.index], right
    if isinstance(right, _State) and right.index is not None:
        limit = before[right.index] if after[right.index] == _State(right.index) else None
        limit = limit + right.plus if isinstance(limit, int) else None
    if not isinstance(start, int) or not isinstance(limit, int):
        return None
    return _runs(start + left.plus, limit, step, direction)


def _counts(value: Any, after: list[Any]) -> bool:
    """Whether this is a number of the state that every run moves by a constant."""
    if not isinstance(value, _State) or value.index is None or value.index >= len(after):
        return False
    moved = after[value.index]
    return isinstance(moved, _State) and moved.index == value.index and moved.plus != 0


def _runs(start: int, limit: int, step: int, direction: str) -> int | None:
    if direction in ("GT", "GE"):
        start, limit, step, direction = -start, -limit, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        return (
            (limit - start) // step if (limit - start) % step == 0 and (limit - start) * step >= 0 else None
        )
    if direction not in ("LT", "LE") or step <= 0:
        return None
    return max(0, math.ceil((limit - start + (direction == "LE")) / step))


def known_state(
    computations: Computations, where: str, loop: Instruction, arguments: Sequence[Any]
) -> list[Any]:
    """What the body of a loop knows of its parameter: the numbers of the state that no run changes."""
    before = _Scope(computations, where, arguments).value(loop.operands[0]) if loop.operands else None
    body = loop.attribute("body")
    after = _Scope(computations, body, [_State()]).root() if body in computations else None
    if not isinstance(before, list) or not isinstance(after, list):
        return []
    kept = [
        b if a == _State(i) and isinstance(b, int) else None
        for i, (b, a) in enumerate(zip(before, after, strict=False))
    ]
    return [kept]
