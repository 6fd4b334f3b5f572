"""Running the user's own client of a cluster: argument lists, never a line for a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from shardtrain.errors import LaunchError, RunError

_INSTALL = {
    "sbatch": "SLURM's commands, or run this on a login node",
    "squeue": "SLURM's commands, or run this on a login node",
    "scancel": "SLURM's commands, or run this on a login node",
    "kubectl": "kubectl, with a context for the cluster",
    "gcloud": "the Google Cloud CLI, and `gcloud auth login`",
    "pcluster": "pip install aws-parallelcluster",
    "sky": "pip install skypilot",
}


def ask(command: Sequence[str], text: str | None = None) -> str:
    """What a client prints; `text` goes to its stdin.

    Raises:
        LaunchError: there is no such client. RunError: it failed, with its last lines.
    """
    _require(command[0])
    done = subprocess.run(  # noqa: S603 a list: no shell reads it
        list(command), input=text if text is not None else "", capture_output=True, text=True, check=False
    )
    _check(command, done.returncode, done.stderr or done.stdout)
    return done.stdout


def follow(command: Sequence[str]) -> int:
    """Run a client with this terminal's output; returns its exit code."""
    _require(command[0])
    return subprocess.run(list(command), stdin=subprocess.DEVNULL, check=False).returncode  # noqa: S603


def _require(name: str) -> None:
    if shutil.which(name, path=os.environ.get("PATH")) is None:
        raise LaunchError(
            f"{name} is not here",
            where="launch",
            fix=f"{_INSTALL.get(name, name)}; --dry-run needs no client",
        )


def _check(command: Sequence[str], code: int, err: str) -> None:
    if code:
        lines = [line.strip() for line in err.splitlines() if line.strip()]
        raise RunError(
            f"ended with {code}",
            where=" ".join(word for word in command[:3] if not word.startswith("-")),
            why=" | ".join(lines[-3:])[:600],
            fix="what it says; --dry-run shows what is run",
        )
