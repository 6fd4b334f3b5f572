"""The engines by name: what each would run, running it, and asking it about a job."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from shardtrain.errors import LaunchError
from shardtrain.launch import aws, jobset, sky, slurm, tpu_vm
from shardtrain.launch.job import Job

ENGINES = ("slurm", "jobset", "tpu-vm", "aws", "sky")
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "slurm": ("gpus", "output", "python"),
    "jobset": ("provider", "namespace", "context", "topology", "slices", "python"),
    "tpu-vm": ("zone", "project", "runtime", "slices", "spot", "copy", "python"),
    "aws": ("engine", "cluster", "namespace", "context", "gpus", "output", "python"),
    "sky": ("infra", "spot", "workdir", "python"),
}
"""What `Job.where` may say, by engine."""


def check_settings(kind: str, where: Mapping[str, str]) -> None:
    """Refuse a setting that this engine does not read.

    Raises:
        LaunchError: with those that it reads.
    """
    for name, value in where.items():
        if name not in SETTINGS[kind]:
            raise LaunchError(f"no setting '{name}' of {kind}", where="--set", fix=", ".join(SETTINGS[kind]))
        if name == "slices" and not (value.isdigit() and int(value)):
            raise LaunchError(f"'{value}'", where="--set slices", fix="a number, 1 or more")


def rendered(kind: str, job: Job) -> list[tuple[list[str], str]]:
    """Everything that would be run, in order: a command, and the text for its stdin or its file."""
    if kind == "slurm":
        return [(slurm.command(job), slurm.script(job))]
    if kind == "jobset":
        return [(jobset.command(job), jobset.handed_over(job, dry=True))]
    if kind == "aws":
        return [aws.rendered(job, dry=True)]
    if kind == "sky":
        return [(sky.command(job), json.dumps(sky.task(job), indent=1))]
    return [(command, "") for phase in tpu_vm.commands(job).values() for command in phase]


def submit(kind: str, job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    """Hand it to the engine; returns where it is, as `status`, `logs` and `stop` want to know it."""
    if kind == "tpu-vm":
        return tpu_vm.submit(job, say)
    return {"slurm": slurm, "jobset": jobset, "aws": aws, "sky": sky}[kind].submit(job)  # type: ignore[attr-defined]


def name_of(found: Mapping[str, Any]) -> str:
    """A job as `shardtrain status` takes it: KIND:JOB, and @PLACE where there is one."""
    place = found.get("namespace") or found.get("zone") or found.get("cluster")
    return f"{found['kind']}:{found['job']}" + (f"@{place}" if place else "")


def parse_name(text: str) -> dict[str, str]:
    """The other way round; empty if `text` is no such name."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ENGINES or not rest:
        return {}
    job, _, place = rest.partition("@")
    key = {"jobset": "namespace", "tpu-vm": "zone", "aws": "cluster"}.get(kind, "place")
    return {"kind": kind, "job": job, key: place}


def asking(verb: str, found: Mapping[str, Any]) -> list[str]:
    """The command that does `verb` (status, logs, stop) for a job that was handed over.

    Raises:
        LaunchError: this engine cannot, or has not been told where.
    """
    kind, name = found["kind"], str(found.get("job", ""))
    place = str(found.get("namespace") or found.get("zone") or found.get("cluster") or "")
    if not name or (kind in ("tpu-vm", "aws") and not place):
        raise LaunchError(
            f"which job of {kind}{' where' if name else ''}?",
            where=verb,
            fix=f"{kind}:JOB{'@PLACE' if name else ''}",
        )
    if kind == "tpu-vm":
        job = Job(("true",), name=name, accelerator="-", where={"zone": place})
        return {"status": tpu_vm.status, "logs": tpu_vm.logs, "stop": tpu_vm.stop}[verb](job)
    if kind == "jobset":
        return {"status": jobset.status, "logs": jobset.logs, "stop": jobset.stop}[verb](name, place)
    if kind == "sky":
        return {"status": sky.status, "logs": sky.logs, "stop": sky.stop}[verb](name)
    if verb == "logs":
        raise LaunchError(
            "SLURM keeps lines in files", where="logs", fix="`shardtrain logs RUN`, or the file slurm-JOB.out"
        )
    if kind == "aws":
        return {"status": aws.status, "stop": aws.stop}[verb](place, name)
    return {"status": slurm.status, "stop": slurm.stop}[verb](name)


def shown(command: list[str], text: str) -> str:
    """A command and its text for people, as a shell would take both."""
    line = shlex.join(command)
    return f"{line} <<'END'\n{text}\nEND" if text else line
