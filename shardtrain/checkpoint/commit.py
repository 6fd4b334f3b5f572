"""From files that are written to a step that counts: digested, synced, then the manifest, then the rename."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import digests, folder, manifest
from shardtrain.errors import first_line
from shardtrain.mesh.board import service_board


def together(
    path: Path,
    step: int,
    pending: Any,
    content: dict[str, Any],
    superseded: list[int],
    meeting: str,
    fault: Callable[[], None] | None = None,
) -> None:
    """The background half of a save, on all processes at once: in the end the step is in place for all of them, or for none.

    Args:
        pending: what `arrays.start` gave, or the error with which it ended.
        content: of the manifest. superseded: see `folder.publish`. meeting: a name of this commit alone.
        fault: raises where a part would have been written.

    Raises:
        Exception: it was not put in place; nothing of it is left.
    """
    from shardtrain.checkpoint import arrays

    place, process, processes = folder.saving_folder(path, step), jax.process_index(), jax.process_count()
    board = service_board(meeting)
    failure: Exception | None = None
    try:
        if isinstance(pending, OSError):
            raise pending
        arrays.finish(pending, board)
        if fault is not None:
            fault()
        if process:
            record(place, process)
    except Exception as error:
        failure = error
        if board is not None:
            with contextlib.suppress(Exception):  # they wait longer
                board.put(process, f"process {process} could not write its part: {first_line(error)}")
    try:
        if processes > 1:
            arrays.meet(f"{meeting}-written")
        if process == 0 and failure is None:
            seal(place, content, processes)
            folder.publish(path, step, superseded=superseded)
    except Exception as error:
        failure = failure or error
    if failure is not None and process == 0:
        folder.discard(path, step)
    try:
        arrays.meet(meeting)
        if failure is None and not (folder.step_folder(path, step) / folder.MANIFEST).is_file():
            raise OSError("process 0 could not put it in place")
    except Exception as error:
        failure = failure or error
    if failure is not None and processes > 1 and not isinstance(pending, OSError):
        arrays.release(pending)
    if failure is not None:
        raise failure


def record(place: Path, process: int) -> None:
    """Process 1 and up: sync and digest the files that it wrote, and leave what it found for process 0.

    Another host's cache can neither be synced nor read by process 0 alone.
    """
    sizes = {n: size for n, size in folder.files(place).items() if writer(n) == process}
    found = {"sizes": sizes, "digests": _synced(place, sizes)}
    folder.write_synced(_left(place, process), json.dumps(found))


def seal(place: Path, content: dict[str, Any], processes: int) -> None:
    """Process 0, after all have recorded: digest the rest, and write the manifest, which makes the step whole."""
    known: dict[str, list[str]] = {}
    told: dict[str, int] = {}
    for process in range(1, processes):
        file = _left(place, process)
        if not file.is_file():
            raise OSError(f"process {process} did not write its part")
        found = json.loads(file.read_text(encoding="utf-8"))
        known |= found["digests"]
        told |= found["sizes"]
        file.unlink()
    sizes = folder.files(place)
    if changed := [name for name, size in told.items() if sizes.get(name) != size]:
        raise OSError(f"{changed[0]} is not as its process wrote it")
    rest = {name: size for name, size in sizes.items() if name not in known}
    content["files"] = sizes
    content["digests"] = {**_synced(place, rest), **known}
    for inner, _, _ in os.walk(place):
        folder.sync(Path(inner))
    folder.write_synced(place / folder.MANIFEST, manifest.seal(content))


def _synced(place: Path, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Digests of files that are on disk when this returns: read while the disk writes."""
    with ThreadPoolExecutor(1) as beside:
        found = beside.submit(digests.of_files, place, sizes)
        for name in sizes:  # Orbax leaves its metadata files to the page cache
            folder.sync(place / name)
        return found.result()


def writer(name: str) -> int:
    """Of a file in `ocdbt.process_3/`, or named `process_3`: 3. Of all else process 0 takes care."""
    found = re.search(r"(?:^|[./])process_(\d+)(?:/|$)", name)
    return int(found[1]) if found else 0


def _left(place: Path, process: int) -> Path:
    return place / f".digests-{process}.json"
