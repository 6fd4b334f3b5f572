"""`st.fit`: a Plan, its step, data, checkpoints, metrics and evaluation in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from shardtrain.checkpoint import Checkpointer, faults, inspect, list_steps, newest_durable
from shardtrain.data import as_loader, prefetch
from shardtrain.errors import CheckpointError, ConfigError
from shardtrain.launch.record import started_again
from shardtrain.mesh import AnyMesh, chip_of, device_of, gathered, service_board
from shardtrain.monitor import JsonlWriter, Progress, TensorBoardWriter, Throughput, read_jsonl
from shardtrain.parallel.presets import fsdp_tensor
from shardtrain.plan.make import plan
from shardtrain.plan.plan import Plan
from shardtrain.sharding import Rules
from shardtrain.train.guard import Guard, Rewind, Verdicts, pass_over
from shardtrain.train.hooks import as_hook
from shardtrain.train.inject import Fault, injected
from shardtrain.train.loop import Stopped, run_loop
from shardtrain.train.replicas import Replicas
from shardtrain.train.rewind import FILE, passing, record, recorded
from shardtrain.train.state import TrainState
from shardtrain.watch import Watch

log = logging.getLogger("shardtrain")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` returns.

    `state`: the trained state. `model`: the user's model with it. `history`: a dict of metrics per
    step. `evaluations`: a dict per evaluation. `path`: the run's folder, None without one.
    `stopped`: done, interrupted, preempted or "data ended". `resumed_from`: a step, or None. `durable`: the newest step in the
    store, None without.
    """

    state: TrainState
    model: Any
    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    path: pathlib.Path | None
    step: int
    stopped: Stopped
    resumed_from: int | None
    plan: Plan
    durable: int | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None


def fit(
    model: Any,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    data: Any,
    *,
    mesh: Mesh,
    steps: int,
    rules: Rules | str = fsdp_tensor,
    microbatches: int = 1,
    groups: int | None = None,
    schedule: Any = "1f1b",
    precision: str = "f32",
    quant: str | None = None,
    param_dtype: str | None = None,
    annotations: Any = None,
    trainable: Any = None,
    learning_rate: Any = None,
    attention: str = "ring",
    guard: Guard | None = None,
    seed: int = 0,
    eval_data: Any = None,
    eval_loss_fn: Callable[..., Any] | None = None,
    eval_every: int = 0,
    eval_rows: int = 0,
    output: str | pathlib.Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    durable: str = "",
    replica_check_every: int = 0,
    config: dict[str, Any] | None = None,
    writers: Sequence[Any] = (),
    tensorboard: bool = False,
    hooks: Sequence[Any] = (),
    progress: bool = True,
    flops_per_row: float | None = None,
    on_plan: Callable[[Plan, Any], None] | None = None,
) -> Run:
    """Train a model on a mesh. The same call with the same `output` goes on where it stopped.

    Args:
        model, loss_fn, optimizer, mesh, rules, microbatches, groups, schedule, precision, quant,
            param_dtype, annotations, trainable, learning_rate, attention, guard: see `st.plan`.
        data: a loader, a dict of arrays, or any iterable of batches (dicts or tuples of arrays, NumPy or
            PyTorch on the CPU).
        steps: train up to this step.
        eval_data: held-out batches: a loader with `.batches()`, or an iterable that can be iterated
            again. eval_every: steps between evaluations; there is one at the end anyway. eval_rows: at
            most so many rows (0 for all).
        eval_loss_fn: the loss of an evaluation where it is another one. nnx modules are put into `eval()`; a linen
            module is told by its call, such as `model(batch["x"], train=False)`.
        output: folder of the run: metrics.jsonl, checkpoints/, tensorboard/. None writes nothing.
        checkpoint_every: steps; one is written at the end anyway. keep: how many of them.
        durable: URL of an object store that gets them too, see `st.Checkpointer`.
        replica_check_every: steps between comparisons of replicas of the state, 0 for never; see `train.replicas`.
        config: JSON kept beside each checkpoint.
        writers: further `monitor.Writer`s. hooks: `train.hooks.Hook`s or functions `(step, metrics)`.
        flops_per_row: training FLOPs of one row, for MFU; default 6 x parameters.
        on_plan: called with the plan and its compiled step before training, to report them.

    Returns:
        A `Run`; also after Ctrl-C, which saves first.

    Raises:
        What `st.plan` and `st.Checkpointer` raise; RunError when the loss is not finite.
    """
    loader = as_loader(data)
    if groups is None and output is not None:
        groups = _saved_groups(pathlib.Path(output) / "checkpoints", durable)
        microbatches = 1 if groups else microbatches
    made = plan(
        model,
        loss_fn,
        optimizer,
        batch=loader.batch_spec,
        mesh=mesh,
        rules=rules,
        microbatches=microbatches,
        groups=groups,
        schedule=schedule,
        precision=precision,
        quant=quant,
        param_dtype=param_dtype,
        annotations=annotations,
        trainable=trainable,
        learning_rate=learning_rate,
        attention=attention,
        guard=guard,
    )
    return fit_plan(
        made,
        loader,
        steps=steps,
        seed=seed,
        eval_data=eval_data,
        eval_loss_fn=eval_loss_fn,
        eval_every=eval_every,
        eval_rows=eval_rows,
        output=output,
        checkpoint_every=checkpoint_every,
        keep=keep,
        durable=durable,
        replica_check_every=replica_check_every,
        config=config,
        writers=writers,
        tensorboard=tensorboard,
        hooks=hooks,
        progress=progress,
        flops_per_row=flops_per_row,
        on_plan=on_plan,
    )


