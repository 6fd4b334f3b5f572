"""A step between its folder and a store: in parts, each checked by its digest on both sides."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shardtrain.checkpoint import commit, digests, folder, head, manifest
from shardtrain.checkpoint.store import Store, StoreError

THREADS = 4  # parts on their way at a time, each in memory: 256 MiB
PATIENCE = 120.0  # seconds without news of other processes' parts
LOOK = 1.0  # seconds between looks for them


class Part(NamedTuple):
    """What one digest covers is one object: a file, or 64 MiB of it."""

    key: str
    file: str
    start: int
    size: int
    digest: str


def parts_of(content: Mapping[str, Any]) -> list[Part]:
    """Of the files in a manifest; empty files have none.

    Raises:
        ValueError: no digests, or a name that leads out of the folder.
    """
    found = []
    for file, size in content["files"].items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or str(path) != file:
            raise ValueError(f"the file name {file!r} leads elsewhere")
        known = content.get("digests", {}).get(file)
        if known is None or len(known) != -(-size // digests.CHUNK):
            raise ValueError(f"the file {file} has no digests")
        for i, digest in enumerate(known):
            key = file if len(known) == 1 else f"{file}.part-{i:05d}"
            start = i * digests.CHUNK
            found.append(Part(key, file, start, min(digests.CHUNK, size - start), digest))
    return found


def upload(
    store: Store,
    path: Path,
    step: int,
    *,
    process: int = 0,
    processes: int = 1,
    wanted: Callable[[], bool] = lambda: True,
) -> dict[str, Any] | None:
    """Send this process's parts of a step; process 0 then waits for all, looks at each, and sends the manifest, which makes
    the step whole there. What an earlier try has brought there is not sent again.

    Args:
        wanted: False once nobody wants it any more.

    Returns:
        What the head is to say of it; None on process 1 and up.

    Raises:
        StoreError: no answer, or something there is not as it was sent. OSError, ValueError: it is no longer as it was
            written here. CheckpointError: nor is its manifest.
    """
    place = folder.step_folder(path, step)
    content = manifest.read(path, step)
    sealed = (place / folder.MANIFEST).read_bytes()
    there, parts = head.place_of(step, sealed), parts_of(content)

    def send(part: Part) -> None:
        if not wanted():
            raise StoreError("was given up")
        data = _read(place / part.file, part)
        if digests.of(data) != part.digest:
            raise ValueError(f"the file {part.file} is not what was written")
        if f"{there}/{part.key}" in known and _whole(store, there, part, data[-1:]):
            return
        store.write(f"{there}/{part.key}", data)

    def check(part: Part) -> None:
        with open(place / part.file, "rb") as stream:
            stream.seek(part.start + part.size - 1)
            if not _whole(store, there, part, stream.read(1)):
                raise StoreError(f"did not keep all of {there}/{part.key}")

    known = set(store.names(f"{there}/")) if wanted() else set()
    _each(send, [part for part in parts if commit.writer(part.file) == process])
    if process:
        return None
    if processes > 1:
        _wait_for_others(store, there, parts, wanted)
    _each(check, parts)
    store.write(f"{there}/{folder.MANIFEST}", sealed)
    if store.read(f"{there}/{folder.MANIFEST}")[0] != sealed:
        raise StoreError(f"did not keep all of {there}/{folder.MANIFEST}")
    size = sum(content["files"].values()) + len(sealed)
    return {"place": there, "bytes": size, "time": content["time"]}


def _read(file: Path, part: Part) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(part.start)
        return stream.read(part.size)


def _whole(store: Store, there: str, part: Part, last: bytes) -> bool:
    return store.ends_with(f"{there}/{part.key}", part.size, last)


def _wait_for_others(store: Store, there: str, parts: list[Part], wanted: Callable[[], bool]) -> None:
    names = {f"{there}/{part.key}" for part in parts}
    missing, since = names, time.monotonic()
    while left := names - set(store.names(f"{there}/")):
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
        if time.monotonic() - since > PATIENCE or not wanted():
            raise StoreError(f"has not got {len(left)} parts of other processes, such as {min(left)}")
        time.sleep(LOOK)


def _each[T](action: Callable[[T], None], items: Iterable[T]) -> None:
    """In several threads; the first error ends it."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        for done in as_completed([pool.submit(action, item) for item in items]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fetch_manifest(store: Store, step: int, there: str) -> tuple[bytes, dict[str, Any]]:
    """The manifest of a step, and what it says.

    Raises:
        StoreError: no answer. ValueError: it is missing or damaged.
    """
    sealed, _ = store.read(f"{there}/{folder.MANIFEST}")
    if sealed is None:
        raise ValueError(f"{folder.MANIFEST} is missing")
    if head.place_of(step, sealed) != there:
        raise ValueError(f"{folder.MANIFEST} is not what was written: its digest differs")
    return sealed, manifest.parse(sealed, step, f"{store.url}/{there}")


def fetch(store: Store, there: str, content: Mapping[str, Any], place: Path, *, part: int = 0, of: int = 1) -> None:  # fmt: skip
    """Bring every `of`-th part of a step, from `part` on, into the folder `place`.

    Raises:
        StoreError: no answer. ValueError: damaged there. OSError: it cannot be written here.
    """

    def bring(part: Part) -> None:
        data = good(store, there, part)
        file = place / part.file
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], part.start + written)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    _each(bring, parts_of(content)[part::of])


def good(store: Store, there: str, part: Part) -> bytes:
    """A part as it was written; asked for twice, since the way here may be to blame.

    Raises:
        StoreError: no answer. ValueError: missing, or not what was written.
    """
    why = ""
    for _ in range(2):
        data, _ = store.read(f"{there}/{part.key}")
        if data is None:
            why = f"{part.key} is missing ({part.size} bytes)"
        elif len(data) != part.size:
            why = f"{part.key} has {len(data)} bytes, {part.size} were written"
        elif digests.of(data) != part.digest:
            why = f"{part.key} is not what was written: its digest differs"
        else:
            return data
    raise ValueError(f"the object {why}")


def finish(place: Path, content: Mapping[str, Any], sealed: bytes) -> None:
    """When every part is there: the empty files, what names them, and the manifest last, all on disk."""
    for file, size in content["files"].items():
        if not size:
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).touch()
    for inner, _, _ in os.walk(place):
        folder.sync(Path(inner))
    folder.write_synced(place / folder.MANIFEST, sealed.decode())


def remove_unnamed(store: Store, content: Mapping[str, Any], step: int, busy: Iterable[str]) -> None:
    """Remove the files of steps up to `step` that the head does not name: replaced ones, and what crashes left.

    Args:
        busy: places that are being written.
    """
    named = {entry["place"] for kind in ("steps", "aside") for entry in content[kind].values()} | set(busy)
    gone = []
    for key in store.names():
        found = head.PLACE.fullmatch(key.partition("/")[0])
        if found and found[0] not in named and int(found[1]) <= step:
            gone.append(key)
    manifests = [key for key in gone if key.endswith(f"/{folder.MANIFEST}")]
    _each(store.delete, manifests)  # first: without one, no files are taken for a step
    _each(store.delete, [key for key in gone if key not in manifests])
