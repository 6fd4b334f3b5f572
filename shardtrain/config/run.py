"""A config as a run in a folder: started, resumed, summed up."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax

from shardtrain.checkpoint import newest_durable, refuse_if_held, refuse_if_taken
from shardtrain.config.build import Pieces, build, make_plan
from shardtrain.config.load import difference, from_json, load_config, to_json
from shardtrain.config.schema import LAYOUT_FIELDS, RunConfig
from shardtrain.errors import ConfigError
from shardtrain.launch.record import write_record
from shardtrain.mesh import gathered, wait_for_all
from shardtrain.models import LanguageModel, generate
from shardtrain.monitor import WandbWriter, loss_svg, sparkline, write_report
from shardtrain.plan.fit import Run, fit_plan
from shardtrain.plan.hlo import HloError
from shardtrain.watch import goodput_lines, read_goodput, read_table, table_lines

FREE = (
    *LAYOUT_FIELDS,
    "eval_every",
    "eval_rows",
    "checkpoint_every",
    "guard",
    "replica_check_every",
    "sample",
    "sample_tokens",
    "data.cache",
    "data.quarantine",
)
"""Fields that may change when a run is resumed: they do not change what is trained."""


def train(
    config: RunConfig, *, fresh: bool = False, say: Callable[[str], None] = print, quiet: bool = False
) -> Run:
    """Train a config in its output folder, and sum it up there.

    Args:
        fresh: move an older run aside instead of resuming it.
        say: takes lines for people. quiet: no progress.

    Raises:
        ConfigError: the folder or the store holds a run that trains something else, or cannot be written.
        CheckpointError: another process is training in it.
        RunError: the store does not answer.
    """
    _same_config(config)
    path = pathlib.Path(config.output)
    refuse_if_held(path / "checkpoints")
    old = None if fresh else _saved(path)
    if config.durable:
        refuse_if_taken(config.durable, path / "checkpoints")
        old = _from_store(config, fresh) or old
    if old is not None:
        config = resume_config(old, config, path)
    pieces = build(config)
    made = make_plan(
        config, pieces, None if old is None else old.groups
    )  # refuses what cannot be, before anything is written
    if fresh:
        if jax.process_index() == 0:
            _set_aside(path)
        wait_for_all("set aside")  # nobody may write into the folder that is about to be moved
    new = not path.exists()
    handler = _open(path)
    try:
        if jax.process_index() == 0:
            write_record(path)
        started: dict[str, Any] = {}

        def on_plan(made: Any, step: Any) -> None:
            memory = step.memory()
            started.update(plan=str(made), memory=memory, step=step)
            say(f"{made}\n\n{memory}\n")
            if not (path / "config.json").exists():
                _write_config(path, dataclasses.replace(config, groups=made.groups))

        writers = []
        if config.monitor.wandb and jax.process_index() == 0:
            writers.append(
                WandbWriter(config.monitor.wandb, _run_id(path), directory=path, config=to_json(config))
            )
        run = fit_plan(
            made,
            pieces.loader,
            steps=config.steps,
            seed=config.seed,
            eval_data=pieces.eval_loader,
            eval_every=config.eval_every,
            eval_rows=config.eval_rows,
            output=path,
            checkpoint_every=config.checkpoint_every,
            keep=config.keep,
            durable=config.durable,
            replica_check_every=config.replica_check_every,
            config=to_json(config),
            writers=writers,
            tensorboard=config.monitor.tensorboard and jax.process_index() == 0,
            progress=config.monitor.progress and not quiet,
            flops_per_row=pieces.flops_per_row,
            on_plan=on_plan,
        )
        text = (
            sample(run.model, pieces.text, config) if run.stopped == "done" else ""
        )  # all processes together
        if jax.process_index() == 0:
            _sum_up(run, config, pieces, started, text, say)
        return run
    finally:
        logging.getLogger("shardtrain").removeHandler(handler)
        handler.close()
        if new and jax.process_count() == 1 and not (path / "config.json").exists():
            shutil.rmtree(path, ignore_errors=True)  # no run has begun: leave nothing half-written


def _same_config(config: RunConfig) -> None:
    """Raises:
    ConfigError: a process was given another config, with the fields. Folders may have other names on other hosts.
    """
    if jax.process_count() == 1:
        return
    told = gathered(json.dumps(to_json(dataclasses.replace(config, output=""))))
    usual = max(told, key=told.count)
    others = [i for i, text in enumerate(told) if text != usual]
    if not others:
        return
    one, other = (from_json(json.loads(text)) for text in (usual, told[others[0]]))
    changed = difference(one, other, ("data.cache",))
    if changed:
        lines = "; ".join(f"{name} is {b!r}, elsewhere {a!r}" for name, (a, b) in list(changed.items())[:6])
        raise ConfigError(
            f"process{'es' if len(others) > 1 else ''} {', '.join(map(str, others))} of {len(told)} "
            f"train{'s' if len(others) == 1 else ''} something else",
            where="config",
            why=lines,
            fix="the same config, flags and files on every host",
        )


def resume_config(old: RunConfig, new: RunConfig, path: pathlib.Path | str) -> RunConfig:
    """The new config with the old run's groups, if both train the same thing (`--groups` counts at the start only).

    Raises:
        ConfigError: they differ in what is trained, with the differences.
    """
    ignore = FREE
    changed = difference(old, new, ignore)
    if "steps" in changed and (new.optimizer.decay == "constant" and new.steps >= 1):
        del changed["steps"]
    if changed:
        lines = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in list(changed.items())[:6])
        raise ConfigError(
            "holds a run of another config",
            where=str(path),
            why=lines + (f"; and {len(changed) - 6} more" if len(changed) > 6 else ""),
            fix="another --output, or --fresh to move the old run aside",
        )
    return dataclasses.replace(new, groups=old.groups)


def stored(url: str) -> RunConfig | None:
    """The config of the run in a store, with its groups; None where nothing is committed."""
    found = newest_durable(url)
    if found is None:
        return None
    return dataclasses.replace(from_json(found["config"], where=url), groups=found["groups"])


def _from_store(config: RunConfig, fresh: bool) -> RunConfig | None:
    """Raises:
    ConfigError: a fresh run, and the store is not empty; or a run that trains something else.
    """
    if (old := stored(config.durable)) is None:
        return None
    if fresh:
        raise ConfigError(
            "the store holds checkpoints", where=config.durable, fix="another --durable; or without --fresh"
        )
    resume_config(old, config, config.durable)
    return old


def _saved(path: pathlib.Path) -> RunConfig | None:
    file = path / "config.json"
    return load_config(str(file)) if file.is_file() else None


def _open(path: pathlib.Path) -> logging.Handler:
    """Make the run's folder, and log into it."""
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path / "logs" / f"process-{jax.process_index()}.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=f"output {path}", fix="--output DIR that can be"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("shardtrain")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.info("started on %d devices, %d processes", jax.device_count(), jax.process_count())
    return handler


