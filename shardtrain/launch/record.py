"""Who started a run, kept in its folder: what `shardtrain status`, `logs` and `stop` read."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

FILE = "launch.json"


def started_again(environment: Mapping[str, str] = os.environ) -> bool:
    """This process belongs to a later attempt of its launcher or scheduler."""
    counts = (environment.get(n, "") for n in ("SHARDTRAIN_ATTEMPT", "SLURM_RESTART_COUNT"))
    return any(c.isdigit() and int(c) > 0 for c in counts)


def write_record(path: pathlib.Path, environment: Mapping[str, str] = os.environ) -> None:
    """Leave word in a run's folder of who started it. Another start replaces it."""
    try:
        found = json.loads(environment.get("SHARDTRAIN_LAUNCH", "{}"))
    except ValueError:
        found = {}
    found = {"kind": "alone", "pid": os.getpid(), **(found if isinstance(found, dict) else {})}
    if found["kind"] == "slurm":
        found["job"] = environment.get("SLURM_JOB_ID", "")
    found |= {"host": os.uname().nodename, "pid_started": _began(found["pid"]), "started": time.time()}
    work = path / f".{FILE}.tmp"
    work.write_text(json.dumps(found) + "\n", encoding="utf-8")
    os.replace(work, path / FILE)


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """What `write_record` left; empty without."""
    try:
        found = json.loads((path / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def process_of(found: Mapping[str, Any]) -> int | None:
    """The process that started a run, if it is on this machine and still the same one."""
    pid, began = found.get("pid"), found.get("pid_started")
    if not isinstance(pid, int) or began is None or found.get("host") != os.uname().nodename:
        return None
    return pid if _began(pid) == began else None


def _began(pid: Any) -> str | None:
    """When a process was started, in ticks since the machine was: numbers of processes are used again."""
    try:
        fields = pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else fields[19]
