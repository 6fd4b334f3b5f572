"""AWS: EKS through a JobSet, ParallelCluster through SLURM on its head node. `where.engine`: eks or parallelcluster."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from shardtrain.errors import LaunchError
from shardtrain.launch import jobset, slurm
from shardtrain.launch.client import ask
from shardtrain.launch.job import Job

ENGINES = ("eks", "parallelcluster")


def rendered(job: Job, *, dry: bool = False) -> tuple[list[str], str]:
    """The command, and the text for its stdin; `dry`: without secrets.

    Raises:
        LaunchError: another engine, or a ParallelCluster without its name.
    """
    engine = job.where.get("engine", "eks")
    if engine == "eks":
        job = dataclasses.replace(job, where={**job.where, "provider": "eks"})
        return jobset.command(job), jobset.handed_over(job, dry=dry)
    if engine != "parallelcluster":
        raise LaunchError(f"'{engine}'", where="--set engine", fix=" or ".join(ENGINES))
    if "cluster" not in job.where:
        raise LaunchError(
            "no name of the cluster",
            where="--set cluster",
            fix="--set cluster=NAME, as in `pcluster list-clusters`",
        )
    return _on_head(job.where["cluster"], slurm.command(job)), slurm.script(job)


def _on_head(cluster: str, words: list[str]) -> list[str]:
    # the head node's shell reads the last argument
    return ["pcluster", "ssh", f"--cluster-name={cluster}", shlex.join(words)]


def submit(job: Job) -> dict[str, Any]:
    """Hand it over."""
    command, text = rendered(job)
    out = ask(command, text)
    if command[0] == "pcluster":
        return {
            "kind": "aws",
            "engine": "parallelcluster",
            "cluster": job.where["cluster"],
            "job": out.strip().split(";")[0],
        }
    return {"kind": "jobset", "job": job.name, "namespace": job.where.get("namespace", "")}


def status(cluster: str, job: str) -> list[str]:
    """The command that says how a job of a ParallelCluster is."""
    return _on_head(cluster, slurm.status(job))


def stop(cluster: str, job: str) -> list[str]:
    """The command that ends it."""
    return _on_head(cluster, slurm.stop(job))
