"""Faults of storage on purpose: what `--inject corrupt` and `disk-full` do to a Checkpointer."""

from __future__ import annotations

import errno
import os

from shardtrain.checkpoint import folder
from shardtrain.checkpoint.checkpointer import Checkpointer
from shardtrain.errors import ConfigError


def corrupt(checkpointer: Checkpointer) -> None:
    """Flip a bit in the middle of the largest array file of the newest step, once the save under way is on disk.

    Raises:
        ConfigError: no step is there yet.
    """
    checkpointer.wait()
    newest = checkpointer.latest_step()
    if newest is None:
        raise ConfigError("no step is committed yet", where="--inject corrupt", fix="a later step=")
    place = folder.step_folder(checkpointer.path, newest) / folder.ARRAYS
    sizes = folder.files(place)
    with open(place / max(sizes, key=lambda name: sizes[name]), "r+b") as stream:
        stream.seek(max(sizes.values()) // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def fill_disk(checkpointer: Checkpointer, saves: int | None) -> None:
    """The next so many saves (None: all) find no space on the device; the one under way had some."""
    checkpointer.wait()
    left = saves

    def full() -> None:
        nonlocal left
        if left is None or left > 0:
            left = None if left is None else left - 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer.fault = full
