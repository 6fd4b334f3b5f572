"""Whose line it was: frames of a traceback to `file.py:123` of the user."""

from __future__ import annotations

import contextlib
import pathlib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from jaxlib.mlir import ir

import shardtrain
from shardtrain.errors import ShardTrainError

_OURS = pathlib.Path(shardtrain.__file__).parent
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


def user_line(frames: Iterable[tuple[str, int]]) -> str:
    """The innermost frame that is the user's (our models count as such), else ours, else the innermost.

    Args:
        frames: (file, line), innermost first.
    """
    frames = [f for f in frames if f[0] and not f[0].startswith("<")]
    outside = [f for f in frames if "site-packages" not in f[0] and not f[0].startswith(_LIBRARIES)]
    ours = [f for f in outside if pathlib.Path(f[0]).is_relative_to(_OURS)]
    theirs = [f for f in outside if f not in ours or pathlib.Path(f[0]).is_relative_to(_OURS / "models")]
    # The caller of fit is no line of a model: models of ours that it trains come first, being further in.
    for some in (theirs, ours, frames):
        if some:
            return f"{some[0][0]}:{some[0][1]}"
    return ""


def equation_line(equation: Any) -> str:
    """Of an equation of a traced function."""
    traceback = getattr(getattr(equation, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or ()
    return user_line((frame.file_name, frame.line_num) for frame in frames)


@contextlib.contextmanager
def naming_lines() -> Iterator[None]:
    """While a user's function is traced: its errors of ours say at which of the user's lines they arose."""
    try:
        yield
    except ShardTrainError as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = user_line((frame.filename, frame.lineno or 0) for frame in reversed(frames))
        if line and not error.where.startswith(line):
            error.where = f"{line}: {error.where}" if error.where else line
        raise


def without_callers(module: Any, file: str) -> Any:
    """A lowered module whose operations know their frames as far out as `file`; it is changed in place.

    Who called it is no part of a program: the same step, asked for from another line, is found in the cache.
    """
    cut: dict[Any, Any] = {}

    def visit(operation: Any) -> Any:
        where = operation.location
        if where.attr not in cut:  # as text it takes longer than all else, and many have the same one
            text = str(where)
            cut[where.attr] = (
                ir.Module.parse("module {} " + _up_to(file, text)).operation.location
                if file in text
                else where
            )
        operation.location = cut[where.attr]
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(visit)
    return module


def _up_to(file: str, text: str) -> str:
    """`callsite(a at callsite(b in FILE at c))` -> `callsite(a at b in FILE)`."""
    frame = re.compile(rf'callsite\(("[^"]*"\("{re.escape(file)}":[^)]*\)) at ')
    while found := frame.search(text):
        end, depth = found.end(), 1
        quoted = False
        while depth:
            char = text[end]
            quoted ^= char == '"'
            depth += 0 if quoted else (char == "(") - (char == ")")
            end += 1
        text = text[: found.start()] + found.group(1) + text[end:]
    return text
