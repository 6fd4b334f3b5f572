"""SkyPilot: a task, handed to the user's own `sky`. JSON is YAML, so every value stays what it is."""

from __future__ import annotations

import json
import pathlib
import shlex
import tempfile
from typing import Any

from shardtrain.errors import LaunchError
from shardtrain.launch.client import ask
from shardtrain.launch.job import Job


def task(job: Job) -> dict[str, Any]:
    """The task. `accelerator`: its name there, such as H100. `where`: workdir, infra, spot.

    `mounts`: /path:source, as `file_mounts`. `secrets`: variable -> env:VARIABLE, which `sky` reads itself.
    """
    resources: dict[str, Any] = {}
    if job.accelerator:
        resources["accelerators"] = f"{job.accelerator}:{job.processes_per_host * job.devices_per_process}"
    if job.image:
        resources["image_id"] = job.image
    if "infra" in job.where:
        resources["infra"] = job.where["infra"]
    if job.where.get("spot") == "true":
        resources["use_spot"] = True
    found: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.hosts,
        "resources": resources,
        "envs": {**job.environment, "SHARDTRAIN_LAUNCH": json.dumps({"kind": "sky", "job": job.name})},
        "run": _run(job),
    }
    if "workdir" in job.where:
        found["workdir"] = job.where["workdir"]
    if job.setup:
        found["setup"] = "\n".join(job.setup)
    if job.mounts:
        found["file_mounts"] = dict(_mount(m) for m in job.mounts)
    if job.secrets:
        for variable, reference in job.secrets.items():
            if reference != f"env:{variable}":
                raise LaunchError(
                    f"'{reference}' is not known here",
                    where=f"secrets.{variable}",
                    fix=f'"env:{variable}": sky takes it by its own name',
                )
        found["secrets"] = dict.fromkeys(job.secrets)
    return found


def _mount(text: str) -> tuple[str, str]:
    path, _, source = text.partition(":")
    if not path.startswith("/") or not source:
        raise LaunchError(f"{text!r}", where="--mount", fix="/path:source")
    return path, source


def _run(job: Job) -> str:
    here = [
        "python", "-m", "shardtrain", "launch", "local",
        f"--processes={job.processes_per_host}",
        f"--devices-per-process={job.devices_per_process}",
        f"--max-restarts={job.max_restarts}",
    ]  # fmt: skip
    head = f'"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{job.port}"'
    place = f'--hosts "$SKYPILOT_NUM_NODES" --host-index "$SKYPILOT_NODE_RANK" --coordinator {head}'
    return f"{shlex.join(here)} {place} -- {shlex.join(words(job))}\n"


def words(job: Job) -> list[str]:
    """The command as `shardtrain launch local` takes it after `--`."""
    command = list(job.command)
    return command[3:] if command[1:3] == ["-m", "shardtrain"] else command


def command(job: Job, file: str = "TASK.yaml") -> list[str]:
    """What is run."""
    secrets = [word for variable in job.secrets for word in ("--secret", variable)]
    return ["sky", "launch", "--yes", "--detach-run", f"--cluster={job.name}", *secrets, *job.flags, file]


def submit(job: Job) -> dict[str, Any]:
    """Hand it over."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "task.yaml")
        file.write_text(json.dumps(task(job), indent=1), encoding="utf-8")
        ask(command(job, str(file)))
    return {"kind": "sky", "job": job.name}


def status(job: str) -> list[str]:
    """The command that says how a cluster is."""
    return ["sky", "queue", job]


def logs(job: str) -> list[str]:
    """The command that prints the lines of the last job."""
    return ["sky", "logs", "--no-follow", job]


def stop(job: str) -> list[str]:
    """The command that ends the jobs and the machines."""
    return ["sky", "down", "--yes", job]
