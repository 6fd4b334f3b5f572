"""The loop with a tiny step: order of events, evaluation, signals, saves, numbers that are none."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain.errors import CheckpointError, ConfigError, RunError
from shardtrain.monitor import Progress, Throughput
from shardtrain.train import loop
from shardtrain.train.hooks import Hook, as_hook
from shardtrain.train.loop import run_loop


@functools.partial(jax.jit, donate_argnums=0)
def step(state: dict[str, jax.Array], batch: jax.Array) -> Any:
    total = state["total"] + batch.sum()
    metrics = {"loss": total, "param_norm": jnp.abs(total), "tokens": jnp.float32(batch.size), "mine": -total}
    return {"step": state["step"] + 1, "total": total}, metrics


@jax.jit
def evaluate(state: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    weight = batch["weight"]
    return {
        "loss_sum": (batch["x"] * weight).sum(),
        "loss_weight": weight.sum(),
        "accuracy_sum": state["total"] * 0 + 3.0,
        "accuracy_weight": jnp.float32(4.0),
    }


class Checkpoints:
    """Counts what it was asked."""

    def __init__(self, every: int | None = None):
        self.every = every
        self.saves: list[tuple[int, bool]] = []
        self.waits = 0
        self.preempted = False
        self.on_save: Any = None

    def save(self, state: Any, *, step: int | None = None, force: bool = False) -> bool:
        if not (force or (self.every and step % self.every == 0)) or step in [s for s, _ in self.saves]:
            return False
        assert int(jax.device_get(state["step"])) == step
        if self.on_save:
            self.on_save()
        self.saves.append((step, force))
        return True

    def wait(self) -> None:
        self.waits += 1


class Writer:
    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def write(self, number: int, metrics: dict[str, float], kind: str = "train") -> None:
        self.rows.append((kind, number, dict(metrics)))


def ones(count: int = 10**6) -> Iterator[np.ndarray]:
    return (np.ones(4, np.float32) for _ in range(count))


def go(steps: int = 6, *, first_step: int = 0, batches: Any = None, **options: Any) -> loop.LoopResult:
    state = jax.device_put({"step": np.int32(first_step), "total": np.float32(4 * first_step)})
    defaults = {"step_function": step, "put": jax.device_put, "meter": Throughput(None, None)}
    display = Progress(steps, enabled=False)
    return run_loop(
        state,
        ones() if batches is None else batches,
        first_step=first_step,
        steps=steps,
        display=display,
        **{**defaults, **options},
    )


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_every_step_reaches_history_and_writers():
    """Exact values, the user's own metric included. Failed once with rounded metrics."""
    writer = Writer()
    result = go(5, writers=[writer])
    assert (result.step, result.stopped) == (5, "done")
    assert [(h["step"], h["loss"], h["mine"], h["tokens"]) for h in result.history] == [
        (n, 4.0 * n, -4.0 * n, 4.0) for n in range(1, 6)
    ]
    assert [(kind, n, m["loss"]) for kind, n, m in writer.rows] == [
        ("train", n, 4.0 * n) for n in range(1, 6)
    ]
    assert all(type(v) is float for _, _, m in writer.rows for v in m.values())
    assert int(result.state["step"]) == 5


def test_resumes_at_its_step():
    """Failed once when it took `steps` more steps instead of going up to `steps`."""
    result = go(6, first_step=4)
    assert [h["loss"] for h in result.history] == [20.0, 24.0] and result.step == 6
    assert go(4, first_step=4).history == []


def test_metrics_are_read_one_step_late():
    """Step n and the rows of n+1 are on their way before the metrics of n-1 are read.

    Failed once with `read()` before the step, and once with `fill()` after `read()`."""
    events: list[str] = []
    counts = {"step": 0, "put": 0}

    def stepping(state: Any, batch: Any) -> Any:
        counts["step"] += 1
        events.append(f"step {counts['step']}")
        return step(state, batch)

    def put(batch: Any) -> Any:
        counts["put"] += 1
        events.append(f"put {counts['put']}")
        return jax.device_put(batch)

    go(5, step_function=stepping, put=put, hooks=[as_hook(lambda n, _: events.append(f"read {n}"))])
    for n in range(1, 5):
        assert events.index(f"step {n + 1}") < events.index(f"read {n}")
        if n < 4:
            assert events.index(f"put {n + 2}") < events.index(f"read {n}")
            assert events.index(f"read {n}") < events.index(f"step {n + 2}")
    assert counts == {"step": 5, "put": 5}  # no row was taken that no step used


