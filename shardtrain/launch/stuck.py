"""The launcher's eye on its processes: who is stuck, and where each of them was."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Mapping

from shardtrain.watch import FolderBoard, Observer, Seen, Verdict, verdict, where_it_was

_EVERY = 1.0
_WRITING = 0.5  # seconds for stacks to be written


class Eye:
    """Looks once a second.

    Args:
        folder: where the processes leave their beats. alive: seconds without a beat; 0 for any.
    """

    def __init__(self, folder: pathlib.Path, alive: float):
        self._board, self._alive = FolderBoard(folder), alive
        self._observer = Observer(self._board, time.monotonic)
        self._next = 0.0
        self._stopped: dict[int, float] = {}
        self.at_work = False
        """Each of them has taken a step."""

    def look(self, running: Mapping[int, int]) -> Verdict | None:
        """`running`: the index and id of each process that runs. None: nobody is stuck, as far as is known."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _EVERY
        halted = [index for index, pid in running.items() if _state(pid) == "T"]
        self._stopped = {i: self._stopped.get(i, now) for i in halted}
        found = self._seen(running)
        self.at_work = len(found) == len(running) and all(s.beat.dispatched for s in found)
        late = [i for i, since in self._stopped.items() if 0 < self._alive < now - since]
        if late and not found:  # before its first beat
            return Verdict(tuple(late), f"process {late[0]} was stopped by a signal before it began")
        return verdict(found, now, self._alive)

    def report(self, found: Verdict, running: Mapping[int, int]) -> list[pathlib.Path]:
        """Have each process write its stacks, and keep where it was in RUN/stuck."""
        seen = {s.beat.process: s for s in self._seen(running)}
        by_rank = {process: pid for process, pid in running.items() if process in seen}
        states = {process: _state(pid) for process, pid in by_rank.items()}
        for pid in by_rank.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)  # stacks, by `Watch`
                os.kill(pid, signal.SIGCONT)  # a stopped one writes too; it is ended in a moment
        time.sleep(_WRITING)
        written = []
        for process in by_rank:
            beat = seen[process].beat
            if not beat.run:
                continue
            with contextlib.suppress(OSError):
                folder = pathlib.Path(beat.run) / "stuck"
                folder.mkdir(exist_ok=True)
                file = self._board.stacks(process)
                stacks = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
                note = ", stopped by a signal" if states[process] == "T" else ""
                with (folder / f"process-{process}.txt").open("a", encoding="utf-8") as out:
                    out.write(where_it_was(beat, found.text, note, stacks))
                written.append(folder / f"process-{process}.txt")
        return written

    def _seen(self, running: Mapping[int, int]) -> list[Seen]:
        return [s for s in self._observer.look() if s.beat.process in running]


def _state(pid: int) -> str:
    """The kernel's letter, T for stopped; empty where it is not known."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
