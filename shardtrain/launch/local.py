"""Processes on this machine, joined over the loopback interface, and started again when they fail."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from shardtrain.errors import LaunchError, RunError
from shardtrain.launch import certificates
from shardtrain.launch.processes import (
    CANCELLED,
    DONE,
    INTERRUPTED,
    WRONG_INPUT,
    Attempt,
    Ended,
    Signals,
    Start,
)
from shardtrain.launch.spares import Spares
from shardtrain.launch.stuck import Eye
from shardtrain.watch import parse_silence
from shardtrain.watch.beats import ALIVE, SILENCE
from shardtrain.watch.board import FOLDER

FINAL = (DONE, WRONG_INPUT, CANCELLED, 126, 127)
"""Never started again: done, wrong input, a Ctrl-C with nothing to save, no such command."""

_LONG = 60.0  # seconds after which a failure is no longer one of starting
_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Local:
    """What `shardtrain launch local` was asked for.

    `devices_per_process`: simulated CPU devices or GPUs of each; None divides the config's simulated devices, or this
    machine's GPUs, evenly. `host`: where the coordinator listens, and nowhere else. `max_restarts`: at one number of
    processes; with `elastic` the next smaller one follows. `mtls`: a folder with certificates (`certificates.py`), or "off";
    one of them is asked for on several hosts. `grace`: seconds to save after a signal was passed on.
    `silence`: seconds that a phase may take before it counts as stuck, such as `data=60,alive=30`.
    """

    command: tuple[str, ...]
    processes: int
    devices_per_process: int | None = None
    host: str = "127.0.0.1"
    max_restarts: int = 3
    elastic: bool = False
    logs: pathlib.Path | None = None
    inject: str = ""
    silence: str = ""
    grace: float = 60.0
    hosts: int = 1
    host_index: int = 0
    coordinator: str = ""
    mtls: str = ""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--processes", self.processes, 1),
            ("--devices-per-process", self.devices_per_process, 1),
            ("--max-restarts", self.max_restarts, 0),
            ("--grace", self.grace, 0),
            ("--hosts", self.hosts, 1),
            ("--host-index", self.host_index, 0),
        ):
            if value is not None and value < least:
                raise LaunchError(f"{value:g}", where=flag, fix=f"{least} or more")
        if self.host_index >= self.hosts:
            raise LaunchError(
                f"{self.host_index} of {self.hosts}", where="--host-index", fix="from 0 to hosts - 1"
            )
        if self.hosts > 1 and (not self.coordinator or self.elastic):
            what = "--elastic" if self.elastic else "no coordinator"
            raise LaunchError(
                f"{what} on {self.hosts} hosts", where="--hosts", fix="--coordinator FIRST_HOST:PORT"
            )
        if self.hosts > 1 and not self.mtls:
            raise LaunchError(
                f"{self.hosts} hosts, and nothing keeps others from the coordinator",
                where="--mtls",
                fix="--mtls FOLDER, with certificates from `python -m shardtrain.launch.certificates FOLDER FIRST_HOST`"
                " copied to each host; or --mtls off on a network of your own",
            )
        if self.mtls not in ("", "off"):
            certificates.check(self.mtls)
        if not self.command:
            raise LaunchError("no command", where="launch local", fix="end with `-- train CONFIG`")


def starts(asked: Local, processes: int, attempt: int, port: int, beats: str = "") -> list[Start]:
    """Each process's command and environment. `beats`: the folder where the launcher looks for their beats."""
    each = asked.devices_per_process
    total = asked.hosts * processes
    found = []
    for index in range(processes):
        environment = {
            "JAX_COORDINATOR_ADDRESS": asked.coordinator or f"{asked.host}:{port}",
            "JAX_NUM_PROCESSES": str(total),
            "JAX_PROCESS_ID": str(asked.host_index * processes + index),
            "SHARDTRAIN_LOCAL_SIZE": str(processes),
            "SHARDTRAIN_LOCAL_RANK": str(index),
            "SHARDTRAIN_ATTEMPT": str(attempt),
            "SHARDTRAIN_LAUNCH": os.environ.get("SHARDTRAIN_LAUNCH")
            or json.dumps({"kind": "local", "pid": os.getpid()}),
        }
        if each is not None:
            environment |= {
                "JAX_NUM_CPU_DEVICES": str(each),
                "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(index * each, (index + 1) * each))),
                "SHARDTRAIN_TOTAL_DEVICES": str(total * each),
            }
        if asked.mtls not in ("", "off"):
            environment |= certificates.environment(os.path.abspath(asked.mtls))
        if asked.inject:
            environment["SHARDTRAIN_INJECT"] = asked.inject
        if asked.silence:
            environment[SILENCE] = asked.silence
        if beats:
            environment[FOLDER] = beats
        found.append(Start(asked.command, environment))
    return found


