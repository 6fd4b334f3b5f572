"""What a store has of a run, and who may write there: one small object that is only changed by comparing it first.

    URL/head.json         owner (the lease), steps (number -> place), aside (damaged steps)
    URL/500-1f3a.../...   the files of step 500, written before `head.json` names them; 1f3a...: digest of the manifest

A commit is one conditional write of `head.json`: the new step appears, and those that it replaces leave, at once or
not at all. The lease lies in the same object, so a run that lost it cannot commit, however late its request comes. Clocks
decide only how polite a second run is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import folder, manifest
from shardtrain.checkpoint.store import Store, StoreError
from shardtrain.errors import CheckpointError

log = logging.getLogger("shardtrain")
NAME = "head.json"
FORMAT = 1
NAMED = ".durable"  # in a folder: its name
LEASE = 60.0  # seconds without a sign after which an owner counts as dead
RENEWALS = 4  # in that time
CLOCKS = 300.0  # seconds that the clocks of two hosts may be apart
TRIES = 4  # at one change, where somebody was faster
PLACE = re.compile(r"(0|[1-9]\d*)-([0-9a-f]{16})")

Content = dict[str, Any]


class LostError(CheckpointError):
    """Another run has taken the lease."""


def place_of(step: int, sealed: bytes) -> str:
    """Where the files of a step lie: of one content in one place, whoever writes and however often."""
    return f"{step}-{hashlib.sha256(sealed).hexdigest()[:16]}"


def read(store: Store) -> tuple[Content, bytes]:
    """The head and its generation. Where it is missing or damaged, one made of the manifests that are there.

    Raises:
        StoreError: no answer. CheckpointError: written by a newer shardtrain.
    """
    data, generation = store.read(NAME)
    if data is not None:
        try:
            content = manifest.unseal(data.decode())
        except ValueError:
            content = {}
        if content.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{NAME} of format {content['format']} is newer than this shardtrain, which reads up to {FORMAT}",
                where=store.url,
                fix="upgrade shardtrain",
            )
        if content.get("format") == FORMAT:
            return content, generation
    places = [key.partition("/")[0] for key in store.names() if key.endswith(f"/{folder.MANIFEST}")]
    steps = {p.partition("-")[0]: {"place": p} for p in sorted(places) if PLACE.fullmatch(p)}
    if data is not None or steps:
        what = "missing" if data is None else "damaged"
        said = ", ".join(steps) or "none"
        log.error("%s: %s is %s; its steps are those with a manifest: %s", store.url, NAME, what, said)
    return {"format": FORMAT, "serial": 0, "owner": None, "steps": steps, "aside": {}}, generation


class Lease:
    """The right to write in a store, and the head as it is as long as we have it. A thread renews it.

    Raises:
        CheckpointError: another run has it, with its host, process and since when. StoreError: no answer.
    """

    def __init__(self, store: Store, path: Path):
        self._store = store
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.lost = ""  # to whom
        self.owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run": uuid.uuid4().hex[:8],
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "folder": _name(path),
        }
        self.content: Content = {}
        self._generation: bytes | None = None
        while self._generation is None:
            content, generation = wait_for(store, self.owner["folder"])
            self._write({**content, "owner": self.owner}, generation)
        self._thread: threading.Thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """What is committed there, by step."""
        return {int(step): entry for step, entry in self.content["steps"].items()}

    def change(self, action: Callable[[Content], None]) -> None:
        """Apply `action` to the head. It may be applied again, to what a lost answer had left.

        Raises:
            LostError: another run has the lease. StoreError: no answer; it may have been done.
        """
        with self._lock:
            for _ in range(TRIES):
                if self.lost:
                    raise LostError(
                        f"taken over by another run: {self.lost}",
                        where=self._store.url,
                        fix="stop one of the two, or give this one another URL",
                    )
                if self._generation is None:
                    self._look()
                    continue
                content = json.loads(json.dumps(self.content))
                action(content)
                generation, self._generation = self._generation, None  # not known until the answer is here
                if self._write(content, generation):
                    return
            raise StoreError(f"{NAME} changes too often")

    def _look(self) -> None:
        content, generation = read(self._store)
        owner = content["owner"]
        if owner is None or owner["run"] != self.owner["run"]:
            self.lost = who(owner) if owner else "it was let go"
        else:
            self.content, self._generation = content, generation

    def _write(self, content: Content, generation: bytes) -> bool:
        owner = content["owner"] and {**content["owner"], "renewed": time.time()}
        content |= {
            "owner": owner,
            "serial": content["serial"] + 1,
        }  # never the same twice: an ETag is a digest
        written = self._store.replace(NAME, manifest.seal(content).encode(), generation)
        if written is not None:
            self.content, self._generation = content, written
        return written is not None

    def _renew(self) -> None:
        while not self._stop.wait(LEASE / RENEWALS):
            try:
                self.change(lambda _: None)
            except StoreError as error:
                log.info(
                    "%s: not renewed: %s", self._store.url, error
                )  # the next time, or at the next commit
            except LostError as error:
                log.error("nothing more goes to %s", error)
                return

    def release(self) -> None:
        """Let others in at once."""
        self._stop.set()
        self._thread.join()
        if not self.lost:
            try:
                self.change(lambda content: content.update(owner=None))
            except (StoreError, LostError) as error:
                log.warning(
                    "%s: not released, so another host waits %.0f s: %s", self._store.url, LEASE, error
                )


def wait_for(store: Store, folder_name: str = "") -> tuple[Content, bytes]:
    """The head, once nobody has the lease: let go, of a dead run of this very folder, or without a sign for long.

    Raises:
        CheckpointError: a run that lives has it.
    """
    first: bytes | None = None
    until = 0.0
    while True:
        content, generation = read(store)
        owner = content["owner"]
        free = owner is None or (folder_name and owner["folder"] == folder_name)
        if free or time.time() - owner["renewed"] > LEASE + CLOCKS:
            return content, generation
        if first is None:
            first, until = generation, time.monotonic() + LEASE
            log.warning("%s: held by %s; waiting up to %.0f s for a sign of it", store.url, who(owner), LEASE)
        if generation != first:
            raise CheckpointError(
                f"in use by another run: {who(owner)}",
                where=store.url,
                why="two writers in one store would mix their checkpoints",
                fix="wait for it or stop it, or give this run another URL",
            )
        if time.monotonic() >= until:
            log.warning("%s: no sign of %s, so it is taken over", store.url, who(owner))
            return content, generation
        time.sleep(min(1.0, LEASE / RENEWALS / 4))


def who(owner: dict[str, Any]) -> str:
    return f"host {owner['host']}, process {owner['pid']}, run {owner['run']}, since {owner['since']}"


def known_name(path: Path) -> str:
    """Of a folder on this machine, and of no copy of it; empty for a new one. Who has the folder's lock knows that an
    owner of this name is dead."""
    try:
        known = (path / NAMED).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return f"{known} {socket.gethostname()}:{path}"


def _name(path: Path) -> str:
    if not known_name(path):
        folder.write_synced(path / NAMED, uuid.uuid4().hex)
    return known_name(path)