def fit_plan(
    made: Plan,
    loader: Any,
    *,
    steps: int,
    seed: int = 0,
    eval_data: Any = None,
    eval_loss_fn: Callable[..., Any] | None = None,
    eval_every: int = 0,
    eval_rows: int = 0,
    output: str | pathlib.Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    durable: str = "",
    replica_check_every: int = 0,
    config: dict[str, Any] | None = None,
    writers: Sequence[Any] = (),
    tensorboard: bool = False,
    hooks: Sequence[Any] = (),
    progress: bool = True,
    flops_per_row: float | None = None,
    on_plan: Callable[[Plan, Any], None] | None = None,
) -> Run:
    """`fit` of a plan that is made already; its arguments as there."""
    path = None if output is None else pathlib.Path(output)
    if path is None and durable:
        raise ConfigError(
            "a store without a folder", where="durable", fix="output=..., which it is copied from"
        )
    if path is None and made.guard is not None and made.guard.on_bad == "rewind":
        raise ConfigError("'rewind' without a folder", where="guard.on_bad", fix="output=..., or 'skip'")
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if path is not None:
            checkpoints = stack.enter_context(
                Checkpointer(
                    path / "checkpoints",
                    every=checkpoint_every or None,
                    keep=keep,
                    durable=durable,
                    config=config,
                )
            )
        # after the lock: two runs must not count in one folder
        watch = stack.enter_context(
            Watch(jax.process_index(), path, service=service_board("beats"), again=started_again())
        )
        watch.phase("compile", 0)
        compiled = made.compile()
        watch.program = _same_program(compiled.lowered)
        if on_plan is not None:
            on_plan(made, compiled)
        watch.phase("restore", 0)
        state = made.init(seed) if checkpoints is None else checkpoints.restore_or_init(made, seed)
        resumed_from = int(state)
        watch.ledger.resumed(resumed_from)
        lead = jax.process_index() == 0  # one process writes and shows; all compute
        all_writers: list[Any] = list(writers) if lead else []
        if path is not None and lead:
            all_writers.insert(0, JsonlWriter(path / "metrics.jsonl"))
            if tensorboard:
                all_writers.append(TensorBoardWriter(path / "tensorboard"))
        for writer in all_writers:
            stack.callback(writer.close)
        watch.phase("compile", resumed_from)
        evaluate = made.compile_eval(eval_loss_fn) if eval_data is not None and resumed_from < steps else None
        meter = Throughput(_flops(made, flops_per_row), _peak(made.mesh))
        rows = loader.for_rows(made.rows)
        display = stack.enter_context(Progress(steps, enabled=progress and lead))
        all_hooks = [as_hook(h) for h in hooks]
        replicas = None
        if replica_check_every and made.mesh.size > 1:
            replicas = Replicas(made.abstract_state, made.mesh, replica_check_every, str(path or "RUN"))
        storage = None if checkpoints is None else functools.partial(_storage_fault, checkpoints)
        verdicts = None if made.guard is None else Verdicts(made.guard, made.global_batch, display.say)
        over = {entry["step"] for entry in recorded(path)} if path is not None else set()
        if made.guard is None and (left := sorted(step for step in over if step > resumed_from)):
            raise ConfigError(
                f"passes over {len(left)} steps to come, from {left[0]} on, and this run has no guard to do it",
                where=f"{path}/{FILE}",
                fix="guard.on_bad='skip' or 'rewind'; or remove the file to take these batches",
            )
        while True:  # again after each rewind
            first = int(state)
            for writer in all_writers:
                writer.resume(first)
            earlier = read_jsonl(path / "metrics.jsonl") if path is not None and lead else []
            last_evaluated = _agreed(max((r["step"] for r in earlier if "eval_loss" in r), default=-1))
            step_function = passing(compiled, over, first, lambda: _passing_over(made))
            try:
                with contextlib.closing(prefetch(rows.starting_at(state.rows_consumed()))) as batches:
                    result = run_loop(
                        state,
                        batches,
                        step_function=injected(step_function, first, jax.process_index(), storage=storage),
                        put=made.put,
                        first_step=first,
                        steps=steps,
                        meter=meter,
                        display=display,
                        writers=all_writers,
                        hooks=all_hooks,
                        checkpoints=checkpoints,
                        evaluate=evaluate,
                        eval_batches=functools.partial(_eval_batches, eval_data, eval_rows, made),
                        eval_every=eval_every,
                        last_evaluated=last_evaluated,
                        watch=watch,
                        verdicts=verdicts,
                        replicas=replicas,
                    )
                    break
            except Rewind as back:
                bad, why = back.step, back.why
            del state  # after the `except`, whose frames hold the old one too
            assert path is not None and checkpoints is not None
            watch.phase("restore", bad)
            try:
                checkpoints.wait()
            except CheckpointError as error:  # of the save under way: there is one less to go back to
                log.warning("%s", error)
            state = checkpoints.restore_or_init(made, seed)
            watch.ledger.resumed(int(state))
            over.add(bad)
            _tell_rewind(path, bad, why, int(state), made.global_batch, display.say)
    old_evaluations = [
        {"step": r["step"], **{k.removeprefix("eval_"): v for k, v in r.items() if k.startswith("eval_")}}
        for r in earlier
        if "eval_loss" in r
    ]
    return Run(
        state=result.state,
        model=made.model(result.state),
        history=[r for r in earlier if "loss" in r] + result.history,
        evaluations=old_evaluations + result.evaluations,
        path=path,
        step=result.step,
        stopped=result.stopped,
        resumed_from=resumed_from or None,
        durable=None if checkpoints is None or not durable else _durable(checkpoints),
        plan=made,
        step_seconds=meter.step_seconds,
        tokens_per_second=meter.tokens_per_second,
        mfu=meter.mfu,
    )