def launch(asked: Local, say: Callable[[str], None], quiet: bool = False) -> dict[str, Any]:
    """Run until done, starting again after failures.

    Returns:
        The object of `--json`, with `exit`: 0 done, 75 interrupted and resumable, 130 cancelled.

    Raises:
        RunError: it failed, and restarts are used up. LaunchError: the input of the command is wrong.
    """
    processes, restarts, attempt, short = asked.processes, 0, 0, 0
    history: list[dict[str, Any]] = []
    silence = parse_silence(asked.silence)
    with Signals() as signals, Spares() as spares:
        waiting = spares if asked.max_restarts or asked.elastic else None
        while True:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="shardtrain-beats-", ignore_cleanup_errors=True) as beats:
                # several hosts judge by the coordination service: no launcher sees all of them
                here = beats if asked.hosts == 1 else ""
                eye = Eye(pathlib.Path(beats), silence.get("alive", ALIVE)) if here else None
                wanted = starts(asked, processes, attempt, free_port(asked.host), here)
                with Attempt(wanted, asked.logs, quiet, waiting) as running:
                    ended = running.wait(signals, asked.grace, eye)
            seconds = time.monotonic() - began
            history.append({"processes": processes, "end": str(ended), "seconds": round(seconds, 3)})
            summary = {"kind": "local", "processes": processes, "restarts": attempt, "attempts": history}
            code = _code(ended, signals)
            if code is not None:
                return {**summary, "exit": code, **_result(ended)}
            if ended.code in FINAL:
                raise LaunchError(
                    str(ended),
                    where="launch local",
                    why=_last(ended),
                    fix="what it says; it is not started again",
                )
            if ended.code != INTERRUPTED:
                restarts += 1
            if restarts > asked.max_restarts or signals.asked:
                smaller = _smaller(processes) if asked.elastic and not signals.asked else None
                if smaller is None:
                    tries = f" after {asked.max_restarts} restarts" if asked.max_restarts else ""
                    raise RunError(
                        f"{ended}{tries}",
                        where="launch local",
                        why=_last(ended),
                        fix="the same command goes on from the last checkpoint; --max-restarts N tries more often",
                    )
                say(f"launch: going on with {smaller} of {processes} processes")
                processes, restarts = smaller, 0
            attempt += 1
            short = 0 if seconds > _LONG else short + 1
            delay = _DELAYS[min(max(0, short - 1), len(_DELAYS) - 1)]
            after = f" in {delay:g} s" if delay else ""
            say(f"launch: {ended}; restart {attempt}{after}")
            for line in ended.last[-3:]:
                say(f"  {line}")
            signals.sleep(delay)
            if signals.asked:
                return {**summary, "exit": CANCELLED if signals.asked == signal.SIGINT else INTERRUPTED}


def _code(ended: Ended, signals: Signals) -> int | None:
    """The exit code of the launcher where nothing more is to be tried."""
    if ended.process is None and ended.code == DONE:
        return DONE
    if not signals.asked or not (ended.code < 0 or ended.code in (INTERRUPTED, CANCELLED)):
        return None
    return CANCELLED if signals.asked == signal.SIGINT else INTERRUPTED


def _smaller(processes: int) -> int | None:
    """The next number that divides this one: the run's groups divide by it too, and so its global batch stays."""
    return next((n for n in range(processes - 1, 0, -1) if processes % n == 0), None)


def _last(ended: Ended) -> str:
    return "last lines: " + " | ".join(line.strip() for line in ended.last[-4:]) if ended.last else ""


def _result(ended: Ended) -> dict[str, Any]:
    try:
        found = json.loads(ended.result)
    except ValueError:
        return {}
    return {"result": found} if isinstance(found, dict) else {}


def free_port(host: str) -> int:
    """A port that nobody listens on at the moment.

    Raises:
        LaunchError: `host` is no address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise LaunchError(
            f"'{host}' cannot be listened on: {error.strerror or error}",
            where="--host",
            fix="an address of this machine, such as 127.0.0.1",
        ) from error
