"""Faults on purpose, for tests and for trying what a run survives: `--inject kill@step=12:process=1`.

Kinds: `kill` (SIGKILL), `stop` (SIGSTOP), `term` (SIGTERM, as a preemption), `hang` (stuck in Python), `slow` (`seconds`
before this and every later step), `nan` (in every float of the step's batch, on all processes), `corrupt` (a flipped
bit in the newest committed checkpoint), `disk-full` (saves fail from then on, or the next `saves`). Each happens right
before its step is dispatched, in the first attempt of a launcher unless `attempt=` says another, or `all`. Read from
`SHARDTRAIN_INJECT`; several are divided by commas.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardtrain.errors import ConfigError, suggestion

VARIABLE = "SHARDTRAIN_INJECT"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
STORAGE = ("corrupt", "disk-full")
KINDS = (*_SIGNALS, "hang", "slow", "nan", *STORAGE)
Step = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault. `process`, `attempt`: None for every one. `saves`: None for all."""

    kind: str
    step: int
    process: int | None = None
    attempt: int | None = 0
    seconds: float = 1.0
    saves: int | None = None

    def due(self, step: int) -> bool:
        return step >= self.step if self.kind == "slow" else step == self.step


def parse(text: str) -> list[Fault]:
    """The faults of a `--inject`.

    Raises:
        ConfigError: an unknown kind or word, or no step.
    """
    return [_parse(part.strip()) for part in text.split(",") if part.strip()]


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        fix = suggestion(kind, KINDS, "KIND@step=12:process=1")
        raise ConfigError(f"no fault '{kind}'", where="--inject", fix=fix)
    values: dict[str, Any] = {}
    for word in rest.split(":"):
        name, _, value = word.partition("=")
        if name not in ("step", "process", "attempt", "seconds", "saves") or name in values:
            raise ConfigError(f"'{word}' in {text}", where="--inject", fix=f"{kind}@step=12:process=1")
        number = re.fullmatch(r"\d+(\.\d+)?" if name == "seconds" else r"\d+", value)
        if number is None and not (name == "attempt" and value == "all"):
            raise ConfigError(f"'{word}' in {text} is no number", where="--inject", fix=f"{name}=1")
        values[name] = None if value == "all" else float(value) if name == "seconds" else int(value)
    if values.get("step", 0) < 1:
        raise ConfigError(f"no step in {text}", where="--inject", fix=f"{kind}@step=12; the first step is 1")
    if kind in ("nan", *STORAGE) and "process" in values:
        raise ConfigError(
            f"process in {text}", where="--inject", fix=f"{kind}@step={values['step']}: all have it"
        )
    return Fault(kind, **values)


def injected(
    step_function: Step,
    first: int,
    process: int,
    environment: Mapping[str, str] = os.environ,
    *,
    storage: Callable[[Fault], None] | None = None,
) -> Step:
    """The step function with the faults of the environment before it; itself without any.

    Args:
        first: the step that the run is at. process: this one's index. storage: causes a fault of `STORAGE`; None: nothing
            is saved.
    """
    attempt = environment.get("SHARDTRAIN_ATTEMPT", "0")
    faults = [
        f
        for f in parse(environment.get(VARIABLE, ""))
        if f.process in (None, process) and f.attempt in (None, int(attempt))
    ]
    if not faults:
        return step_function
    if storage is None and (lost := [f.kind for f in faults if f.kind in STORAGE]):
        raise ConfigError("nothing is saved", where=f"--inject {lost[0]}", fix="a run with a folder")
    number = first

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal number
        number += 1
        for fault in faults:
            if fault.due(number):
                batch = _cause(fault, state, batch, storage)
        return step_function(state, batch)

    return step


def _cause(fault: Fault, state: Any, batch: Any, storage: Callable[[Fault], None] | None) -> Any:
    if fault.kind == "nan":
        return _poisoned(batch)
    if storage is not None and fault.kind in STORAGE:
        storage(fault)
        return batch
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return batch
    import jax

    jax.block_until_ready(state)  # the steps before are done: what comes is known
    while fault.kind == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), _SIGNALS[fault.kind])
    return batch


def _poisoned(batch: Any) -> Any:
    import jax
    import jax.numpy as jnp

    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    if not any(map(floating, jax.tree.leaves(batch))):
        raise ConfigError("no float in the batch can be NaN", where="--inject nan", fix="a float field")
    return jax.jit(lambda b: jax.tree.map(lambda x: x * jnp.nan if floating(x) else x, b))(batch)
