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
from shardtrain.train.hooks import Hook

log = logging.getLogger("shardtrain")
Stopped = Literal["done", "interrupted", "preempted", "data ended"]
AHEAD = 2  # batches on the device beyond the one in use


class Checkpoints(Protocol):
    """What the loop asks of a checkpointer."""

    def save(self, state: Any, *, step: int | None = None, force: bool = False) -> bool: ...

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


class Display(Protocol):
    """What the loop asks of a progress bar."""

    def update(self, step: int, loss: float, tokens_per_second: float | None, mfu: float | None) -> None: ...

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

    The first Ctrl-C or SIGTERM ends the step under way, saves and returns; a second one during the
    save is ignored with a line; a third leaves at once.

    Raises:
        RunError: the loss is not finite.
    """
    result = LoopResult(state, first_step, "done", [], [])
    waiting: deque[Any] = deque()  # batches put ahead
    pending: tuple[int, dict[str, Any]] | None = None  # metrics not read yet

    def fill() -> None:
        while len(waiting) <= AHEAD and first_step + taken + len(waiting) < steps:
            try:
                waiting.append(put(next(batches)))
            except StopIteration:
                break

    def read() -> None:
        """Wait for the metrics of the step before the one that runs now."""
        nonlocal pending
        if pending is None:
            return
        number, device_metrics = pending
        pending = None
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        metrics["step_seconds"] = meter.step(metrics.get("tokens", 0.0))
        result.history.append({"step": number, **metrics})
        for writer in writers:
            writer.write(number, metrics)
        display.update(number, metrics["loss"], meter.tokens_per_second, meter.mfu)
        for hook in hooks:
            hook.on_step(number, metrics)
        if not math.isfinite(metrics["loss"]):
            last = next((h["loss"] for h in reversed(result.history) if math.isfinite(h["loss"])), None)
            raise RunError(
                f"the loss is {metrics['loss']}",
                where=f"step {number}",
                why=f"last finite loss: {last}; gradient norm {metrics.get('grad_norm')}",
                fix="a lower learning rate, clipping, or --precision f32; the last checkpoint is kept",
            )

    def evaluation(number: int) -> None:
        read()
        if (
            evaluate is None
            or eval_batches is None
            or (result.evaluations[-1:] and result.evaluations[-1]["step"] == number)
        ):
            return
        totals: dict[str, Any] | None = None
        for batch in eval_batches():
            sums = evaluate(result.state, put(batch))
            totals = dict(sums) if totals is None else jax.tree.map(_add, totals, dict(sums))
        if totals is None:
            return
        values = {name: float(value) for name, value in jax.device_get(totals).items()}
        names = [n.removesuffix("_sum") for n in values if n.endswith("_sum")]
        metrics = {n: values[f"{n}_sum"] / values[f"{n}_weight"] for n in names if values[f"{n}_weight"]}
        result.evaluations.append({"step": number, **metrics})
        for writer in writers:
            writer.write(number, metrics, "eval")
        for hook in hooks:
            hook.on_evaluate(number, metrics)
        display.say(f"step {number}: held-out loss {metrics.get('loss', math.nan):.4f}")
        meter.start()

    def save(number: int, force: bool = False) -> None:
        if checkpoints is None:
            return
        try:
            checkpoints.save(result.state, step=number, force=force)
        except CheckpointError as error:
            if force:
                raise
            log.warning("step %d: %s", number, error)  # training goes on; the next save tries again
            display.say(f"step {number}: not saved: {error}")

    taken = 0
    with _Signals(display.say) as signals:
        for hook in hooks:
            hook.on_start(first_step, state)
        meter.start()
        for number in range(first_step + 1, steps + 1):
            fill()
            if not waiting:
                result.stopped = "data ended"
                break
            result.state, metrics = step_function(result.state, waiting.popleft())
            result.step, taken = number, taken + 1
            fill()
            read()
            pending = number, metrics
            save(number)
            due = eval_every and number % eval_every == 0 and number != last_evaluated
            if due and number < steps:
                evaluation(number)
            if signals.caught or (checkpoints is not None and checkpoints.preempted):
                result.stopped = "interrupted" if signals.caught == signal.SIGINT else "preempted"
                break
        read()
        if result.stopped in ("done", "data ended") and last_evaluated != result.step:
            evaluation(result.step)
        for hook in hooks:
            hook.on_end(result.step, result.state)
        if result.step > first_step:
            save(result.step, force=True)
    return result


@jax.jit
def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + b


class _Signals(contextlib.AbstractContextManager["_Signals"]):
    """Ctrl-C and SIGTERM become a wish, in the main thread; old handlers come back on leaving."""

    def __init__(self, say: Callable[[str], None]):
        self.caught = 0
        self._count = 0
        self._say = say
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            names = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            for number in names:  # on several processes JAX's own notifier has SIGTERM
                self._old[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, _: Any) -> None:
        self._count += 1
        self.caught = self.caught or number
        if self._count == 1:
            self._say(f"{signal.Signals(number).name}: finishing the step, saving, leaving")
        elif self._count == 2:
            self._say("still saving; once more leaves at once and may lose the save")
        else:
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
