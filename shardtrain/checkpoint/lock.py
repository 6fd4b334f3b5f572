"""One writer per folder: a lock that the kernel lets go of when its process dies, and that names who has it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import agreement
from shardtrain.errors import CheckpointError

log = logging.getLogger("shardtrain")
NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """The lock of a folder, held. On several processes process 0 holds it for all. Readers never ask for it."""

    def __init__(self, path: Path):
        """Take it.

        Raises:
            CheckpointError: another run has it, with host, process, run and since when.
        """
        self._descriptor: int | None = None
        self._descriptor = _take(path / NAME)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run": uuid.uuid4().hex[:8],
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Let go; the file stays, empty."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self.forget()

    def forget(self) -> None:
        """Close it, as a process that was forked off must: it would keep the lock for a parent that died."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.forget()


def refuse_if_held(path: Path) -> None:
    """Raise now what taking the lock would, before work is done for nothing; makes nothing, and lets go at once.
    All processes of a run call it together.

    Raises:
        CheckpointError: another run has it.
    """

    def look() -> None:
        if (path / NAME).is_file():
            with contextlib.suppress(OSError):  # whether it can be written is for others to say
                os.close(_take(path / NAME))

    agreement.on_first(look)


def _take(file: Path) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            log.warning("%s: this file system has no locks, so nothing keeps a second run out", file.parent)
            return descriptor
        owner = _owner(descriptor)
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise CheckpointError(
            f"in use by another run: {owner}",
            where=str(file.parent),
            why="two writers in one folder would mix their checkpoints",
            fix="wait for it or stop it, or give this run another folder",
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _owner(descriptor: int) -> str:
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        here = (
            " (this process)" if found["pid"] == os.getpid() and found["host"] == socket.gethostname() else ""
        )
        return (
            f"host {found['host']}, process {found['pid']}{here}, run {found['run']}, since {found['since']}"
        )
    except (ValueError, KeyError, TypeError):
        return "who is it is not written yet"


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
