"""From the text of a module to its computations and instructions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from shardtrain.errors import ShardTrainError
from shardtrain.plan.lines import user_line

Frame = tuple[str, int, str]
"""File, line, function."""

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) ?\(.*-> .*\{$")
_SHAPE = re.compile(r"\b(pred|token|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\]")
_OP = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = {"pred": 8, "bf16": 16, "token": 0}


class HloError(ShardTrainError):
    """The text says something that the reader does not understand; a count from it would be wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line. `result`: type text. `rest`: everything from the opcode on. `frames`: innermost first."""

    name: str
    op: str
    result: str
    operands: tuple[str, ...]
    rest: str
    op_name: str
    frames: tuple[Frame, ...]
    root: bool

    @property
    def source(self) -> str:
        """`file.py:123` of the user, or ""."""
        return user_line((file, line) for file, line, _ in self.frames)

    def attribute(self, key: str) -> str | None:
        """The name that `key=%name` gives."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    def attributes(self, key: str) -> list[str]:
        """The names that `key={%a, %b}` gives."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.rest)
        return [name.strip().lstrip("%") for name in found.group(1).split(",")] if found else []


@dataclasses.dataclass(frozen=True)
class Module:
    """`computations`: name -> instructions in order. `header`: the first line. `frames`: stack frames by number."""

    header: str
    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    frames: dict[int, tuple[Frame, ...]]


def parse(text: str) -> Module:
    """Every instruction of every computation.

    Raises:
        HloError: no entry computation.
    """
    lines = text.splitlines()
    frames = _frames(lines)
    computations: dict[str, tuple[Instruction, ...]] = {}
    name, entry = "", ""
    pending: list[str] = []
    for line in lines:
        if not name:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                name, pending = header.group(2), []
                entry = name if header.group(1) else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            computations[name] = tuple(_instruction(whole, frames) for whole in pending)
            name = ""
        elif _INSTRUCTION.match(line):
            pending.append(line)
        elif pending:
            pending[-1] += " " + line  # kernels print their metadata over several lines
    if not entry:
        raise HloError("no ENTRY computation in the text")
    return Module(lines[0] if lines else "", computations, entry, frames)


def _instruction(line: str, frames: dict[int, tuple[Frame, ...]]) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None
    result, rest = split_type(found.group(3))
    op = _OP.match(rest)
    op_name = re.search(r'op_name="([^"]*)"', rest)
    frame_id = re.search(r"stack_frame_id=(\d+)", rest)
    here: tuple[Frame, ...] = frames.get(int(frame_id.group(1)), ()) if frame_id else ()
    if not here:
        at = re.search(r'source_file="([^"]*)" source_line=(\d+)', rest)
        here = ((at.group(1), int(at.group(2)), ""),) if at else ()
    return Instruction(
        name=found.group(2),
        op=op.group(1) if op else "",
        result=result,
        operands=tuple(_NAME.findall(_arguments(rest, op.end()))) if op else (),
        rest=rest,
        op_name=op_name.group(1) if op_name else "",
        frames=here,
        root=bool(found.group(1)),
    )


def split_type(text: str) -> tuple[str, str]:
    """`(f32[2], f32[3]) all-reduce(...)` -> result type, the rest."""
    depth = 0
    for index, char in enumerate(text):
        if char in "({[":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == " " and depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _arguments(rest: str, start: int) -> str:
    depth = 1
    for index in range(start, len(rest)):
        if rest[index] == "(":
            depth += 1
        elif rest[index] == ")":
            depth -= 1
            if depth == 0:
                return rest[start:index]
    return rest[start:]


def shapes(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and dims of every array in a type, tuples flattened."""
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _SHAPE.findall(result)]


@functools.cache
def item_bytes(dtype: str) -> float:
    """Bytes of one element; half for 4-bit ones."""
    if dtype in _BITS:
        return _BITS[dtype] / 8
    return int(re.match(r"[sufc](\d+)", dtype).group(1)) / 8  # type: ignore[union-attr]


def size(result: str) -> float:
    """Bytes of a type."""
    return sum(math.prod(dims) * item_bytes(dtype) for dtype, dims in shapes(result))


def _frames(lines: list[str]) -> dict[int, tuple[Frame, ...]]:
    """Stack frames by id, from the tables before the first computation."""
    tables: dict[str, dict[int, str]] = {}
    current = ""
    for line in lines[1:]:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
            tables[current] = {}
        elif _HEADER.match(line):
            break
        elif current and (entry := re.match(r"(\d+) (.*)$", line)):
            tables[current][int(entry.group(1))] = entry.group(2)
    files = {i: text.strip('"') for i, text in tables.get("FileNames", {}).items()}
    functions = {i: text.strip('"') for i, text in tables.get("FunctionNames", {}).items()}
    places = {i: _numbers(text) for i, text in tables.get("FileLocations", {}).items()}
    stack = {i: _numbers(text) for i, text in tables.get("StackFrames", {}).items()}
    # Printed with an offset of one, so that a root is its own parent or the first; older ones print 0 for a root.
    offset = 0 if any(frame.get("parent_frame_id") == 0 for frame in stack.values()) else 1

    def chain(frame: int) -> Iterator[Frame]:
        seen = set()
        while frame in stack and frame not in seen:
            seen.add(frame)
            place = places.get(stack[frame].get("file_location_id", 0), {})
            yield (
                files.get(place.get("file_name_id", 0), ""),
                place.get("line", 0),
                functions.get(place.get("function_name_id", 0), ""),
            )
            frame = stack[frame].get("parent_frame_id", 0) - offset

    return {frame: tuple(chain(frame)) for frame in stack}


def _numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)", text)}
