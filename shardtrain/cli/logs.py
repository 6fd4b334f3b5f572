"""The last lines of a run's processes.

shardtrain logs runs/gpt-tiny --process 1 --lines 50
shardtrain logs jobset:gpt-tiny
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from shardtrain.cli import shell
from shardtrain.cli.status import who_started
from shardtrain.errors import ConfigError
from shardtrain.launch import engines
from shardtrain.launch.client import ask


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or KIND:JOB")
    parser.add_argument("--process", type=int, metavar="N", help="only this one")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="of each (default 20)")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    if options.lines < 1:
        raise ConfigError(f"{options.lines}", where="--lines", fix="1 or more")
    path, found = who_started(options.run)
    if path is None:
        lines = {"": ask(engines.asking("logs", found)).splitlines()[-options.lines :]}
    else:
        lines = {file.stem: _tail(file, options.lines) for file in _files(path, options.process)}
    if not options.json:
        for name, rows in lines.items():
            for row in rows:
                print(f"{name.removeprefix('process-') + ': ' if len(lines) > 1 else ''}{row}")
    return shell.DONE, {"run": options.run, "logs": lines}


def _files(path: pathlib.Path, process: int | None) -> list[pathlib.Path]:
    files = sorted(path.glob("logs/process-*.log"), key=lambda f: (len(f.name), f.name))
    chosen = [f for f in files if process is None or f.name == f"process-{process}.log"]
    if not chosen:
        known = ", ".join(f.stem.removeprefix("process-") for f in files) or "none"
        raise ConfigError(
            "no logs" if process is None else f"no log of process {process}",
            where=str(path / "logs"),
            fix=f"--process of {known}" if files else "a run that has begun",
        )
    return chosen


def _tail(file: pathlib.Path, lines: int) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
