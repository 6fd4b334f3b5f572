"""Cloud TPU VMs through the user's own `gcloud`: create or reuse, copy, run on all workers, delete.

`accelerator`: v5litepod-16. `where`: zone, and project, runtime, slices, spot, copy (a folder for
the workers' home). On TPU VMs JAX finds the other workers itself.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from typing import Any

from shardtrain.errors import LaunchError, RunError
from shardtrain.launch.client import ask
from shardtrain.launch.job import Job, exported

FOLDER = "shardtrain-run"
_READY, _GONE = "ACTIVE", ("FAILED", "SUSPENDED", "DELETING", "SUSPENDING")


def commands(job: Job) -> dict[str, list[list[str]]]:
    """What is run, by phase: describe, create, copy, run.

    Raises:
        LaunchError: no zone or kind of TPU; several processes on a host; secrets, which would be seen on the way.
    """
    if "zone" not in job.where or not job.accelerator:
        raise LaunchError(
            "a TPU is asked for by its kind and zone",
            where="--accelerator, --set zone",
            fix="--accelerator v5litepod-16 --set zone=us-west4-a",
        )
    if job.processes_per_host != 1:
        raise LaunchError(
            f"{job.processes_per_host}",
            where="--processes-per-host",
            fix="1: JAX has one process on a TPU host",
        )
    if job.secrets:
        raise LaunchError(
            "would be seen in a command line on the way",
            where="secrets",
            fix="Secret Manager, read in `setup` on the workers",
        )
    slices = int(job.where.get("slices", "1"))
    nodes = [f"{job.name}-{i}" for i in range(slices)] if slices > 1 else [job.name]
    each = (
        [f"--node-count={slices}", f"--node-prefix={job.name}"] if slices > 1 else [f"--node-id={job.name}"]
    )
    create = [
        *_queued("create", job.name, job),
        *each,
        f"--accelerator-type={job.accelerator}",
        f"--runtime-version={job.where.get('runtime', 'v2-alpha-tpuv5-lite')}",
        *(["--spot"] if job.where.get("spot") == "true" else []),
        *job.flags,
    ]
    return {
        "describe": [[*_queued("describe", job.name, job), "--format=value(state.state)"]],
        "create": [create],
        "copy": [
            [*_vm("scp", job, job.where["copy"], f"{node}:{FOLDER}"), "--recurse", "--worker=all"]
            for node in nodes
            if "copy" in job.where
        ],
        "run": [[*_vm("ssh", job, node), "--worker=all", f"--command={_line(job)}"] for node in nodes],
    }


def _line(job: Job) -> str:
    """What the workers' own shell reads: every value quoted."""
    words = shlex.join(job.command)
    exports = exported(
        job,
        SHARDTRAIN_TOTAL_DEVICES=str(job.devices * int(job.where.get("slices", "1"))),
        SHARDTRAIN_LAUNCH=json.dumps({"kind": "tpu-vm", "job": job.name, "zone": job.where["zone"]}),
    )
    enter = f"mkdir -p {FOLDER} && cd {FOLDER}"
    start = f"nohup {words} > train.log 2>&1 < /dev/null & echo $! > train.pid"
    return "\n".join(["set -e", enter, *job.setup, *exports, start])


def _queued(verb: str, name: str, job: Job) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, name, *_place(job), "--quiet"]


def _vm(verb: str, job: Job, *names: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *names, *_place(job), "--quiet"]


def _place(job: Job) -> list[str]:
    project = [f"--project={job.where['project']}"] if "project" in job.where else []
    return [f"--zone={job.where['zone']}", *project]


def submit(
    job: Job, say: Callable[[str], None], patience: float = 3600.0, pause: float = 10.0
) -> dict[str, Any]:
    """Create the TPU unless there is one of this name, wait for it, copy, run.

    Raises:
        RunError: it was not given in `patience` seconds, or will not be.
    """
    made = commands(job)
    state = _state(made["describe"][0])
    if not state:
        for command in made["create"]:
            ask(command)
    else:
        say(f"launch: {job.name} is there: {state}")
    until = time.monotonic() + patience
    while (state := _state(made["describe"][0])) != _READY:
        if state in _GONE or time.monotonic() > until:
            raise RunError(
                f"the TPU {job.name} is {state or 'not there'}",
                where="launch tpu-vm",
                fix=f"another zone, or --set spot=true; `shardtrain stop tpu-vm:{job.name}@{job.where['zone']}` deletes the request",
            )
        time.sleep(pause)
    for command in [*made["copy"], *made["run"]]:
        ask(command)
    return {"kind": "tpu-vm", "job": job.name, "zone": job.where["zone"]}


def _state(describe: list[str]) -> str:
    try:
        return ask(describe).strip()
    except RunError as error:
        if "NOT_FOUND" in error.why or "not found" in error.why.lower():
            return ""
        raise


def status(job: Job) -> list[str]:
    """The command that says how a TPU is."""
    return [*_queued("describe", job.name, job), "--format=value(state.state)"]


def logs(job: Job) -> list[str]:
    """The command that prints the first worker's last lines."""
    name = f"{job.name}-0" if int(job.where.get("slices", "1")) > 1 else job.name
    return [*_vm("ssh", job, name), "--worker=0", f"--command=tail -n 100 {FOLDER}/train.log"]


def stop(job: Job) -> list[str]:
    """The command that deletes it."""
    return [*_queued("delete", job.name, job), "--force"]
