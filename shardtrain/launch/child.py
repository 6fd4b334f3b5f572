"""Become a command that dies with its launcher: `python -m shardtrain.launch.child PID COMMAND ...`.

The kernel's own signal on the death of the parent stays through `exec`, so nothing has to watch, and SIGKILL of the
launcher counts too. Where there is no such signal (not Linux) the command runs all the same.

`python -m shardtrain.launch.child --wait PID MODULE ...` imports the modules, waits for a line of JSON on stdin,
`{"environment": {...}, "words": [MODULE, ARGUMENT, ...]}`, and becomes `python -m MODULE ARGUMENT ...`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import signal
import sys
import time

_SET_PARENT_DEATH_SIGNAL, _SET_NAME = 1, 15
WAITING, RUNNING = "shardtrain-wait", "shardtrain"
"""What `ps` and `top` call a process that waits, and one that has begun."""


def _ask_kernel(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with(parent: int) -> None:
    _ask_kernel(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent and sys.platform == "linux":  # it died before this process could say so
        os._exit(1)


def become(command: list[str]) -> None:
    """Never returns."""
    try:
        os.execvp(command[0], command)  # noqa: S606 a list: no shell reads it
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def wait(modules: list[str]) -> None:
    """Until it is known what to run; then run it."""
    from shardtrain.watch.watch import WAITED

    began = time.monotonic()
    _ask_kernel(_SET_NAME, WAITING.encode())
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:
            break  # the run meets it too, and says so
    line = sys.stdin.buffer.readline()
    if not line:
        return
    _ask_kernel(_SET_NAME, RUNNING.encode())
    asked = json.loads(line)
    os.environ.update(asked["environment"], **{WAITED: str(time.monotonic() - began)})
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    module, *sys.argv[1:] = asked["words"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    waits = sys.argv[1] == "--wait"
    words = sys.argv[2:] if waits else sys.argv[1:]
    die_with(int(words[0]))
    (wait if waits else become)(words[1:])