def _storage_fault(checkpoints: Checkpointer, fault: Fault) -> None:
    if fault.kind == "disk-full":
        faults.fill_disk(checkpoints, fault.saves)
    elif jax.process_index() == 0:
        faults.corrupt(checkpoints)


def _passing_over(made: Plan) -> Any:
    return made.jit(lambda state, _: pass_over(state, made.global_batch), donate=True)


def _tell_rewind(
    path: pathlib.Path, step: int, why: str, to: int, rows: int, say: Callable[[str], None]
) -> None:
    """Write down that a step is passed over from now on, and say so."""
    span = [(step - 1) * rows, step * rows - 1]
    line = f"step {step}: {why}; back to step {to}, and past rows {span[0]} to {span[1]}"
    log.warning(line)
    say(line)
    if jax.process_index() == 0:
        record(path, {"step": step, "rows": span, "why": why, "rewound_to": to})


def _agreed(number: int) -> int:
    """Process 0's number, on every process: all must evaluate at the same steps."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _same_program(lowered: Any) -> str:
    """The program's fingerprint, the same on every process.

    Raises:
        ConfigError: processes are about to run different programs, which would hang or compute nonsense.
    """
    if jax.process_count() == 1:
        return ""
    mine = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    prints = gathered(mine)
    usual = max(prints, key=prints.count)
    others = [i for i, found in enumerate(prints) if found != usual]
    if others:
        raise ConfigError(
            f"{'processes' if len(others) > 1 else 'process'} {', '.join(map(str, others))} compiled another program",
            where="fit",
            why=f"fingerprints {', '.join(f'{i}: {p}' for i, p in enumerate(prints[:8]))}",
            fix="the same code, config, versions and environment on every host",
        )
    return mine


def _saved_groups(path: pathlib.Path, durable: str) -> int | None:
    """The groups of the run that is in the folder, or in the store: they belong to it, not to the mesh."""
    steps = [s["step"] for s in list_steps(path) if s["committed"]] if path.is_dir() else []
    found = inspect(path, max(steps)) if steps else newest_durable(durable) if durable else None
    return found.get("groups") if found else None


def _durable(checkpoints: Checkpointer) -> int | None:
    newest = checkpoints.durable_step()
    agreed = _agreed(-1 if newest is None else newest)
    return None if agreed < 0 else agreed


def _eval_batches(eval_data: Any, limit: int, made: Plan) -> Any:
    if hasattr(eval_data, "batches"):
        return eval_data.for_rows(made.rows).batches(limit)
    batches = itertools.islice(iter(eval_data), -(-limit // made.global_batch) if limit else None)
    return batches


def _flops(made: Plan, per_row: float | None) -> float:
    return made.global_batch * (per_row if per_row is not None else 6.0 * made.parameter_count)


def _peak(mesh: AnyMesh) -> float | None:
    chip = chip_of(device_of(mesh))
    return chip.flops["bf16"] * mesh.size if chip else None
