"""Errors that a user can cause. Each says where, what with the numbers, why, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShardTrainError(Exception):
    """`message` is one sentence with the numbers; `why` the circumstances; `fix` the way out."""

    def __init__(self, message: str, *, where: str = "", why: str = "", fix: str = ""):
        super().__init__(message)
        self.message, self.where, self.why, self.fix = message, where, why, fix

    def __str__(self) -> str:
        first = f"{self.where}: {self.message}" if self.where else self.message
        lines = [first]
        if self.why:
            lines.append(f"  {self.why}")
        if self.fix:
            lines.append(f"  try: {self.fix}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, str]:
        """The `error` object of `--json`."""
        return {
            "kind": type(self).__name__,
            "where": self.where,
            "message": "; ".join(part for part in (self.message, self.why) if part),
            "try": self.fix,
        }


class MeshError(ShardTrainError):
    """The mesh does not fit the devices, or does not exist."""


class ShardingError(ShardTrainError):
    """Rules, logical axes and shapes do not go together."""


class ConfigError(ShardTrainError):
    """A configuration field, flag or argument is wrong."""


class DataError(ShardTrainError):
    """Data is missing, empty, of the wrong kind, or has changed."""


class CheckpointError(ShardTrainError):
    """A checkpoint is missing, damaged, or of another model."""


class LaunchError(ShardTrainError):
    """Processes could not be started or found."""


class CompileError(ShardTrainError):
    """A target's compiler refused a program: it does not fit, or the compiler failed."""


class DependencyError(ConfigError):
    """What was asked for needs a package that is not installed."""


class RunError(ShardTrainError):
    """The run itself failed: the loss is no number, a process died. Not the input's fault."""


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """The way out of an unknown name: the closest known one, or all of them, and another way.

    The initials of a name are close to it: `optimizer.lr` to `optimizer.learning_rate`.
    """
    names = sorted(k for k in known if k != "*")
    parts = lambda name: name.rpartition(".")[2].split("_")  # noqa: E731
    close = [k for k in names if len(parts(k)) > 1 and "".join(p[:1] for p in parts(k)) == parts(name)[-1]]
    close = close or difflib.get_close_matches(name, names, n=1)
    if close:
        return f"'{close[0]}', or {otherwise}"
    return f"one of {', '.join(names)}" + (f", or {otherwise}" if otherwise not in names else "")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