def _set_aside(path: pathlib.Path) -> None:
    if (path / "config.json").exists():
        path.rename(path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"))


def _write_config(path: pathlib.Path, config: RunConfig) -> None:
    if jax.process_index() == 0:
        data = to_json(config)
        assert from_json(data) == config, "a config must survive its JSON"
        work = path / ".config.json.tmp"
        work.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(work, path / "config.json")


def _run_id(path: pathlib.Path) -> str:
    file = path / "wandb-run-id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def sample(run_model: Any, text: Any, config: RunConfig, seed: int = 0) -> str:
    """Generated text after the config's prompt; empty without a prompt, a tokenizer or a language model."""
    if not config.sample or text is None or not isinstance(run_model, LanguageModel):
        return ""
    if text.manifest["tokenizer"] is None:  # the data came as tokens
        return ""
    tokenizer = text.tokenizer()
    prompt = tokenizer.encode(config.sample, add_special_tokens=False).ids
    room = config.model.sequence - len(prompt)  # type: ignore[union-attr]
    if room < 1:
        return ""
    ids = generate(run_model, prompt, min(config.sample_tokens, room), temperature=0.8, top_k=40, seed=seed)
    return str(tokenizer.decode(ids.tolist()))


def _sent(step: Any) -> str:
    """What the step sends, for the report; a program that cannot be read trains all the same."""
    try:
        return str(step.collectives())
    except HloError as error:
        return f"not known: {error}"


def _sum_up(
    run: Run,
    config: RunConfig,
    pieces: Pieces,
    started: dict[str, Any],
    text: str,
    say: Callable[[str], None],
) -> None:
    assert run.path is not None
    entropy = pieces.text.unigram_entropy if pieces.text is not None else math.nan
    levels = {"unigram entropy": entropy} if math.isfinite(entropy) else {}
    train_points = [(r["step"], r["loss"]) for r in run.history if r.get("loss") is not None]
    eval_points = [(r["step"], r["loss"]) for r in run.evaluations if r.get("loss") is not None]
    curve = loss_svg(train_points, eval_points, levels=levels, title=f"{run.path.name}: loss")
    (run.path / "loss.svg").write_text(curve, encoding="utf-8")
    speed = f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-"
    facts = {
        "mesh": " ".join(f"{a}={n}" for a, n in run.plan.mesh.shape.items())
        + f", rules {run.plan.rules.name}",
        "parameters": f"{run.plan.parameter_count:,}",
        "steps": run.step,
        "training loss": f"{train_points[-1][1]:.4f}" if train_points else "-",
        "held-out loss": f"{eval_points[-1][1]:.4f}" if eval_points else "-",
        "unigram entropy": f"{entropy:.4f}" if math.isfinite(entropy) else "-",
        "tokens per second": speed,
        "MFU": f"{run.mfu:.1%}" if run.mfu else "not known for these devices",
        "folder": str(run.path),
    }
    write_report(
        run.path / "report.html",
        title=run.path.name,
        curve=curve,
        facts=facts,
        memory=started.get("memory"),
        layout=started.get("plan", ""),
        collectives=_sent(started["step"]) if started else "",
        sample=text,
    )
    if text:
        say(f"\nsample:\n{text}\n")
    if len(train_points) > 1:
        say(
            f"loss {sparkline([y for _, y in train_points])}  {train_points[0][1]:.2f} -> {train_points[-1][1]:.2f}"
        )
    if eval_points:
        share = f", {eval_points[-1][1] / entropy:.2f} of the unigram entropy" if levels else ""
        say(f"held-out loss {eval_points[-1][1]:.4f} nats per token{share}")
    if run.stopped != "done":
        say(f"{run.stopped} at step {run.step}; the same command goes on")
    if table := read_table(run.path):
        say("\n".join(table_lines(table)))
    if spent := read_goodput(run.path):
        say(goodput_lines(spent))
    say(f"checkpoint {run.path / 'checkpoints' / str(run.step)}")
    say(f"report     {run.path / 'report.html'}")
    say(f"curve      {run.path / 'loss.svg'}")
    say(f"metrics    {run.path / 'metrics.jsonl'}")
