"""One process's own watch: the loop says where it is, a thread says so to others."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import logging
import os
import pathlib
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardtrain.watch import stragglers
from shardtrain.watch.beats import ALIVE, FIRST, SILENCE, Beat, budget_of, parse_silence, verdict
from shardtrain.watch.board import FOLDER, Board, FolderBoard, Observer, where_it_was
from shardtrain.watch.ledger import Ledger, read_goodput

log = logging.getLogger("shardtrain")
EVERY = 0.5  # seconds between beats
WAITED = "SHARDTRAIN_WAITED"
"""Variable with the seconds that a process waited before it was given its run (`launch/spares.py`)."""
LAST_WORDS = 2.0  # seconds before leaving: JAX ends the others when one is gone, and they have to write too
_WINDOW = 64
_KEEP = 4  # beats between two writings of ledger and table, and, over hosts, between two looks at the service
_ANSWER = (
    2 / 3
)  # of the seconds without a beat: the service may go so long without an answer, less than JAX gives it


class Watch(contextlib.AbstractContextManager["Watch"]):
    """Entered for the time of a run; the loop calls `phase`.

    Args:
        process, run: this one's index, and the run's folder.
        service: a board over hosts, used where no launcher on this machine reads beats. All processes then judge
            each other by it, and leave with 3 when one is stuck, or when it answers no more.
        again: a launcher started this run again. environment: of the process; for tests. leave: ends the process.
    """

    def __init__(
        self,
        process: int = 0,
        run: pathlib.Path | None = None,
        *,
        service: Board | None = None,
        again: bool = False,
        environment: Mapping[str, str] = os.environ,
        leave: Callable[[int], Any] = os._exit,
    ):
        self.process, self.run = process, run
        self.program = ""
        self.ledger = Ledger(
            read_goodput(run) if run is not None else None, again=again, age=_age(environment)
        )
        self._silence = parse_silence(environment.get(SILENCE, ""), SILENCE)
        folder = environment.get(FOLDER, "")
        self._local = FolderBoard(pathlib.Path(folder)) if folder else None
        self._board: Board | None = self._local or service
        self._judge = self._local is None and service is not None
        self._leave = leave
        self._now = ("start", 0, time.monotonic())
        self._dispatched = self._serial = 0
        self._times: dict[str, collections.deque[float]] = {}
        self._step: dict[str, float] = {}
        self._steps: collections.deque[dict[str, float]] = collections.deque(maxlen=_WINDOW)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._unanswered = 0  # beats since the service answered
        self._told = threading.Lock()  # one alarm
        self._stacks: Any = None

    def phase(self, name: str, step: int, hidden: bool = False) -> None:
        """The main thread enters a phase, or shows progress in it. `hidden`: see `Ledger.enter`."""
        before, last, since = self._now
        now = time.monotonic()
        self._now = (name, step, now)
        seconds = now - since
        self._times.setdefault(before, collections.deque(maxlen=_WINDOW)).append(seconds)
        if before in stragglers.COLUMNS:
            self._step[before] = self._step.get(before, 0.0) + seconds
        if name == "dispatch":
            self._dispatched = step - 1
        elif before == "dispatch":
            self._dispatched = last
            if self._step:
                self._steps.append(self._step)
                self._step = {}
        self.ledger.enter(name, step, hidden)

    def beat(self) -> Beat:
        """What there is to say now."""
        name, step, since = self._now
        self._serial += 1
        with contextlib.suppress(
            RuntimeError
        ):  # the main thread adds to it meanwhile: the next beat has them
            rows = list(self._steps)[1:]  # the first connects devices
            means = {c: statistics.fmean(r.get(c, 0.0) for r in rows) for c in stragglers.COLUMNS if rows}
            times = list(self._times.get(name, ()))
            return Beat(
                process=self.process,
                serial=self._serial,
                phase=name,
                step=step,
                seconds=max(0.0, time.monotonic() - since),
                budget=budget_of(name, times, self._silence),
                dispatched=self._dispatched,
                program=self.program,
                run=str(self.run.absolute()) if self.run is not None else "",
                means=means,
            )
        return Beat(self.process, self._serial, name, step, 0.0, FIRST)

    def __enter__(self) -> Watch:
        if self._local is not None:
            with contextlib.suppress(OSError):  # the launcher is gone
                self._stacks = self._local.stacks(self.process).open("w")
                # in C: also when the interpreter is held. The launcher sends it once a beat is there
                faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._thread = threading.Thread(target=self._beats, name="watch", daemon=True)
        self._thread.start()
        if self._judge:
            threading.Thread(target=self._listens, name="watch-service", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("end", self._now[1])
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        self._tell(keep=True)

    def _beats(self) -> None:
        observer = Observer(self._board, time.monotonic) if self._judge and self._board else None
        count = 0
        while True:
            self._tell(keep=self._judge or count % _KEEP == 0)
            count += 1
            if observer is not None and (found := self._judged(observer)):
                self._alarm(found)
                return
            if self._stop.wait(EVERY * (_KEEP if self._judge else 1)):
                return

    def _tell(self, keep: bool) -> None:
        try:
            beat = self.beat()
            if self._board is not None:
                self._board.put(self.process, beat.text())
            if keep and self.process == 0 and self.run is not None and self.run.is_dir():
                self.ledger.write(self.run)
                if self._board is not None:
                    stragglers.write_table(self.run, filter(None, map(Beat.of, self._board.all())))
        except (
            OSError,
            RuntimeError,
        ) as error:  # a full disk, a coordinator that is gone: no reason to end here
            log.debug("watch: %s", error)

    def _judged(self, observer: Observer) -> str:
        try:
            seen = observer.look()
        except RuntimeError:  # the coordinator does not answer: `_listens` counts how long
            return ""
        self._unanswered = 0
        found = verdict(seen, time.monotonic(), self._silence.get("alive", ALIVE))
        return found.text if found else ""

    def _listens(self) -> None:
        """Beside the thread that asks the service, whose call into a cut network does not come back for a while.
        Counts its own waits, not the clock: one that was stopped itself has nobody to blame."""
        bound = _ANSWER * self._silence.get("alive", ALIVE)
        while not self._stop.wait(EVERY):
            self._unanswered += 1
            if 0 < bound < (seconds := self._unanswered * EVERY):
                self._alarm(
                    f"process {self.process} is cut off: no answer from the coordinator, process 0, for {seconds:.0f} s; "
                    "it is stopped, or the network between is down"
                )
                return

    def _alarm(self, text: str) -> None:
        """Over hosts: leave word, and leave. What started this process starts it again."""
        if not self._told.acquire(blocking=False):
            return
        log.error("stuck: %s", text)
        print(f"stuck: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if self.run is not None:
                folder = self.run / "stuck"
                folder.mkdir(exist_ok=True)
                with (folder / f"process-{self.process}.txt").open("a", encoding="utf-8") as file:
                    file.write(where_it_was(self.beat(), text, "", "stacks:"))
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(LAST_WORDS)
        self._leave(3)


def _age(environment: Mapping[str, str]) -> float:
    """Seconds since this process was started, or given its run; 0 where that is not known."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        alive = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, alive - float(environment.get(WAITED, "0")))
    except (OSError, ValueError, IndexError):
        return 0.0
