"""Where beats are left and read: a folder, for the processes of one machine. Over hosts `mesh.ServiceBoard` stands in."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Protocol

from shardtrain.watch.beats import Beat, Seen

FOLDER = "SHARDTRAIN_BEATS"
"""Variable with the folder in which a launcher on this machine reads beats."""


class Board(Protocol):
    """One text for each process."""

    def put(self, process: int, text: str) -> None: ...

    def all(self) -> list[str]: ...


class FolderBoard:
    """`process-N.beat` and, opened before the first beat, `process-N.stacks`, where a signal has stacks written."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def put(self, process: int, text: str) -> None:
        work = self.folder / f".{process}.tmp"
        with contextlib.suppress(OSError):  # a full disk, or a launcher that is gone
            work.write_text(text, encoding="utf-8")
            os.replace(work, self.folder / f"process-{process}.beat")

    def all(self) -> list[str]:
        found = []
        for file in sorted(self.folder.glob("process-*.beat")):
            with contextlib.suppress(OSError):
                found.append(file.read_text(encoding="utf-8"))
        return found

    def stacks(self, process: int) -> pathlib.Path:
        return self.folder / f"process-{process}.stacks"


class Observer:
    """Reads a board, and notes by its own clock when each beat was new."""

    def __init__(self, board: Board, clock: Callable[[], float]):
        self._board, self._clock = board, clock
        self._seen: dict[int, Seen] = {}

    def look(self) -> list[Seen]:
        now = self._clock()
        for beat in filter(None, map(Beat.of, self._board.all())):
            old = self._seen.get(beat.process)
            if old is None or old.beat.serial != beat.serial:
                self._seen[beat.process] = Seen(beat, now)
        return [self._seen[p] for p in sorted(self._seen)]


def where_it_was(beat: Beat, verdict: str, note: str, stacks: str) -> str:
    """What is kept of a process when somebody is stuck."""
    facts = [
        verdict,
        f"process {beat.process}: {beat.place}, for {beat.seconds:.1f} s at its last beat{note}",
        f"last dispatched step {beat.dispatched}; program {beat.program or 'not compiled yet'}",
    ]
    return "\n".join([*facts, "", stacks.strip() or "(no stacks: it could not write them)", "", ""])
