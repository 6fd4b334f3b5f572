"""Is a step what was written? Every byte is read before any of it is handed out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import jax

from shardtrain.checkpoint import agreement, digests, folder, manifest, remote
from shardtrain.checkpoint.listing import steps_of
from shardtrain.checkpoint.store import is_url
from shardtrain.errors import CheckpointError

log = logging.getLogger("shardtrain")


def verify(path: str | os.PathLike[str], step: int | None = None) -> dict[str, Any]:
    """Check every byte of the steps in a folder of checkpoints (or in the `checkpoints` of a run, or in a store by its URL).

    Returns:
        `path`, and `steps`: for each `step, committed, intact, problems` (sentences). A save under way, or left by
        a crash, has `committed` false.

    Raises:
        CheckpointError: no such folder, or no (such) step in it. RunError: a store gives no answer.
    """
    if is_url(path):
        return remote.verify(str(path), step)
    place, there = steps_of(path, step)
    entries: list[dict[str, Any]] = []
    for number in there if step is None else [step]:
        problems = problems_of(place, number)
        if not problems and not _digested(place, number):
            problems = ["written without digests (format 1): only the sizes of its files could be compared"]
        entries.append({"step": number, "committed": True, "intact": not problems, "problems": problems})
    if step is None:
        late = "under way, or cut off"
        entries += [
            {"step": number, "committed": False, "intact": False, "problems": [late]}
            for number in folder.unfinished(place)
        ]
    return {"path": str(place), "steps": sorted(entries, key=lambda e: (e["step"], e["committed"]))}


def problems_of(path: Path, step: int, *, part: int = 0, of: int = 1, contents: bool = True) -> list[str]:
    """What is wrong with a step, a sentence each; reads every `of`-th file, from `part` on.

    Args:
        contents: False looks at the manifest and at sizes only.

    Raises:
        CheckpointError: its format is newer than this shardtrain.
    """
    place = folder.step_folder(path, step)
    try:
        content = manifest.read(path, step)
    except CheckpointError as error:
        if "newer" in error.message:
            raise
        return [error.why]
    here, problems, sound = folder.files(place), [], {}
    for name, size in list(content["files"].items())[part::of]:
        if name not in here:
            problems.append(f"the file {name} is missing ({size} bytes)")
        elif here[name] != size:
            problems.append(f"the file {name} has {here[name]} bytes, {size} were written")
        else:
            sound[name] = size
    if contents and "digests" in content:
        problems += digests.differences(place, sound, content["digests"])
    return problems


def require(path: Path, step: int) -> None:
    """Refuse a damaged step. On several processes each reads its share, and all raise where one must.

    Raises:
        CheckpointError: it is damaged.
    """
    if found := _agreed(path, step):
        raise manifest.damaged(path, step, found)
    if not _digested(path, step):
        log.warning(
            "%s/%d was written without digests: only the sizes of its files were compared", path, step
        )


def newest(path: Path) -> tuple[int | None, dict[int, str]]:
    """The newest step that is intact (None: there is no step), and the damaged ones after it with what is wrong.

    Raises:
        CheckpointError: there are steps, and none is intact.
    """
    step, damaged = found(path)
    if step is None and damaged:
        refuse(path, damaged)
    return step, damaged


def found(path: Path) -> tuple[int | None, dict[int, str]]:
    """`newest`, for those who know another place to look."""
    damaged: dict[int, str] = {}
    below: int | None = None
    while (step := _newest_below(path, below)) is not None:
        if not (why := _agreed(path, step)):
            return step, damaged
        damaged[step] = why
        below = step
    return None, damaged


def refuse(path: Path, damaged: dict[int, str]) -> NoReturn:
    """Raise over steps none of which is intact."""
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoints here is intact",
        where=str(path),
        why="\n  ".join(f"step {step}: {why}" for step, why in damaged.items()),
        fix="copy one anew from where it came from, or start in another folder",
    )


def _agreed(path: Path, step: int) -> str:
    problems = problems_of(path, step, part=jax.process_index(), of=jax.process_count())
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return agreement.complaint(problems[0] + more if problems else "")


def _newest_below(path: Path, below: int | None) -> int | None:
    # a shared file system may show the processes different listings for a moment
    found = [step for step in folder.steps(path) if below is None or step < below]
    agreed = agreement.number(max(found, default=-1))
    return None if agreed < 0 else agreed


def _digested(path: Path, step: int) -> bool:
    return "digests" in manifest.read(path, step)