def test_no_more_than_depth_batches_wait():
    """Failed once with a queue that took all there was."""
    put, used, most = [0], [0], [0]

    def putting(batch: Any) -> Any:
        put[0] += 1
        most[0] = max(most[0], put[0] - used[0])
        return jax.device_put(batch)

    def stepping(state: Any, batch: Any) -> Any:
        used[0] += 1
        return step(state, batch)

    go(20, step_function=stepping, put=putting)
    assert most[0] == loop.AHEAD + 1


def test_nothing_crosses_unasked(monkeypatch):
    """The whole loop, evaluation and saves included, without an implicit transfer. On a CPU the guard sees
    only those to the device, so implicit reads of an array are refused here.

    Failed once with `float(metrics["loss"])` in place of `jax.device_get`, and once with `total + 0`."""
    batch = {"x": np.ones(4, np.float32), "weight": np.ones(4, np.float32)}

    def refuse(*_: object) -> None:
        raise AssertionError("an array was read without jax.device_get")

    for name in ("__float__", "__int__", "__bool__", "__index__", "item", "tolist"):
        monkeypatch.setattr(type(jnp.zeros(())), name, refuse)
    with jax.transfer_guard("disallow"):
        result = go(
            6,
            evaluate=evaluate,
            eval_batches=lambda: [batch] * 3,
            eval_every=2,
            checkpoints=Checkpoints(every=3),
        )
    assert result.step == 6 and len(result.evaluations) == 3


def test_evaluation_is_the_exact_weighted_mean():
    """Sum over all batches by the weight of all, not a mean of means; each metric by its own weight.

    Failed once with the mean over batches."""
    rng = np.random.default_rng(0)
    held = [
        {"x": rng.integers(0, 64, 8).astype(np.float32), "weight": rng.integers(0, 3, 8).astype(np.float32)}
        for _ in range(7)
    ]
    writer, seen = Writer(), []

    class Sees(Hook):
        def on_evaluate(self, number: int, metrics: Any) -> None:
            seen.append((number, metrics["loss"]))

    result = go(
        5, evaluate=evaluate, eval_batches=lambda: held, eval_every=2, writers=[writer], hooks=[Sees()]
    )
    exact = sum(float((b["x"] * b["weight"]).sum()) for b in held) / sum(
        float(b["weight"].sum()) for b in held
    )
    assert [e["step"] for e in result.evaluations] == [2, 4, 5]  # at intervals, and at the end once
    assert all(e["loss"] == np.float64(exact) and e["accuracy"] == 0.75 for e in result.evaluations)
    assert [(n, m["loss"]) for kind, n, m in writer.rows if kind == "eval"] == seen
    # the training metrics of a step are written before its evaluation
    assert [(kind, n) for kind, n, _ in writer.rows][:3] == [("train", 1), ("train", 2), ("eval", 2)]


def test_evaluation_at_the_end_comes_once():
    """Failed once with two at step 4, and once with one again after a resume that had it."""
    batch = {"x": np.ones(4, np.float32), "weight": np.ones(4, np.float32)}
    options = {"evaluate": evaluate, "eval_batches": lambda: [batch], "eval_every": 2}
    assert [e["step"] for e in go(4, **options).evaluations] == [2, 4]
    assert go(4, first_step=4, last_evaluated=4, **options).evaluations == []
    assert go(2, evaluate=evaluate, eval_batches=lambda: [], eval_every=1).evaluations == []


def test_evaluation_does_not_run_ahead_of_the_device(monkeypatch):
    """Batches of a long evaluation must not pile up. Failed once with nothing waited for."""
    batch = {"x": np.ones(4, np.float32), "weight": np.ones(4, np.float32)}
    started, waited, most = [0], [0], [0]
    block = jax.block_until_ready

    def waiting(x: Any) -> Any:
        waited[0] += 1
        return block(x)

    def evaluating(state: Any, rows: Any) -> Any:
        started[0] += 1
        most[0] = max(most[0], started[0] - waited[0])
        return evaluate(state, rows)

    monkeypatch.setattr(jax, "block_until_ready", waiting)
    go(1, evaluate=evaluating, eval_batches=lambda: [batch] * 20)
    assert started[0] == 20 and most[0] <= loop.AHEAD + 1


