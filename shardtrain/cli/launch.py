"""Run a command in several processes, and start it again when one of them fails.

  shardtrain launch local --processes 2 -- train configs/gpt.py:tiny
  shardtrain launch local --processes 4 --devices-per-process 2 -- python script.py ARGS

The processes find each other: `train` joins them by itself, a script calls `st.init_distributed()` first. The first
failure ends the others and is named; after exit codes 3 and 75 and after signals all start again from the last
checkpoint. Simulated devices (`--devices cpu:8`) and GPUs are divided among the processes.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shardtrain.cli import COMMANDS, shell
from shardtrain.errors import ConfigError, suggestion
from shardtrain.launch import local
from shardtrain.train.inject import parse

STARTS_ANOTHER = True
KINDS = ("local",)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=" | ".join(KINDS))
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--devices-per-process", type=int, metavar="K", help="simulated devices or GPUs of each"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="R", help="after failures, not preemptions (default 3)"
    )
    parser.add_argument(
        "--elastic", action="store_true", help="when restarts are used up, go on with fewer processes"
    )
    parser.add_argument(
        "--output-logs", type=pathlib.Path, metavar="DIR", help="also write DIR/process-N.log"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where the coordinator listens (default 127.0.0.1)",
    )
    parser.add_argument(
        "--grace", type=float, default=60.0, metavar="SECONDS", help="to save after SIGTERM (default 60)"
    )
    parser.add_argument(
        "--inject",
        default="",
        metavar="FAULT",
        help="such as kill@step=12:process=1; also stop, term, hang, slow, nan",
    )


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    parse(options.inject)
    asked = local.Local(
        command=command_of(options.other),
        processes=options.processes,
        devices_per_process=options.devices_per_process,
        host=options.host,
        max_restarts=options.max_restarts,
        elastic=options.elastic,
        logs=options.output_logs,
        inject=options.inject,
        grace=options.grace,
    )
    if options.dry_run:
        return shell.DONE, dry_run(asked, options.json)
    found = local.launch(asked, shell.say, quiet=options.json)
    return found["exit"], found


def dry_run(asked: local.Local, as_json: bool) -> dict[str, Any]:
    """Print each process's variables and command."""
    starts = local.starts(asked, asked.processes, 0, local.free_port(asked.host))
    for start in () if as_json else starts:
        print(shlex.join([f"{k}={v}" for k, v in start.environment.items()] + list(start.command)))
    return {
        "kind": "local",
        "processes": asked.processes,
        "starts": [{"environment": dict(s.environment), "command": list(s.command)} for s in starts],
    }


def command_of(words: Sequence[str]) -> tuple[str, ...]:
    """What each process runs: a command of ours, or a Python script.

    Raises:
        ConfigError: neither.
    """
    known = [name for name in COMMANDS if name != "launch"]
    if not words:
        raise ConfigError(
            "no command to run", where="launch", fix="end with `-- train CONFIG` or `-- python FILE`"
        )
    if words[0] in known:
        return (sys.executable, "-m", "shardtrain", *words)
    if words[0] == "python" and len(words) > 1:
        return (sys.executable, *words[1:])
    raise ConfigError(
        f"'{words[0]}' is no command to run" if words[0] != "python" else "python without a script",
        where="launch",
        fix=suggestion(words[0], [*known, "python"], "`-- train CONFIG`, `-- python FILE`"),
    )
