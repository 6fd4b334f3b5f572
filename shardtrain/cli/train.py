"""Run a config. The same command on the same --output goes on where the run stopped; --fresh starts anew.

  shardtrain train configs/gpt.py:tiny
  shardtrain train configs/gpt.py:tiny --mesh.tensor 4 --mesh.fsdp 2 --output runs/other

Every leaf of the config is a flag: see `shardtrain config CONFIG`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import Any

from shardtrain.cli import shell
from shardtrain.launch.record import started_again


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.add_argument("--fresh", action="store_true", help="move an older run in the output folder aside")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config import resolve

    config, notes = resolve(options.config, options.overrides)
    return train(config, notes, fresh=options.fresh, quiet=options.json)


def train(config: Any, notes: list[str], *, fresh: bool, quiet: bool) -> tuple[int, dict[str, Any]]:
    """Run a config; exit code and JSON."""
    from shardtrain.config.devices import start_devices

    line = start_devices(config.devices)
    for note in [*notes, *([line] if line else [])]:
        shell.say(note)
    warnings = logging.StreamHandler(sys.stderr)
    warnings.setLevel(logging.WARNING)  # the rest is in the run's log file
    logging.basicConfig(handlers=[warnings], format="%(message)s")

    from shardtrain.config.run import train as train_config

    fresh = fresh and not started_again()  # what a restart finds there is this run
    run = train_config(config, fresh=fresh, say=shell.say, quiet=quiet and not sys.stderr.isatty())
    code = {"interrupted": shell.DONE, "preempted": shell.INTERRUPTED}.get(run.stopped, shell.DONE)
    if config.durable and run.durable != run.step and run.stopped in ("done", "data ended"):
        code = shell.FAILED  # launchers start it again, and a start sends what the store has not
        shell.say(
            f"step {run.step} is in {run.path} alone; newest in {config.durable}: "
            f"{'none' if run.durable is None else f'step {run.durable}'}; the same command tries again"
        )
    last = run.history[-1] if run.history else {}
    evaluation = run.evaluations[-1] if run.evaluations else {}
    return code, {
        "run": str(run.path),
        "steps": run.step,
        "train_loss": _finite(last.get("loss")),
        "eval_loss": _finite(evaluation.get("loss")),
        "tokens_per_second": run.tokens_per_second,
        "mfu": run.mfu,
        "step_seconds": run.step_seconds,
        "mesh": dict(run.plan.mesh.shape),
        "rules": run.plan.rules.name,
        "groups": run.plan.groups,
        "checkpoint": str(run.path / "checkpoints" / str(run.step)) if run.path else None,
        "durable": {"url": config.durable, "step": run.durable} if config.durable else None,
        "resumed_from": run.resumed_from,
        "stopped": run.stopped,
        "skipped": sum(bool(row.get("skipped")) for row in run.history),
        "exit": code,
    }


def _finite(value: Any) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) else None
