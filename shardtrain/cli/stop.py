"""Have a run save and end. One that goes on later is the same command again.

  shardtrain stop runs/gpt-tiny
  shardtrain stop slurm:1234

A run on this machine gets SIGTERM, as from a scheduler: it saves and leaves with 75. `tpu-vm` and `sky` also give the
machines back.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

from shardtrain.cli import shell
from shardtrain.cli.status import who_started
from shardtrain.errors import ConfigError
from shardtrain.launch import engines
from shardtrain.launch.client import ask
from shardtrain.launch.record import process_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or KIND:JOB")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    path, found = who_started(options.run)
    if found.get("kind") in engines.ENGINES:
        command = engines.asking("stop", found)
        ask(command)
        shell.say(f"asked to stop: {options.run}")
        return shell.DONE, {"run": options.run, "kind": found["kind"], "asked": True}
    pid = process_of(found)
    if pid is None:
        host = found.get("host")
        elsewhere = host is not None and host != os.uname().nodename
        raise ConfigError(
            f"runs on {host}, if at all" if elsewhere else "is not running",
            where=str(path),
            fix=f"the same command on {host}" if elsewhere else "nothing is to be stopped",
        )
    os.kill(pid, signal.SIGTERM)
    shell.say(f"process {pid} was asked to save and end")
    return shell.DONE, {"run": options.run, "kind": found["kind"], "pid": pid, "asked": True}
