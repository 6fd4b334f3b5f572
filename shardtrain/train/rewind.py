"""Steps that a rewind passes over, written down before the run goes on, so that every later start does the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from shardtrain.errors import RunError
from shardtrain.train.inject import Step

FILE = "passed_over.json"


def recorded(run: Path) -> list[dict[str, Any]]:
    """One entry a rewind: `step`, `rows` (first and last), `why`, `rewound_to`.

    Raises:
        RunError: the file is no such list.
    """
    file = run / FILE
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_bytes())
        if not all(isinstance(entry["step"], int) for entry in entries):
            raise ValueError("a step is no number")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            "cannot be read",
            where=str(file),
            why=f"it says which batches this run left out: {error}",
            fix="copy it anew from where it came from, or remove it to take them",
        ) from error
    return list(entries)


def record(run: Path, entry: dict[str, Any]) -> None:
    """Add an entry; on disk, whole, when this returns."""
    work = run / f".{FILE}.tmp"
    with open(work, "w", encoding="utf-8") as stream:
        json.dump([*recorded(run), entry], stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(work, run / FILE)
    folder = os.open(run, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def passing(step_function: Step, steps: Collection[int], first: int, pass_over: Callable[[], Step]) -> Step:
    """The step function, with `pass_over()` in its place at the numbered steps; itself without any to come.

    Args:
        first: the step that the run is at.
    """
    if not any(step > first for step in steps):
        return step_function
    number, other = first, pass_over()

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal number
        number += 1
        return (other if number in steps else step_function)(state, batch)

    return step
