"""What a run is doing, from its own files, and from the engine that it was handed to.

shardtrain status runs/gpt-tiny
shardtrain status slurm:1234          a job that has no folder here yet, as `launch` named it
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

from shardtrain.cli import shell
from shardtrain.errors import ConfigError, ShardTrainError
from shardtrain.launch import engines
from shardtrain.launch.client import ask
from shardtrain.launch.record import process_of, read_record
from shardtrain.watch import goodput_lines, read_goodput, read_table, slow, table_lines


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or KIND:JOB")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    path, found = who_started(options.run)
    result: dict[str, Any] = {"run": options.run, "kind": found.get("kind")}
    if path is not None:
        result |= _progress(path)
    if found.get("kind") in ("local", "alone"):
        result["running"] = process_of(found) is not None
        result["host"] = found.get("host")
    elif found.get("kind") in engines.ENGINES:
        try:
            result["engine"] = ask(engines.asking("status", found)).strip()
        except ShardTrainError as error:
            if path is None:
                raise
            result["engine"] = f"not known: {error.message}"
    if not options.json:
        for name, value in result.items():
            if value is not None:
                print(f"{name:<12} {value}" if name not in ("goodput", "processes") else _shown(name, value))
    return shell.DONE, result


def _shown(name: str, value: Any) -> str:
    if name == "goodput":
        return goodput_lines(value)
    return "\n".join(table_lines(value["seconds"]))


def who_started(name: str) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """A run's folder and who started it; without a folder, a job by its name.

    Raises:
        ConfigError: neither.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "metrics.jsonl", "launch.json")):
            raise ConfigError("no run in this folder", where=name, fix="a folder that has config.json")
        return path, read_record(path)
    if found := engines.parse_name(name):
        return None, dict(found)
    raise ConfigError("no such run", where=name, fix="a run's folder, or KIND:JOB as `launch` named it")


def _progress(path: pathlib.Path) -> dict[str, Any]:
    steps = losses = at = None
    try:
        steps = json.loads((path / "config.json").read_text(encoding="utf-8")).get("steps")
        at = (path / "metrics.jsonl").stat().st_mtime
        lines = (path / "metrics.jsonl").read_bytes().splitlines()
    except (OSError, ValueError):
        lines = []
    last: dict[str, Any] = {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # being written, or cut off
            continue
        if isinstance(row, dict) and "loss" in row:
            last, losses = row, row["loss"]
            break
    spent, table = read_goodput(path), read_table(path)
    saved = [int(p.name) for p in path.glob("checkpoints/*") if p.name.isdigit()]
    return {
        "step": last.get("step"),
        "steps": steps,
        "loss": losses,
        "seconds_ago": None if at is None else round(time.time() - at, 1),
        "checkpoint": max(saved, default=None),
        "goodput": {k: spent[k] for k in ("wall_seconds", "goodput", "attempts", "parts")} if spent else None,
        "processes": {"seconds": table, "slow": slow(table)} if table else None,
        "stuck": [str(f) for f in sorted((path / "stuck").glob("*.txt"))] or None,
    }
