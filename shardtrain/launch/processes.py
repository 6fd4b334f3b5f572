"""One attempt: processes side by side, their lines with a prefix, and who was the first to fail."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from shardtrain.errors import LaunchError
from shardtrain.launch import spares
from shardtrain.launch.stuck import Eye

DONE, WRONG_INPUT, FAILED, INTERRUPTED, CANCELLED = 0, 2, 3, 75, 130
"""Exit codes of `shardtrain` (see `cli/shell.py`)."""

_POLL = 0.02
_WITNESSES = 0.3  # seconds in which others of the same fault may be noticed
_LAST_WORDS = 2.0  # seconds that survivors have to say what they saw
_OF_A_KILL = 0.5  # where one was killed from outside: they can only say that it is gone
_STARTED = 60.0  # seconds after which an attempt that shows no beats here counts as started
_TAIL = 12
_TRACE = re.compile(r"\s*@ +0x|\*\*\* Check failure|=== Source Location|external/")
"""Lines of JAX's that tell people nothing: the logs have them."""
_UNHEALTHY = re.compile(r"stopped sending heartbeats\)[^\d]*((?:\d+\s+)+)")
_AGENT = re.compile(r"RPC: /\S*CoordinationService/(\w+)")


@dataclasses.dataclass(frozen=True)
class Start:
    """What one process runs, and the variables that are set for it beyond this one's environment.

    Where several hosts each start their own, `JAX_PROCESS_ID` and `JAX_NUM_PROCESSES` say which of all it is.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How an attempt ended. `process`: whose end it was, None when all agree. `result`: JSON that process 0 printed.

    `code`: an exit code, negative for a signal. `last`: the last lines of that process on stderr. `stuck`: what was seen
    when nobody had ended and one should have gone on. `lost`: whom JAX missed when it ended this process.
    """

    code: int
    process: int | None = None
    of: int = 0
    last: tuple[str, ...] = ()
    result: str = ""
    stuck: str = ""
    lost: str = ""

    def __str__(self) -> str:
        if self.stuck:
            return self.stuck
        if self.process is None:
            return f"all {self.of} processes ended with {self.code}"
        how = f"process {self.process} of {self.of} {_how(self.code)}"
        return f"{how} by JAX: {self.lost}" if self.lost else how


def missed(lines: Iterable[str]) -> str:
    """Of whom JAX's coordination service heard no more, by what it wrote when it ended a process; else empty."""
    text = "\n".join(lines)
    if found := _UNHEALTHY.search(f"{text}\n"):
        gone = sorted({int(n) for n in found[1].split()})
        names = f"process{'es' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
        return f"no heartbeat of {names}: stopped, or the network is cut"
    if (agent := _AGENT.search(text)) and "Terminating process" in text:
        how = (
            "stopped, or the network is cut" if agent[1] == "Heartbeat" else "it ended, or the network is cut"
        )
        return f"no answer from the coordinator, process 0: {how}"
    return ""


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    meaning = {
        WRONG_INPUT: " (its input is wrong)",
        FAILED: " (it failed)",
        INTERRUPTED: " (interrupted, resumable)",
    }
    return f"ended with {code}{meaning.get(code, '')}"


class Signals:
    """SIGTERM and SIGINT of the launcher. `asked`: the first of them; `count`: how many."""

    def __init__(self) -> None:
        self.asked = self.count = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, _: object) -> None:
        self.asked = self.asked or number
        self.count += 1

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)

    def sleep(self, seconds: float) -> None:
        """Until then, or until asked."""
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(min(_POLL, seconds))


