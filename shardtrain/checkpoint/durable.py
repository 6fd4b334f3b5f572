"""The durable tier: steps of a fast folder, copied to an object store behind the run's back.

A save is what it is without: committed in the folder. Then the step is sent to the store and committed there, while
training goes on; a store that fails costs what it could not keep, and never the run. A start brings back what the store has
and the folder has not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import agreement, folder, head, transfer
from shardtrain.checkpoint.store import Store, StoreError, refusal
from shardtrain.errors import CheckpointError

log = logging.getLogger("shardtrain")


class Durable:
    """A store beside the folder of a Checkpointer. What is said to be done together, all processes do together.

    Args:
        keep, keep_every: as of the Checkpointer, for the steps in the store.
    """

    def __init__(self, url: str, path: Path, keep: int | None, keep_every: int | None):
        self.store = Store(url)
        self._path, self._keep, self._keep_every = path, keep, keep_every
        self._lease: head.Lease | None = None  # on process 0
        self._lock = threading.Lock()
        self._queue: list[int] = []  # the first is on its way
        self._thread: threading.Thread | None = None
        self._origin: int | None = None  # the step whose future is being written
        self._made: set[int] = set()  # what this run has committed there since
        self._behind = ""  # since when the newest step is not there
        self.closed = True

    @property
    def newest(self) -> int | None:
        """The newest step there; on process 0, which has the lease."""
        return max(self._lease.steps, default=None) if self._lease else None

    def open(self) -> None:
        """Take the lease. Together.

        Raises:
            CheckpointError: another run has it, or the store refuses us. RunError: no answer.
        """

        def take() -> head.Lease:
            try:
                return head.Lease(self.store, self._path)
            except StoreError as error:
                raise refusal(self.store.url, error) from error

        self._lease = agreement.on_first(take)
        self.closed = False

    def fetch(self, above: int | None) -> int | None:
        """Bring the newest step there that is intact, if it is newer than `above`, to `.saving`, checked and whole. Together.

        A damaged one is passed over with a line, and noted as set aside; its files stay.

        Returns:
            The step, to be published; None where the store has none.

        Raises:
            RunError, CheckpointError: it cannot be read, or not be written here; or none there is intact, nor any here.
        """
        damaged: dict[int, str] = {}
        while True:
            steps = self._lease.steps if self._lease else {}
            newer = [s for s in steps if s not in damaged and (above is None or s > above)]
            step = agreement.number(max(newer, default=-1))
            if step < 0:
                break
            there = agreement.text(steps[step]["place"] if steps else "")
            log.warning("bringing step %d from %s", step, self.store.url)
            if not (why := self._bring(step, there)):
                break
            log.error("checkpoint %s/%s is damaged and passed over: %s", self.store.url, there, why)
            damaged[step] = why
        if step < 0 and above is None and damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in the store is intact, and there is none here",
                where=self.store.url,
                why="\n  ".join(f"step {number}: {why}" for number, why in damaged.items()),
                fix="another URL, to begin anew",
            )
        if damaged:
            agreement.on_first(lambda: self._set_aside(damaged))
        return None if step < 0 else step

    def _bring(self, step: int, there: str) -> str:
        """What is wrong with the step there; empty when it is here."""
        place = folder.saving_folder(self._path, step)
        stopped: StoreError | None = None
        bad, full = "", ""
        try:
            sealed, content = transfer.fetch_manifest(self.store, step, there)
            place.mkdir(parents=True, exist_ok=True)
            transfer.fetch(
                self.store, there, content, place, part=jax.process_index(), of=jax.process_count()
            )
        except StoreError as error:
            stopped = error
        except ValueError as error:
            bad = str(error)
        except OSError as error:
            full = str(error)
        if told := agreement.complaint(str(stopped or "")):
            raise refusal(self.store.url, stopped or StoreError(told))
        if told := agreement.complaint(full):
            folder.discard(self._path, step)
            raise CheckpointError(
                f"step {step} of the store cannot be written here",
                where=str(self._path),
                why=told,
                fix="free space on that file system, or another folder",
            )
        if told := agreement.complaint(bad):
            folder.discard(self._path, step)
            return told
        agreement.on_first(lambda: transfer.finish(place, content, sealed))
        return ""

    def _set_aside(self, steps: Iterable[int]) -> None:
        assert self._lease is not None

        def move(content: head.Content) -> None:
            for step in steps:
                if (entry := content["steps"].pop(str(step), None)) is not None:
                    content["aside"][entry["place"]] = entry

        try:
            self._lease.change(move)
        except StoreError as error:
            raise refusal(self.store.url, error) from error

    def refuse_older(self, step: int, origin: int | None) -> None:
        """Raise where the store is further than a run that did not come from there. Together.

        Raises:
            CheckpointError: so it is.
        """
        newest = agreement.number(-1 if self.newest is None else self.newest)
        if origin is None and newest > step:
            raise CheckpointError(
                f"the store holds step {newest}, and this run is at step {step}",
                where=self.store.url,
                why="the next start would resume the other run",
                fix="restore_or_init goes on from there; or give this run a URL of its own",
            )

    def goes_on(self, step: int) -> None:
        """The run goes on from this step of the folder, which goes to the store if it is newer. Together."""
        self._origin, self._made = step, set()
        self.offer(step)

    def offer(self, step: int) -> None:
        """Send a step of the folder, unless the store has it or a newer one. Together."""
        newest = self.newest
        if agreement.number(int(self._lease is not None and (newest is None or newest < step))):
            self.put(step)

    def takes(self, last: bool) -> bool:
        """Will the step that is about to be saved go there? Not while another is on its way, unless it may be the last: a
        slow store gets fewer steps, and the last one when it is offered. Together."""
        ready = self._lease is not None and not self._lease.lost and (last or not self._queue)
        return bool(agreement.number(int(ready)))

    def put(self, step: int) -> None:
        """Send a step that is committed in the folder, in the background."""
        with self._lock:
            if step in self._queue:
                return
            self._queue.append(step)
            if len(self._queue) == 1:
                self._thread = threading.Thread(target=self._send_all, name="durable", daemon=True)
                self._thread.start()

    def sending(self) -> set[int]:
        """Steps that the folder must keep for now."""
        return set(self._queue)

    def _send_all(self) -> None:
        while True:
            self._send(self._queue[0])
            with self._lock:
                self._queue.pop(0)
                if not self._queue:
                    return

    def _send(self, step: int) -> None:
        started = time.strftime("%H:%M:%S", time.gmtime())
        try:
            entry = transfer.upload(
                self.store,
                self._path,
                step,
                process=jax.process_index(),
                processes=jax.process_count(),
                wanted=lambda: not (self._lease and self._lease.lost),
            )
            if entry is not None:
                self._commit(step, entry)
                self._behind = ""
        except Exception as error:
            self._behind = self._behind or started
            newest = f"step {self.newest}" if self.newest is not None else "none"
            log.warning(
                "step %d is in %s alone, not in %s: %s; newest there: %s, since %s UTC; %s",
                *(step, self._path, self.store.url, str(error).splitlines()[0], newest, self._behind),
                "another run has it" if self._lease and self._lease.lost else "the next save tries again",
            )

    def _commit(self, step: int, entry: dict[str, Any]) -> None:
        assert self._lease is not None

        def name(content: head.Content) -> None:
            steps = content["steps"]
            abandoned = [s for s in map(int, steps) if self._origin is not None and s > self._origin]
            for old in set(abandoned) - self._made:
                del steps[str(old)]
            steps[str(step)] = entry
            if self._keep is not None:
                for old in sorted(map(int, steps))[: -self._keep]:
                    if not self._keep_every or old % self._keep_every:
                        del steps[str(old)]

        self._lease.change(name)
        self._made.add(step)
        log.info("step %d is in %s", step, self.store.url)
        try:
            transfer.remove_unnamed(self.store, self._lease.content, step, [entry["place"]])
        except StoreError as error:
            log.warning("%s: old steps could not be removed: %s", self.store.url, error)  # at the next commit

    def close(self) -> None:
        """Wait for what is on its way, and let others in."""
        if self.closed:
            return
        self.closed = True
        try:
            if (thread := self._thread) is not None and thread.is_alive():
                thread.join(2)
                if thread.is_alive():
                    log.warning(
                        "waiting until step %d is in %s", max(self.sending(), default=0), self.store.url
                    )
                    thread.join()
        finally:
            if self._lease is not None:
                self._lease.release()
