"""Become a command that dies with its launcher: `python -m shardtrain.launch.child PID COMMAND ...`.

The kernel's own signal on the death of the parent stays through `exec`, so nothing has to watch, and SIGKILL of the
launcher counts too. Where there is no such signal (not Linux) the command runs all the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1


def main(parent: int, command: list[str]) -> None:
    """Never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before this process could say so
            os._exit(1)
    try:
        os.execvp(command[0], command)  # noqa: S606 a list: no shell reads it
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