def test_saves_on_schedule_and_at_the_end():
    """Failed once without the save at the end."""
    checkpoints = Checkpoints(every=2)
    go(5, checkpoints=checkpoints)
    assert checkpoints.saves == [(2, False), (4, False), (5, True)] and checkpoints.waits == 1


def test_data_that_ends_is_said():
    """Failed once when the iterator's StopIteration came through."""
    checkpoints = Checkpoints()
    result = go(9, batches=ones(3), checkpoints=checkpoints)
    assert (result.step, result.stopped, checkpoints.saves) == (3, "data ended", [(3, True)])


@pytest.mark.parametrize(
    ("number", "stopped"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")]
)
def test_a_signal_finishes_the_step_saves_once_and_returns(number, stopped):
    """Failed once when the last save was left to the schedule, and once with the wrong name."""
    checkpoints = Checkpoints(every=100)

    def stepping(state: Any, batch: Any) -> Any:
        out = step(state, batch)
        if stepping.count == 3:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)
        stepping.count += 1  # type: ignore[attr-defined]
        return out

    stepping.count = 1  # type: ignore[attr-defined]
    result = go(50, step_function=stepping, checkpoints=checkpoints)
    assert (result.step, result.stopped, checkpoints.saves) == (3, stopped, [(3, True)])
    assert [h["loss"] for h in result.history] == [4.0, 8.0, 12.0]  # the step under way is in it
    assert int(result.state["step"]) == 3


def test_an_interrupt_without_a_checkpointer_keeps_the_last_metrics():
    """As in a notebook. Failed once without the last `read`."""

    def hook(number: int, _: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = go(50, hooks=[as_hook(hook)])
    assert (result.stopped, result.step, result.history[-1]["step"]) == ("interrupted", 3, 3)


def test_a_second_signal_does_not_cut_the_save():
    """It says what a third would do. Failed once with KeyboardInterrupt out of the save."""
    checkpoints = Checkpoints()

    def interrupt_again() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    checkpoints.on_save = interrupt_again
    said: list[str] = []

    class Display(Progress):
        def say(self, line: str) -> None:
            said.append(line)

    def hook(number: int, _: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    state = jax.device_put({"step": np.int32(0), "total": np.float32(0)})
    result = run_loop(
        state,
        ones(),
        step_function=step,
        put=jax.device_put,
        first_step=0,
        steps=50,
        meter=Throughput(None, None),
        display=Display(50, enabled=False),
        hooks=[as_hook(hook)],
        checkpoints=checkpoints,
    )
    assert result.stopped == "interrupted" and checkpoints.saves == [(3, True)] and checkpoints.waits == 1
    assert said[0].startswith("SIGINT: finishing") and "once more leaves at once" in said[1]


@pytest.mark.parametrize(("sent", "stopped"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "preempted")])
def test_a_signal_that_an_outer_handler_could_not_act_on(sent, stopped):
    """Its exception was swallowed before the loop began: one step, saved, and out. Failed once: trained on."""

    class Outer:
        caught = sent

        def __call__(self, *_: Any) -> None:
            raise AssertionError("the loop has the signals now")

    before = signal.signal(signal.SIGINT, Outer())
    checkpoints = Checkpoints()
    try:
        result = go(50, checkpoints=checkpoints)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.stopped, result.step, checkpoints.saves) == (stopped, 1, [(1, True)])


