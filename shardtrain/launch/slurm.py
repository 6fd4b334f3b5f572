"""SLURM: a batch script, handed to the user's own `sbatch` on stdin.

One task per process. Each takes its share of the host's accelerators by its `SLURM_LOCALID`. The warning before the
time limit or a preemption goes to the processes (`--signal`), which save and leave with 75; the script then has itself
requeued, as after any failure but wrong input, at most `max_restarts` times. Its processes show each other a certificate that
the script makes in the folder that it was submitted from.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from shardtrain.errors import LaunchError
from shardtrain.launch import certificates
from shardtrain.launch.client import ask
from shardtrain.launch.job import Job, exported


def options(job: Job) -> list[str]:
    """The options of sbatch, as words. `accelerator`: the type in `--gres`; `where.gpus` = "none" asks for none."""
    gpus = job.processes_per_host * job.devices_per_process
    found = [
        f"--job-name={job.name}",
        f"--nodes={job.hosts}",
        f"--ntasks={job.processes}",
        f"--ntasks-per-node={job.processes_per_host}",
        "--requeue",
        f"--signal=TERM@{job.grace}",
        "--open-mode=append",
        f"--output={job.where.get('output', 'slurm-%j.out')}",
    ]
    if job.where.get("gpus") != "none":
        kind = f"{job.accelerator}:" if job.accelerator else ""
        found.append(f"--gres=gpu:{kind}{gpus}")
    for name, value in (("partition", job.partition), ("account", job.account), ("time", job.time)):
        if value:
            found.append(f"--{name}={value}")
    return [*found, *job.flags]


def script(job: Job) -> str:
    """The batch script. An option with a line break in it, which no such script can hold, is left to `command`."""
    header = [f"#SBATCH {_quoted(o)}" for o in options(job) if "\n" not in o]
    run = ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    if job.image:
        run += [f"--container-image={job.image}"]
        run += [f"--container-mounts={','.join(job.mounts)}"] if job.mounts else []
    elif job.mounts:
        raise LaunchError(
            "mounts without an image", where="--mount", fix="--image IMAGE (Pyxis), or no mounts"
        )
    inside = [run[0], "--nodes=1", "--ntasks=1", *run[2:]] if job.image else []
    variables = exported(
        job,
        SHARDTRAIN_LAUNCH='{"kind": "slurm"}',
        JAX_NUM_CPU_DEVICES=str(job.devices_per_process),  # counts where the devices are simulated
        SHARDTRAIN_TOTAL_DEVICES=str(job.devices),
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *header,
            "",
            "set -e",
            *job.setup,
            *variables,
            # the port follows from the job: two jobs on one host do not meet
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            'export JAX_COORDINATOR_ADDRESS="$head:$((20000 + SLURM_JOB_ID % 20000))"',
            'export JAX_NUM_PROCESSES="$SLURM_NTASKS"',
            *(_certificates([*inside, job.command[0]]) if job.mtls == "on" else ()),
            "",
            "code=0",
            f"{shlex.join([*run, *job.command])} || code=$?",
            'case "$code" in',
            "0 | 2 | 126 | 127 | 130) ;;  # done, or wrong input: never again",
            f'*) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;',
            "esac",
            'exit "$code"',
            "",
        ]
    )


def _certificates(python: list[str]) -> list[str]:
    """Made by the job itself, where it was submitted (a folder that all its hosts see), and gone with it."""
    files = certificates.environment("")
    return [
        'tls="${SLURM_SUBMIT_DIR:-$PWD}/.shardtrain-tls-$SLURM_JOB_ID"',
        """trap 'rm -rf -- "$tls"' EXIT""",
        f'{shlex.join(python)} -m {certificates.__name__} "$tls" $(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        *(f'export {variable}="$tls/{name}"' for variable, name in files.items()),
    ]


def _quoted(option: str) -> str:
    """As sbatch reads its lines: a backslash takes the next character as it is, inside quotes too."""
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", option):
        return option
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def command(job: Job) -> list[str]:
    """What is run; the script is its stdin."""
    return ["sbatch", "--parsable", *(o for o in options(job) if "\n" in o)]


def submit(job: Job) -> dict[str, Any]:
    """Hand it over; returns the job's id."""
    return {"kind": "slurm", "job": ask(command(job), script(job)).strip().split(";")[0]}


def status(job: str) -> list[str]:
    """The command that says how a job is."""
    return ["squeue", "--jobs", job, "--noheader", "--format=%T %r %N %M"]


def stop(job: str) -> list[str]:
    """The command that ends a job."""
    return ["scancel", job]
