"""The Checkpointer: when to save, one save at a time, and what happened to it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np

from shardtrain.checkpoint import agreement, commit, folder, intact, manifest
from shardtrain.checkpoint.durable import Durable
from shardtrain.checkpoint.lock import Lock
from shardtrain.checkpoint.preemption import Preemption
from shardtrain.checkpoint.restore import Plan, choose, read_state
from shardtrain.errors import CheckpointError, first_line

log = logging.getLogger("shardtrain")


class State(Protocol):
    """A registered pytree of arrays with these two among its fields."""

    step: Any
    cursor: Any


class Checkpointer:
    """Writes the state of a run to a folder, step by step, and reads it back onto any mesh.

    Use it as a context manager, and call `save` after every step: most calls only count. Leaving the block
    waits until everything is on disk. One run (on one process or several) writes in a folder at a time, and a
    second is refused with the name of the first; to read beside it use `shardtrain.checkpoint.restore`, `list_steps` and `inspect`.

    Args:
        path: the folder, made if missing; on several processes one that all of them see.
        every: save when the step is a multiple of this; None saves only when forced or preempted.
        keep: how many of the newest steps to keep; None keeps all.
        keep_every: also keep every step that is a multiple of this.
        durable: URL of a folder in an object store (`gs://BUCKET/FOLDER`, `s3://BUCKET/FOLDER`), where every step is copied
            once it is on disk, and where a start takes what `path` has not. One run has it at a time, too.
        config: JSON-able, written beside every checkpoint.

    Raises:
        CheckpointError: the folder cannot be written, or `config` is no JSON; on entering, it or the store is another
            run's. RunError: on entering, the store does not answer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep: int | None = 2,
        keep_every: int | None = None,
        durable: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        for name, value in (("every", every), ("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise CheckpointError(f"{name} is {value}", where=name, fix="give 1 or more, or None")
        manifest.to_json(config or {}, where="config")
        self.path = folder.local(path)
        self.every, self.keep, self.keep_every, self.config = every, keep, keep_every, config
        self.restored: dict[str, Any] | None = None  # manifest of the step that restore read
        self._durable = Durable(durable, self.path, keep, keep_every) if durable else None
        folder.claim(self.path)
        self._preemption = Preemption()
        self._preempted = self._answered = False  # what the last save() was told; whether it was read since
        self._lock: Lock | None = None
        self._opened = self._checked = self._warned = False
        self._plan: dict[str, Any] = {}
        self._count: int | None = None  # the step on the host, so that no call waits for the device
        self._origin: int | None = None  # the step whose future this run is writing
        self._superseded: list[int] = []  # steps of a future that was abandoned
        self._begun: int | None = None  # this run's newest step on disk or on its way
        self._committed: int | None = None  # this run's newest step on disk
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.fault: Callable[[], None] | None = None  # raises inside every save, see `faults`

    def __enter__(self) -> Self:
        self._open()
        self._preemption.install()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"and a checkpoint was not written: {failure}")
        finally:
            self._preemption.remove()  # last: a SIGTERM now must not cut the save that it asked for

    def restore_or_init(self, plan: Plan, seed: int = 0) -> Any:
        """The newest intact state in the folder, in the plan's shardings; `plan.init(seed)` if there is none.

        Every byte is checked. A damaged step is passed over with a line that says which file and why, and moved
        to `STEP.damaged`, where nothing removes it.

        Raises:
            CheckpointError: as `restore`; or there are steps, and none is intact.
        """
        self.wait()
        self._open()
        newest, damaged = intact.found(self.path)
        brought = self._durable.fetch(newest) if self._durable else None
        newest = newest if brought is None else brought
        if newest is None and damaged:
            intact.refuse(self.path, damaged)
        for step, why in damaged.items():
            aside = folder.set_aside(self.path, step) if jax.process_index() == 0 else self.path
            log.error(
                "checkpoint %s/%d is damaged: %s; going on from step %d, the newest that is intact; moved to %s",
                *(self.path, step, why, newest, aside.name),
            )
        if brought is not None:
            agreement.on_first(lambda: folder.publish(self.path, brought))
        if newest is None:
            self._plan = plan.describe()
            self._count, self._checked = 0, False
            return plan.init(seed)
        return self._restore(plan, newest, None, seed)

    def restore(
        self, plan: Plan, step: int | None = None, *, parts: Collection[str] | None = None, seed: int = 0
    ) -> Any:
        """A state from the folder; see `shardtrain.checkpoint.restore`.

        After restoring an older step whole, the newer ones are removed when the next save is on disk: the
        run that goes on from here replaces them.
        """
        self.wait()
        return self._restore(plan, choose(self.path, step), parts, seed)

    def _restore(self, plan: Plan, step: int, parts: Collection[str] | None, seed: int) -> Any:
        state, self.restored = read_state(self.path, plan, step, parts, seed)
        self._plan = plan.describe()
        groups = self.restored.get("groups"), self._plan.get("groups")
        if None not in groups and groups[0] != groups[1]:
            warnings.warn(
                f"{self.path}: the run has {groups[0]} groups and this plan {groups[1]}, so dropout and batch "
                f"statistics go on differently; st.plan(groups={groups[0]}) keeps them",
                stacklevel=4,
            )
        self._checked = False
        self._count = self._origin = self._begun = self._committed = None
        if parts is None:
            self._count = self._origin = self._begun = self._committed = self.restored["step"]
            if self._durable is not None:
                self._durable.goes_on(self.restored["step"])
        return state

    def save(
        self,
        state: State,
        *,
        step: int | None = None,
        force: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save if the step is due, if forced, or if the run was asked to stop and it is not saved yet.

        The step is counted on the host: one call, one step. A loop that calls `save` at other intervals
        passes `step=`. Only when a save begins is `state.step` itself read, and names it. The call then
        waits for the previous save to be on disk and for the state to be computed and copied from the
        device; writing goes on in the background, and the state may be donated at once.

        Args:
            state: the state after the step.
            step: its number, where the caller knows it.
            force: save even if it is not due. Nothing is written twice.
            extra: small JSON to keep beside the state; `restored["extra"]` has it after a restore.

        Returns:
            True if a save began. On several processes, all call this together.

        Raises:
            CheckpointError: the previous save failed (its leftovers are gone, older steps untouched;
                training may go on, and the next save that is due tries again), or the folder holds the
                steps of another run. Several processes learn of a failure at their own times, so all of them raise
                where the next save is due, in its place; a save that is forced is tried none the less.
        """
        if self._count is None and step is None:
            self._count = _step_of(state)  # waits for the device, once
        else:
            self._count = step if step is not None else (self._count or 0) + 1
        if not self._checked:
            self._check_folder()
        self._preempted, self._answered = self._preemption.asked(self._count), True
        force = force or self._preempted
        due = self.every is not None and self._count % self.every == 0
        if self._failure is not None and not force and jax.process_count() == 1:
            self.wait()
        return (due or force) and self._save(state, force, step is not None, extra)

    @property
    def preempted(self) -> bool:
        """True once the run was asked to stop (SIGTERM; on several processes at a step all agree on).

        The last `save` has asked, and saved if so, and this gives the same answer; read again before the
        next `save`, it asks anew.
        """
        if not self._answered:
            self._preempted = self._preemption.asked(self._count)
        self._answered = False
        return self._preempted

    def latest_step(self) -> int | None:
        """The newest step on disk; a save under way is not there yet."""
        return max(self.steps(), default=None)

    def durable_step(self) -> int | None:
        """The newest step in the store, on process 0 and as far as it knows."""
        return self._durable.newest if self._durable else None

    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return folder.steps(self.path)

    def wait(self) -> None:
        """Wait until the save under way is on disk.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._begun, self._checked = self._committed, False
            raise _not_written(self.path, failure) from failure

    def close(self) -> None:
        """Wait for the save under way, and for the store if there is one (bounded: one that fails is told and left), and
        let others write. Leaving the `with` block does this."""
        with contextlib.ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.release)
            if self._durable is not None:
                stack.callback(self._durable.close)
            self._opened = False
            self.wait()
            if self._durable is not None and self._committed is not None and jax.process_count() == 1:
                self._durable.offer(self._committed)  # several processes may not all have come here

    def _open(self) -> None:
        """Become the writer: take the lock, remove what a crash left, and load Orbax now rather than in a step."""
        if not self._opened:

            def take() -> Lock:
                lock = Lock(self.path)
                folder.purge(self.path)  # not before: it may be another run's save
                return lock

            self._lock = agreement.on_first(take)
            if self._durable is not None:
                try:
                    self._durable.open()
                except BaseException:
                    if self._lock is not None:
                        self._lock.release()
                    raise
            importlib.import_module("shardtrain.checkpoint.arrays")
            self._opened = True

    def _check_folder(self) -> None:
        newer = [step for step in self.steps() if self._origin is None or step > self._origin]
        if self._durable is not None:
            self._open()
            self._durable.refuse_older(self._count or 0, self._origin)
        if self._origin is None and newer and newer[-1] > (self._count or 0):
            raise CheckpointError(
                f"the folder holds step {newer[-1]}, and this run is at step {self._count}",
                where=str(self.path),
                why="the next start would resume the other run",
                fix="restore_or_init goes on from there; or give this run a folder of its own",
            )
        self._superseded = newer if self._origin is not None else []
        self._checked = True

    def _save(self, state: State, force: bool, told: bool, extra: Mapping[str, Any] | None) -> bool:
        step = _step_of(state)
        if step != self._count:
            if not (told or force or self._warned):
                self._warned = True
                warnings.warn(
                    f"save() counted step {self._count} and the state is at step {step}: call it once after "
                    "every step, or pass step=",
                    stacklevel=3,
                )
            self._count = step
            if not force and step % (self.every or 1):
                return False
        if step == self._begun and not force:
            return False
        self._settle(force)
        if not self._checked:  # the one that failed was to replace the steps of an abandoned future
            self._check_folder()
        if step == self._begun:
            if self._durable is not None:
                self._durable.offer(step)  # when it fell due, another was on its way
            return False
        content = manifest.describe(state, step, plan=self._plan, config=self.config, extra=extra)
        manifest.to_json(content, where="extra")
        self._open()
        from shardtrain.checkpoint import arrays

        place = folder.saving_folder(self.path, step)
        try:

            def make() -> None:
                # what failed may have been written to after it was discarded
                for left in folder.unfinished(self.path):
                    folder.discard(self.path, left)
                place.mkdir(parents=True)

            agreement.on_first(make)
        except OSError as error:
            raise _not_written(place, error) from error
        pending: Any
        try:
            pending = arrays.start(place / folder.ARRAYS, state)
        except OSError as error:  # told by the commit, where the others learn of it
            pending = error
        superseded, self._superseded = self._superseded, []
        self._begun = step
        sent = self._durable is not None and self._durable.takes(force)
        self._thread = threading.Thread(
            target=self._commit,
            args=(pending, step, content, superseded, f"commit-{next(_commits)}", sent),
            name=f"checkpoint-{step}",
        )
        self._thread.start()
        return True

    def _settle(self, force: bool) -> None:
        """Wait for the save under way. If it failed, on whichever process, all raise; before a last one they go on. Together."""
        failure: CheckpointError | None = None
        try:
            self.wait()
        except CheckpointError as error:
            failure = error
        told = agreement.complaint(str(failure or ""))
        self._checked = self._checked and not told
        if told and force:
            log.warning("%s", told)
        elif told:
            raise failure or CheckpointError("another process could not write its part", why=told)

    def _commit(
        self,
        pending: Any,
        step: int,
        content: dict[str, Any],
        superseded: list[int],
        meeting: str,
        sent: bool,
    ) -> None:
        """In the background: the step into place; then to the store, and old ones away."""
        try:
            commit.together(self.path, step, pending, content, superseded, meeting, self.fault)
        except Exception as error:
            self._failure = error
            return
        self._committed = step
        if sent and self._durable is not None:
            self._durable.put(step)
        if jax.process_index() == 0:
            self._retain(step)

    def _retain(self, step: int) -> None:
        """Only ever after a commit: `step`, just read back, is the good one that stays whatever the others are."""
        try:
            # what is damaged, or not ours, is neither counted nor removed
            whole = [
                s for s in self.steps() if s == step or not intact.problems_of(self.path, s, contents=False)
            ]
            needed = self._durable.sending() if self._durable else set()
            folder.retain(self.path, whole, self.keep, self.keep_every, needed)
        except (OSError, CheckpointError) as error:
            warnings.warn(f"old checkpoints could not be removed: {error}", stacklevel=1)


_commits = itertools.count()  # the same on every process, as saves are


def _step_of(state: State) -> int:
    return int(np.asarray(jax.device_get(state.step)))


def _not_written(path: Path, error: Exception) -> CheckpointError:
    full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return CheckpointError(
        "a checkpoint could not be written",
        where=str(path),
        why=first_line(error),
        fix="free space on that file system, or keep fewer steps" if full else "check the file system",
    )
