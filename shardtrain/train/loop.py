"""The loop: dispatch step n, then read the metrics of step n-1, while n runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax

from shardtrain.errors import CheckpointError, RunError
from shardtrain.train.guard import Verdicts
from shardtrain.train.hooks import Hook
from shardtrain.train.replicas import Replicas

log = logging.getLogger("shardtrain")
Stopped = Literal["done", "interrupted", "preempted", "data ended"]
AHEAD = 2  # batches on the device beyond the one in use
FAILED_SAVES = 5  # in a row; then the run stops, since what it does is lost when it stops


class Checkpoints(Protocol):
    """What the loop asks of a checkpointer."""

    every: int | None

    def save(self, state: Any, *, step: int | None = None, force: bool = False) -> bool: ...

    def wait(self) -> None:
        """Until what was saved is on disk."""

    @property
    def preempted(self) -> bool: ...


class Meter(Protocol):
    """What the loop asks of a throughput meter."""

    def start(self) -> None: ...

    def step(self, tokens: float) -> float: ...

    @property
    def tokens_per_second(self) -> float | None: ...

    @property
    def mfu(self) -> float | None: ...

    def seconds_left(self, steps: int) -> float | None: ...


class Watch(Protocol):
    """What the loop tells of where it is (`shardtrain.watch`)."""

    def phase(self, name: str, step: int, hidden: bool = False) -> None: ...


class Display(Protocol):
    """What the loop asks of a progress bar."""

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float | None,
        mfu: float | None,
        seconds_left: float | None = None,
    ) -> None: ...

    def say(self, line: str) -> None: ...


@dataclasses.dataclass
class LoopResult:
    """`history`: one dict a step; `evaluations`: one dict an evaluation, with `step` and `loss`."""

    state: Any
    step: int
    stopped: Stopped
    history: list[dict[str, float]]
    evaluations: list[dict[str, float]]


def run_loop(
    state: Any,
    batches: Iterator[Any],
    *,
    step_function: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    put: Callable[[Any], Any],
    first_step: int,
    steps: int,
    meter: Meter,
    display: Display,
    writers: Sequence[Any] = (),
    hooks: Sequence[Hook] = (),
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    eval_batches: Callable[[], Iterable[Any]] | None = None,
    eval_every: int = 0,
    last_evaluated: int = -1,
    on_nonfinite: Literal["stop", "continue"] = "stop",
    watch: Watch | None = None,
    verdicts: Verdicts | None = None,
    replicas: Replicas | None = None,
) -> LoopResult:
    """Train from `first_step` to `steps`.

    Args:
        state: is donated to the step; the one in the result replaces it.
        batches: this process's rows, from the state's cursor on.
        step_function: `(state, device batch) -> (state, metrics on device)`; returns without waiting.
        put: rows to devices, without waiting.
        evaluate, eval_batches: `(state, device batch) -> {"loss_sum", "loss_weight", ...}` on devices, and
            the held-out rows; every `eval_every` steps and at the end.
        last_evaluated: step of an evaluation that a resumed run has already.
        on_nonfinite: "continue" leaves a loss that is no number to the hooks, and saves what there is.
        watch: is told every phase: data, dispatch, wait, hooks, evaluate, save.
        verdicts: of a step that has a guard; skipped steps are its own.
        replicas: compared every so many steps and before saves that are due or the last.

    The first Ctrl-C or SIGTERM ends the step under way, saves and returns; a second one during the
    save is ignored with a line; a third leaves at once. On several processes the wish of one is
    agreed by all through the checkpointer; without one, signals do what they always do.

    Nothing crosses between host and device but through `put` and `jax.device_get`: it runs under
    `jax.transfer_guard("disallow")`.

    Raises:
        Rewind: the guard's. RunError: the loss or the parameters are not finite. Such a state is not saved, except by a
            preemption that several processes agreed on at that very step. Or saves fail, several in a row or the
            last; one that fails alone is told and tried again, as are metrics that cannot be written.
    """
    result = LoopResult(state, first_step, "done", [], [])
    waiting: deque[Any] = deque()  # batches put ahead
    pending: tuple[int, dict[str, Any], Any] | None = None  # metrics and checksums not read yet
    newest: dict[str, Any] = {}  # of the step dispatched last
    unwritten: list[int] = []  # steps whose metrics could not be
    failed, begun = 0, False  # saves in a row that failed; whether one has begun since

    def at(phase: str, number: int, hidden: bool = False) -> None:
        if watch is not None:
            watch.phase(phase, number, hidden)

    def busy() -> bool:
        """The devices work: what the host does meanwhile costs nothing. Outputs of a program are ready together."""
        return watch is not None and bool(newest) and not next(iter(newest.values())).is_ready()

    def fill() -> None:
        while len(waiting) <= AHEAD and first_step + taken + len(waiting) < steps:
            try:
                waiting.append(put(next(batches)))
            except StopIteration:
                break

    def write(number: int, metrics: dict[str, float], kind: str = "train") -> None:
        for writer in writers:
            try:
                writer.write(number, metrics, kind)
            except OSError as error:  # a full disk is no reason to stop training
                if not unwritten:
                    display.say(f"step {number}: metrics not written: {error}")
                    log.warning("step %d: metrics not written: %s", number, error)
                unwritten.append(number)
                with contextlib.suppress(OSError):
                    writer.close()  # a line that was cut off: opened again, it begins a new one

    def read() -> None:
        """Wait for the metrics of the step before the one that runs now."""
        nonlocal pending
        if pending is None:
            return
        number, device_metrics, checksums = pending
        at("wait", number, busy())
        pending = None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        at("hooks", number)
        metrics["step_seconds"] = meter.step(metrics.get("tokens", 0.0))
        result.history.append({"step": number, **metrics})
        write(number, metrics)
        left = meter.seconds_left(steps - number)
        display.update(number, metrics["loss"], meter.tokens_per_second, meter.mfu, left)
        for hook in hooks:
            hook.on_step(number, metrics)
        if replicas is not None and checksums is not None:
            replicas.judge(number, checksums)  # first: a flipped bit is often why a loss is none
        leaving = signals.alone or result.stopped in ("interrupted", "preempted")
        skipped = verdicts is not None and verdicts.skipped(number, metrics, rewinds=not leaving)
        if on_nonfinite == "stop" and not skipped:
            _require_finite(number, metrics, result.history)

    def evaluation(number: int) -> None:
        read()
        if (
            evaluate is None
            or eval_batches is None
            or (result.evaluations[-1:] and result.evaluations[-1]["step"] == number)
        ):
            return
        at("evaluate", number)
        totals: dict[str, Any] | None = None
        running: deque[Any] = deque()  # sums not waited for: batches must not pile up on the device
        for batch in eval_batches():
            at("evaluate", number)
            sums = dict(evaluate(result.state, put(batch)))
            totals = sums if totals is None else jax.tree.map(_add, totals, sums)
            running.append(sums)
            if len(running) > AHEAD:
                jax.block_until_ready(running.popleft())
        if totals is None:
            return
        values = {name: float(value) for name, value in jax.device_get(totals).items()}
        names = [n.removesuffix("_sum") for n in values if n.endswith("_sum")]
        metrics = {n: values[f"{n}_sum"] / values[f"{n}_weight"] for n in names if values[f"{n}_weight"]}
        result.evaluations.append({"step": number, **metrics})
        write(number, metrics, "eval")
        for hook in hooks:
            hook.on_evaluate(number, metrics)
        display.say(f"step {number}: held-out loss {metrics.get('loss', math.nan):.4f}")
        meter.start()

    def is_due(number: int) -> bool:
        return bool(checkpoints is not None and checkpoints.every and number % checkpoints.every == 0)

    def save(number: int, force: bool = False) -> None:
        if checkpoints is None:
            return
        if force or signals.alone or is_due(number):
            read()  # a save waits for this step anyway; one that gave no number must not be kept
        nonlocal failed, begun
        at("save", number)
        try:
            if checkpoints.save(result.state, step=number, force=force):
                meter.start()
                failed = 0 if begun else failed  # a save is known to be good when the next begins
                begun = True
            if force:
                checkpoints.wait()  # here, where a second Ctrl-C cannot cut it
        except CheckpointError as error:
            failed, begun = failed + 1, False
            log.warning("step %d: %s", number, error)  # training goes on; the next save tries again
            display.say(f"step {number}: not saved: {error}")
            if force or failed == FAILED_SAVES:
                what = "the last save failed" if force else f"{failed} saves in a row failed"
                raise RunError(
                    f"{what}: {error.message}", where=error.where, why=error.why, fix=error.fix
                ) from error

    taken = 0
    with _Signals(display.say, agreed=checkpoints is not None) as signals:
        for hook in hooks:
            hook.on_start(first_step, state)
        meter.start()
        for number in range(first_step + 1, steps + 1):
            at("data", number)
            fill()
            if not waiting:
                result.stopped = "data ended"
                break
            at("dispatch", number, busy())
            result.state, metrics = step_function(result.state, waiting.popleft())
            newest = metrics
            result.step, taken = number, taken + 1
            at("data", number + 1)
            fill()
            read()
            compares = replicas is not None and (number % replicas.every == 0 or is_due(number))
            pending = number, metrics, replicas.start(result.state) if replicas and compares else None
            save(number)
            due = eval_every and number % eval_every == 0 and number != last_evaluated
            if due and number < steps:
                evaluation(number)
            agreed = checkpoints is not None and checkpoints.preempted  # all processes ask at every step
            if agreed or signals.alone:
                result.stopped = "interrupted" if signals.caught == signal.SIGINT else "preempted"
                break
        read()
        if result.stopped in ("done", "data ended") and last_evaluated != result.step:
            evaluation(result.step)
        for hook in hooks:
            hook.on_end(result.step, result.state)
        if result.step > first_step:
            if replicas is not None:
                replicas.judge(result.step, replicas.start(result.state))
            save(result.step, force=True)
    if unwritten:
        display.say(f"{len(unwritten)} rows of metrics could not be written, from step {unwritten[0]} on")
    return result


@jax.jit
def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + b


def _require_finite(
    number: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]
) -> None:
    bad = [name for name in ("loss", "param_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not bad:
        return
    last = next((h for h in reversed(history) if math.isfinite(h["loss"])), None)
    before = f"{last['loss']:.4f} at step {last['step']}" if last else "none"
    raise RunError(
        f"the {'loss' if bad[0] == 'loss' else 'norm of the parameters'} is {metrics[bad[0]]}",
        where=f"step {number}",
        why=f"last finite loss: {before}; gradient norm {metrics.get('grad_norm')}",
        fix="a lower learning rate, clipping, or --precision f32; checkpoints from before are kept",
    )


class _Signals(contextlib.AbstractContextManager["_Signals"]):
    """Ctrl-C and SIGTERM become a wish, in the main thread; old handlers come back on leaving.

    On several processes JAX's own notifier has SIGTERM, and all of them stop after one step: there a
    Ctrl-C is passed on as SIGTERM. Leaving alone would hang the others in their next collective.

    Args:
        agreed: somebody asks JAX's notifier. On several processes nothing is caught without.
    """

    def __init__(self, say: Callable[[str], None], *, agreed: bool):
        self.caught = 0
        self._count = 0
        self._say = say
        self._agreed = agreed
        self._single = jax.process_count() == 1
        self._old: dict[int, Any] = {}

    @property
    def alone(self) -> bool:
        """This process was asked, and no other has to agree."""
        return bool(self.caught) and self._single

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread() and (self._single or self._agreed):
            for number in [signal.SIGINT, signal.SIGTERM] if self._single else [signal.SIGINT]:
                self._old[number] = signal.signal(number, self._catch)
            earlier = max((getattr(old, "caught", 0) for old in self._old.values()), default=0)
            if earlier:  # an outer handler was asked, and could not leave
                self._catch(earlier, None)
        return self

    def _catch(self, number: int, _: Any) -> None:
        self._count += 1
        self.caught = self.caught or number
        if self._count == 1:
            if not self._single:
                os.kill(os.getpid(), signal.SIGTERM)
            self._tell(f"{signal.Signals(number).name}: finishing the step, saving, leaving")
        elif self._count == 2:
            self._tell("still finishing or saving; once more leaves at once and may lose the save")
        else:
            os._exit(128 + number)

    def _tell(self, line: str) -> None:
        # the signal may have come in the middle of a write to the same stream
        with contextlib.suppress(RuntimeError):
            self._say(line)

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            # None: it was set by C code, and Python cannot put it back
            signal.signal(number, signal.SIG_DFL if old is None else old)
