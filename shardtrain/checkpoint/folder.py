"""How checkpoints lie in their folder, and the few moves that change it.

    FOLDER/500/arrays/...        written by Orbax
    FOLDER/500/manifest.json     written last: what the arrays are, size and digests of every file
    FOLDER/500.damaged/...       was found damaged at a start, and set aside; nothing removes it
    FOLDER/.saving/500/...       a save under way, or what a crash left of one
    FOLDER/.trash/500-...        on its way out
    FOLDER/.lock                 whoever writes here holds it, and is named in it

A step has a plain number for a name only between two renames: into place when all of it is on disk, and
into the trash before the first of its files is removed. So whatever is listed is whole, and whatever lies
in the two hidden folders is ours to remove.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardtrain.errors import CheckpointError

ARRAYS = "arrays"
MANIFEST = "manifest.json"
SAVING = ".saving"
TRASH = ".trash"


def local(path: str | os.PathLike[str]) -> Path:
    """The folder as an absolute path.

    Raises:
        CheckpointError: `path` is a URL, such as `gs://...`.
    """
    if "://" in str(path):
        raise CheckpointError(
            "a run writes to a local or shared file system, and from there to a store",
            where=str(path),
            fix="a folder here, and the URL as `durable`",
        )
    return Path(os.path.abspath(os.path.expanduser(path)))


def claim(path: Path) -> None:
    """Make the folder and write in it, so that a refusal comes before any training.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    probe = path / f".probe-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            "checkpoints cannot be written here",
            where=str(path),
            why=f"{error.strerror or error} ({error.filename or probe})",
            fix="choose a folder that can be written",
        ) from error


def step_folder(path: Path, step: int) -> Path:
    return path / str(step)


def saving_folder(path: Path, step: int) -> Path:
    return path / SAVING / str(step)


def steps(path: Path) -> list[int]:
    """Steps in the folder, ascending, damaged ones included."""
    return _numbered(path)


def unfinished(path: Path) -> list[int]:
    """Steps whose save is under way or was cut off."""
    return _numbered(path / SAVING)


def _numbered(path: Path) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # str(int(...)) keeps out 007 and other spellings that step_folder would not find again
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def files(path: Path) -> dict[str, int]:
    """Relative name to bytes, of every file under `path`."""
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            with suppress(FileNotFoundError):  # another process may be at work
                sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    return dict(sorted(sizes.items()))


def publish(path: Path, step: int, *, superseded: Iterable[int] = ()) -> None:
    """Put a finished save in its place. `superseded` steps leave first, newest first: a crash in between
    then resumes from before them, never from a future that was abandoned."""
    source = saving_folder(path, step)
    sync(source)
    for old in sorted(superseded, reverse=True):
        retire(path, old)
    os.rename(source, step_folder(path, step))
    sync(path)


def retire(path: Path, step: int) -> None:
    """Remove a step: out of sight in one rename, then its files."""
    trash = path / TRASH
    trash.mkdir(exist_ok=True)
    target = trash / f"{step}-{uuid.uuid4().hex}"
    os.rename(step_folder(path, step), target)
    sync(path)
    shutil.rmtree(target, ignore_errors=True)


def set_aside(path: Path, step: int) -> Path:
    """Move a damaged step out of the list; where to."""
    target, count = path / f"{step}.damaged", 1
    while target.exists():
        count += 1
        target = path / f"{step}.damaged-{count}"
    os.rename(step_folder(path, step), target)
    sync(path)
    return target


def retain(
    path: Path, whole: list[int], keep: int | None, keep_every: int | None, needed: Collection[int] = ()
) -> None:
    """Keep the newest `keep` of the steps `whole`, every multiple of `keep_every`, and what is `needed` for now."""
    if keep is None:
        return
    for step in whole[:-keep]:
        if step not in needed and (not keep_every or step % keep_every):
            retire(path, step)


def purge(path: Path) -> None:
    """Remove what crashes left: everything in the two hidden folders."""
    for name in (SAVING, TRASH):
        shutil.rmtree(path / name, ignore_errors=True)


def discard(path: Path, step: int) -> None:
    """Remove a save that failed, so that it does not fill the disk."""
    shutil.rmtree(saving_folder(path, step), ignore_errors=True)


def write_synced(file: Path, text: str) -> None:
    """Write a file that is on disk when this returns."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
