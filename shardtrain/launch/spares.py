"""Processes that wait with everything imported: a restart need not wait for Python and JAX to be loaded."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

IMPORTS = ("shardtrain.config.run", "shardtrain.checkpoint.arrays")
"""What a run needs, by name: a launcher itself imports no JAX."""
_SERVED = ("train", "resume")  # a script of one's own may be anything


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that ends with this one, with `environment` beyond this one's."""
    return _child(command, environment, subprocess.DEVNULL)


def _child(
    command: Sequence[str], environment: Mapping[str, str], stdin: int, *more: str
) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "shardtrain.launch.child", *more, str(os.getpid()), *command]
    return subprocess.Popen(  # noqa: S603 a list: no shell reads it
        words,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # a terminal's Ctrl-C comes to the launcher alone, which passes it on
    )


class Spares:
    """One for each process of the next attempt, by its index; leaving the block ends those that wait.

    Each has the memory of its imports (100 MB beyond what they share), and neither devices nor a connection. What is
    imported is as old as the spare: a library that is exchanged under a run counts from the restart after next.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Spares:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for spare in self._waiting.values():
            _end(spare)
        self._waiting.clear()

    def fill(self, starts: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        """Have one wait for each command with its environment (as of now; JAX reads some of it when it is imported)."""
        for index in range(len(starts), max(self._waiting, default=0) + 1):  # fewer processes than there were
            if index in self._waiting:
                _end(self._waiting.pop(index))
        for index, (command, environment) in enumerate(starts):
            ours = tuple(command[1:3]) == ("-m", "shardtrain") and command[3] in _SERVED
            if ours and index not in self._waiting:
                with contextlib.suppress(OSError):  # no memory for it: the next start is one like the first
                    self._waiting[index] = _child(IMPORTS, environment, subprocess.PIPE, "--wait")

    def take(
        self, index: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | None:
        """The one that waits, on its way now as `start` would have made it; None where none does (any more)."""
        spare = self._waiting.pop(index, None)
        if spare is None:
            return None
        assert spare.stdin is not None
        try:
            # words after `-m`: the module and its arguments
            spare.stdin.write(
                json.dumps({"environment": dict(environment), "words": command[2:]}).encode() + b"\n"
            )
            spare.stdin.close()
            spare.stdin = None
            if spare.poll() is None:
                return spare
        except OSError:
            pass
        _end(spare)
        return None


def _end(spare: subprocess.Popen[bytes]) -> None:
    spare.kill()
    spare.wait()
    for stream in (spare.stdin, spare.stdout, spare.stderr):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