def test_a_third_signal_leaves_at_once(tmp_path):
    """Failed once when it was counted and ignored like the second."""
    code = """
    import os, signal, time
    from shardtrain.train.loop import _Signals
    with _Signals(print, agreed=False):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr


def test_a_line_in_the_middle_of_a_line_does_not_break_the_loop():
    """A handler may run inside a write to the stream it writes to, which Python refuses with RuntimeError.

    Failed once when that came out of the loop."""

    class Display(Progress):
        def say(self, line: str) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    signals = loop._Signals(Display(1, enabled=False).say, agreed=False)
    with signals:
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.alone and signals.caught == signal.SIGINT


def test_several_processes_stop_together(monkeypatch):
    """On several, a Ctrl-C becomes the SIGTERM that JAX has all processes agree on; alone it ends nothing.

    Failed once when the loop was left at once: the other processes hung in their next collective."""
    passed_on: list[int] = []
    signal_before = signal.signal(signal.SIGTERM, lambda n, _: passed_on.append(n))
    try:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        checkpoints = Checkpoints()

        def hook(number: int, _: Any) -> None:
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            if number == 4:
                checkpoints.preempted = True  # now all agree

        result = go(50, hooks=[as_hook(hook)], checkpoints=checkpoints)
    finally:
        signal.signal(signal.SIGTERM, signal_before)
    assert passed_on == [signal.SIGTERM]
    assert (result.step, result.stopped, checkpoints.saves) == (5, "interrupted", [(5, True)])


def test_several_processes_without_a_checkpointer_are_left_alone(monkeypatch):
    """Nobody could agree, so Ctrl-C is Python's own. Failed once when it was caught."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def hook(number: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(50, hooks=[as_hook(hook)])


def test_runs_in_a_thread():
    """Where Python allows no handlers. Failed once with ValueError from `signal.signal`."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(go(3)))
    thread.start()
    thread.join()
    assert results[0].stopped == "done"


@jax.jit
def breaks_at_4(state: dict[str, jax.Array], batch: jax.Array) -> Any:
    new, metrics = step(state, batch)
    bad = new["step"] >= 4
    return {**new, "total": jnp.where(bad, jnp.nan, new["total"])}, {
        **metrics,
        "loss": jnp.where(new["step"] >= 5, jnp.nan, metrics["loss"]),
        "param_norm": jnp.where(bad, jnp.nan, metrics["param_norm"]),
    }


@pytest.mark.parametrize("every", [2, 4])
def test_a_state_that_is_no_number_is_never_saved(every):
    """The parameters go at step 4, where a save is due. The loss is still finite there.

    Failed once when a save that was due went ahead of the metrics: the run could only be resumed into NaN.
    """
    checkpoints = Checkpoints(every=every)
    with pytest.raises(RunError) as caught:
        go(9, step_function=breaks_at_4, checkpoints=checkpoints)
    assert caught.value.where == "step 4" and "norm of the parameters is nan" in str(caught.value)
    assert "last finite loss: 16.0000 at step 4" in caught.value.why and "learning rate" in caught.value.fix
    assert [s for s, _ in checkpoints.saves] == [n for n in range(every, 4, every)]


def test_nor_when_it_is_interrupted_there():
    """Failed once when the interrupt's save came before the metrics were read."""
    checkpoints = Checkpoints()

    def hook(number: int, _: Any) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError):
        go(9, step_function=breaks_at_4, checkpoints=checkpoints, hooks=[as_hook(hook)])
    assert checkpoints.saves == []


def test_hooks_may_handle_what_is_no_number():
    """Failed once when it raised all the same."""
    result = go(7, step_function=breaks_at_4, on_nonfinite="continue")
    assert result.stopped == "done" and np.isnan(result.history[-1]["loss"])


def test_a_save_that_fails_does_not_end_the_training(caplog):
    """But the last one does. Failed once when a full disk at step 2 ended the run."""

    class Full(Checkpoints):
        def save(self, state: Any, *, step: int | None = None, force: bool = False) -> bool:
            if step == 2 or force:
                raise CheckpointError("a checkpoint could not be written", where="disk")
            return False

    with pytest.raises(RunError, match="the last save failed"):
        go(5, checkpoints=Full(every=2))
    lines = [r.getMessage().split(":")[0] for r in caplog.records if r.name == "shardtrain"]
    assert lines == ["step 2", "step 5"]