class _Process:
    def __init__(
        self,
        index: int,
        start: Start,
        width: int,
        logs: pathlib.Path | None,
        quiet: bool,
        waiting: spares.Spares | None,
    ):
        self.index = index
        self.rank = int(start.environment.get("JAX_PROCESS_ID", index))  # among those of all hosts
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.out = ""
        self._prefix = f"[{self.rank:{width}}] "
        self._log = None if logs is None else _log_file(logs, self.rank)
        self._lock = threading.Lock()
        asked = (start.command, start.environment)
        self.popen = (waiting and waiting.take(index, *asked)) or spares.start(*asked)
        streams = ((self.popen.stdout, sys.stderr if quiet else sys.stdout), (self.popen.stderr, sys.stderr))
        self._pumps = [threading.Thread(target=self._pump, args=s, daemon=True) for s in streams]
        for pump in self._pumps:
            pump.start()

    def _pump(self, stream: IO[bytes], to: Any) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n").rpartition("\r")[2]
            if stream is self.popen.stdout:
                self.out = line
            elif line.strip() and not _TRACE.match(line):
                self.tail.append(line)
            # a full disk or a closed pipe must not stop the reading: the process would block on its own output
            with self._lock, contextlib.suppress(OSError, ValueError):
                if self._log is not None:
                    self._log.write(raw)
            if line.startswith("[Gloo] Rank"):  # a line for each pair of ranks and group; the log has them
                continue
            with contextlib.suppress(OSError, ValueError):
                to.write(f"{self._prefix}{line}\n")
                to.flush()

    def signal(self, number: int) -> None:
        """To the process and to what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.popen.wait()
        for pump in self._pumps:
            pump.join(1.0)
        if self._log is not None:
            self._log.close()


def _log_file(folder: pathlib.Path, index: int) -> IO[bytes]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"process-{index}.log").open("ab", buffering=0)
    except OSError as error:
        raise LaunchError(
            f"cannot be written: {error.strerror}",
            where=f"--output-logs {folder}",
            fix="a folder that can be written",
        ) from error


class Attempt:
    """The processes of one attempt; leaving the block ends all that still run.

    Args:
        starts: one for each process.
        logs: a folder for `process-N.log`. quiet: stdout goes to stderr, for `--json`.
        waiting: processes to begin with, where it has some, and to be filled for the next attempt.

    Raises:
        LaunchError: a log cannot be written.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        logs: pathlib.Path | None = None,
        quiet: bool = False,
        waiting: spares.Spares | None = None,
    ):
        self._processes: list[_Process] = []
        self._starts, self._waiting = starts, waiting
        self._of = max(int(s.environment.get("JAX_NUM_PROCESSES", len(starts))) for s in starts)
        width = len(str(self._of - 1))
        try:
            for index, start in enumerate(starts):
                self._processes.append(_Process(index, start, width, logs, quiet, waiting))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end()

    def wait(self, signals: Signals, grace: float, eye: Eye | None = None) -> Ended:
        """Until all have ended, or one has failed or is stuck; then the others are ended too.

        A signal is passed on once; `grace` seconds later, or at the second one, what still runs is killed.
        """
        passed, until, began = 0, float("inf"), time.monotonic()
        while True:
            codes = [p.popen.poll() for p in self._processes]
            if signals.asked and not passed:
                passed = signals.asked
                until = time.monotonic() + grace
                self._signal(passed)
            failed = [i for i, c in enumerate(codes) if c not in (None, DONE, INTERRUPTED)]
            if failed:
                return self._failure(signals.asked)
            if None not in codes:
                return self._ended(max(c for c in codes if c is not None))
            if INTERRUPTED in codes and until == float("inf"):
                until = time.monotonic() + grace  # all leave at the same step
            if time.monotonic() > until or signals.count > 1:
                late = codes.index(None)
                self._signal(signal.SIGKILL)
                return self._ended(-signal.SIGKILL, late)
            running = {
                p.index: p.popen.pid for p, code in zip(self._processes, codes, strict=True) if code is None
            }
            if eye is not None and (found := eye.look(running)):
                for file in eye.report(found, running):
                    print(f"launch: where it was: {file}", file=sys.stderr)
                ended = self._ended(FAILED, found.processes[0] if found.processes else None)
                return dataclasses.replace(ended, stuck=found.text)
            # not while they start: the processors are theirs
            started = eye.at_work if eye is not None else time.monotonic() > began + _STARTED
            if started and self._waiting is not None and not signals.asked:
                self._waiting.fill([(s.command, s.environment) for s in self._starts])
                self._waiting = None
            time.sleep(_POLL)

    def _failure(self, asked: int) -> Ended:
        order = [p.index for p in self._processes if p.popen.poll() not in (None, DONE, INTERRUPTED)]
        until = time.monotonic() + _WITNESSES
        # of one that was killed there is no doubt
        while time.monotonic() < until and all(_blame(self._processes[i].popen.returncode) for i in order):
            order += [
                p.index for p in self._processes if p.index not in order and p.popen.poll() not in (None, 0)
            ]
            time.sleep(_POLL)
        culprit = min(order, key=lambda i: (_blame(self._processes[i].popen.returncode), order.index(i)))
        if not asked:
            self._signal(signal.SIGTERM)
        killed = _blame(self._processes[culprit].popen.returncode) == 0
        until = time.monotonic() + (_OF_A_KILL if killed else _LAST_WORDS)
        while time.monotonic() < until and any(p.popen.poll() is None for p in self._processes):
            time.sleep(_POLL)
        return self._ended(self._processes[culprit].popen.returncode, culprit)

    def _ended(self, code: int, process: int | None = None) -> Ended:
        for p in self._processes:
            p.end()
        out = self._processes[0].out
        if process is None:
            return Ended(code, of=len(self._processes), result=out)
        named = self._processes[process]
        last = tuple(named.tail)
        lost = missed(last) if code == -signal.SIGABRT else ""
        return Ended(code, named.rank, self._of, last, out, lost=lost)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.popen.poll() is None:
                process.signal(number)


def _blame(code: int) -> int:
    """Among processes that died at once: the lower, the more likely it was the first. 0: killed from outside.

    A killed process says nothing; the others fail because it is gone, and JAX's agent aborts them.
    """
    if code < 0:
        return 3 if -code == signal.SIGABRT else 0
    return 1 if code == WRONG_INPUT else 2
