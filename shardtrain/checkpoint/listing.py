"""Look at checkpoints without a plan and without reading an array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import folder, manifest, remote
from shardtrain.checkpoint.store import is_url
from shardtrain.errors import CheckpointError


def list_steps(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The steps in a folder of checkpoints (or in the `checkpoints` of a run, or in a store by its URL), ascending.

    Returns:
        For each `step, committed, bytes` (on disk), and where its manifest can be read `time` (UTC), `mesh`
        (axis name to size), `parameters`; `problem` where it cannot. A save under way, or left by a crash,
        is listed with `committed` false.

    Raises:
        CheckpointError: there is no such folder. RunError: a store gives no answer.
    """
    if is_url(path):
        return remote.list_steps(str(path))
    place = place_of(path)
    found: list[dict[str, Any]] = []
    for step in folder.steps(place):
        entry: dict[str, Any] = {"step": step, "committed": True}
        entry["bytes"] = sum(folder.files(folder.step_folder(place, step)).values())
        try:
            content = manifest.read(place, step)
            entry |= {name: content.get(name) for name in ("time", "mesh", "parameters")}
        except CheckpointError as error:
            entry |= {"committed": False, "problem": error.why or error.message}
        found.append(entry)
    for step in folder.unfinished(place):
        size = sum(folder.files(folder.saving_folder(place, step)).values())
        found.append({"step": step, "committed": False, "bytes": size, "problem": "under way, or cut off"})
    return sorted(found, key=lambda entry: (entry["step"], entry["committed"]))


def inspect(path: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """All that is known of one step, the newest by default.

    Returns:
        `path, step, committed, bytes, time, mesh, processes, versions, parameters, cursor, tree` (path to
        `shape, dtype, spec`), `config, extra, files` (name to bytes), and what the plan told of itself.

    Raises:
        CheckpointError: there is no such step, or its manifest is damaged. RunError: a store gives no answer.
    """
    if is_url(path):
        return remote.inspect(str(path), step)
    place, found = steps_of(path, step)
    step = found[-1] if step is None else step
    target = folder.step_folder(place, step)
    size = sum(folder.files(target).values())
    return {**manifest.read(place, step), "path": str(target), "committed": True, "bytes": size}


def steps_of(path: str | os.PathLike[str], step: int | None = None) -> tuple[Path, list[int]]:
    """The folder of checkpoints that `path` means, and its steps, among them `step`.

    Raises:
        CheckpointError: no such folder, or no (such) step in it.
    """
    place = place_of(path)
    found = folder.steps(place)
    if not found or (step is not None and step not in found):
        raise CheckpointError(
            "no checkpoint here" if step is None else f"no step {step} here",
            where=str(place),
            why=f"steps: {', '.join(map(str, found)) or 'none'}",
            fix="check the path" if not found else "choose one of them",
        )
    return place, found


def place_of(path: str | os.PathLike[str]) -> Path:
    """The folder of checkpoints that `path`, itself or a run, means."""
    place = folder.local(path)
    if not place.is_dir():
        raise CheckpointError("no such folder", where=str(place), fix="check the path")
    # a run keeps its checkpoints one folder down
    inside = place / "checkpoints"
    return inside if inside.is_dir() and not folder.steps(place) else place