@pytest.mark.parametrize(("bad", "stops_at"), [(range(100), 5), ([1, 2, 3, 4, 6, 7, 8, 9], None)])
def test_saves_that_go_on_failing_end_it(bad, stops_at):
    """Five in a row; failures in the background are told one call later, as the Checkpointer does. The faults in mind: a save
    that had begun was taken for one that is on disk, and a count that was never set back."""

    class Background(Checkpoints):
        broken = False

        def save(self, state: Any, *, step: int | None = None, force: bool = False) -> bool:
            if self.broken:
                self.broken = False
                raise CheckpointError("a checkpoint could not be written", where="disk", why="No space left")
            self.saves.append((step, force))
            self.broken = len(self.saves) in bad and not force
            return True

    checkpoints = Background(every=1)
    if stops_at is None:
        assert go(40, checkpoints=checkpoints).stopped == "done"
    else:
        with pytest.raises(RunError, match=r"5 saves in a row failed[^~]*No space left"):
            go(40, checkpoints=checkpoints)
        assert len(checkpoints.saves) == stops_at


def test_metrics_that_cannot_be_written_do_not_end_the_training(monkeypatch):
    """One line at the first, one at the end; the file is opened anew. The fault in mind: OSError came out of the loop."""

    class Full(Writer):
        closed = 0

        def write(self, number: int, metrics: dict[str, float], kind: str = "train") -> None:
            if 2 <= number <= 4:
                raise OSError(28, "No space left on device")
            super().write(number, metrics, kind)

        def close(self) -> None:
            self.closed += 1

    writer, said = Full(), []
    monkeypatch.setattr(Progress, "say", lambda self, line: said.append(line))
    go(6, writers=[writer])
    assert [number for _, number, _ in writer.rows] == [1, 5, 6] and writer.closed == 3
    assert ["2: metrics not written" in said[0], "3 rows of metrics" in said[-1]] == [True, True]


class Clock:
    """A second a tick."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_saves_and_evaluations_are_not_step_time():
    """Each step takes 1 s, a save 100 s, an evaluation 1000 s. Failed once without `meter.start` after a save."""
    clock = Clock()

    def stepping(state: Any, batch: Any) -> Any:
        clock.now += 1
        return step(state, batch)

    def held_out() -> list[Any]:
        clock.now += 1000
        return [{"x": np.ones(4, np.float32), "weight": np.ones(4, np.float32)}]

    def slow() -> None:
        clock.now += 100

    checkpoints = Checkpoints(every=3)
    checkpoints.on_save = slow
    result = go(
        12,
        step_function=stepping,
        meter=Throughput(None, None, clock=clock),
        checkpoints=checkpoints,
        evaluate=evaluate,
        eval_batches=held_out,
        eval_every=4,
    )
    assert max(h["step_seconds"] for h in result.history) <= 2


class Records(Hook):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, step: int, state: Any) -> None:
        self.calls.append(("start", step))

    def on_step(self, step: int, metrics: Any) -> None:
        self.calls.append(("step", step))

    def on_end(self, step: int, state: Any) -> None:
        self.calls.append(("end", step, float(state["total"])))


def test_hooks_are_called_in_order():
    """With a state that is not yet donated. Failed once with `on_end` on the donated first state."""
    hook = Records()
    go(2, hooks=[hook])
    assert hook.calls == [("start", 0), ("step", 1), ("step", 2), ("end", 2, 8.0)]


@pytest.mark.parametrize("wrong", [Records, 3, "print"])
def test_what_is_no_hook_is_refused(wrong):
    """A class in place of an object of it. Failed once when the class itself was called at every step."""
    with pytest.raises(ConfigError, match="is no hook"):
        as_hook(wrong)


def test_every_phase_is_told():
    """In their order, with their steps. Failed once without the phase of saves: they counted as data."""

    class Watch:
        def __init__(self) -> None:
            self.told: list[tuple[str, int]] = []

        def phase(self, name: str, number: int, hidden: bool = False) -> None:
            if self.told[-1:] != [(name, number)]:
                self.told.append((name, number))

    rows = [{"x": np.ones(4, np.float32), "weight": np.ones(4, np.float32)}] * 2
    go(3, checkpoints=Checkpoints(2), evaluate=evaluate, eval_batches=lambda: rows, watch=(watch := Watch()))
    assert watch.told == [
        ("data", 1), ("dispatch", 1), ("data", 2), ("save", 1),
        ("data", 2), ("dispatch", 2), ("data", 3), ("wait", 1), ("hooks", 1), ("wait", 2), ("hooks", 2), ("save", 2),
        ("data", 3), ("dispatch", 3), ("data", 4), ("save", 3),
        ("wait", 3), ("hooks", 3), ("evaluate", 3), ("save", 3),
    ]  # fmt: skip
