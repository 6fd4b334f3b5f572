"""Steps whose loss or gradient is no number, or whose gradient is far larger than those before: seen on the devices,
where such a step changes nothing, and told to the host one step late."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from shardtrain.errors import ConfigError, RunError
from shardtrain.train.state import TrainState, advance

log = logging.getLogger("shardtrain")
TAKEN, LOSS, GRADIENT, SPIKE, PASSED = range(5)
"""The metric `skipped`: 0 for a step that was taken, else why it was not."""
LEAST = 0.05  # of the deviation of log norms: gradients that hardly differ would make a spike of rounding
KEY = "guard"  # of its memory in `TrainState.grad_state`
Memory = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Guard:
    """What to do with a bad step: one whose loss or gradient norm is not finite, or a spike.

    `on_bad`: "skip" goes on without the batch; "rewind" restores the last commit, runs the steps after it again and
    passes over the batch; "stop" ends the run, its state as before the batch; "off" looks at nothing on the devices.
    `spike`: a gradient norm so many standard deviations above the mean, both of log norms over about the last
    `window` steps that were taken, and not before there were so many; None for none. `limit`: so many skips in a row
    end the run.
    """

    on_bad: Literal["off", "skip", "rewind", "stop"] = "skip"
    spike: float | None = None
    window: int = 100
    limit: int = 10

    def __post_init__(self) -> None:
        if self.on_bad not in ("off", "skip", "rewind", "stop"):
            raise ConfigError(f"'{self.on_bad}'", where="guard.on_bad", fix="skip, rewind, stop or off")
        if self.spike is not None and not self.spike > 0:
            raise ConfigError(f"{self.spike}", where="guard.spike", fix="standard deviations, such as 6")
        for name in ("window", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)}", where=f"guard.{name}", fix="1 or more")


def memory(guard: Guard | None) -> dict[str, dict[str, jax.Array]]:
    """What a guard keeps in `grad_state` at step 0; nothing without one."""
    if guard is None:
        return {}
    zero = jnp.int32(0)
    names = {"mean": jnp.float32(0), "variance": jnp.float32(0), "seen": zero, "skipped": zero, "row": zero}
    return {KEY: names}


def updates(guard: Guard | None, state: TrainState) -> jax.Array:
    """Steps that were taken: what keys are made of, so that a skipped batch leaves no trace in the next."""
    return state.step if guard is None else state.step - state.grad_state[KEY]["skipped"]


def judge(guard: Guard, old: Memory, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Memory]:
    """Why a step is not taken (0: it is), and the memory after it, of which a skipped step moves the counts alone."""
    height = jnp.log(norm).astype(jnp.float32)
    reason = jnp.where(jnp.isfinite(norm), TAKEN, GRADIENT)
    if guard.spike is not None:
        edge = old["mean"] + guard.spike * jnp.maximum(jnp.sqrt(old["variance"]), LEAST)
        high = (old["seen"] >= guard.window) & (height > edge)
        reason = jnp.where((reason == TAKEN) & high, SPIKE, reason)
    reason = jnp.where(jnp.isfinite(loss), reason, LOSS)
    bad = reason != TAKEN
    share = 1 / jnp.minimum(old["seen"] + 1, guard.window).astype(jnp.float32)
    far = height - old["mean"]
    counts = ~bad & (norm > 0)  # a batch without weight says nothing of gradients
    add = bad.astype(jnp.int32)
    return reason, {
        "mean": jnp.where(counts, old["mean"] + share * far, old["mean"]),
        "variance": jnp.where(counts, (1 - share) * (old["variance"] + share * far**2), old["variance"]),
        "seen": old["seen"] + counts.astype(jnp.int32),
        "skipped": old["skipped"] + add,
        "row": (old["row"] + 1) * add,
    }


def guarded(
    guard: Guard,
    state: TrainState,
    new: tuple[Any, Any, Any],
    metrics: Mapping[str, jax.Array],
) -> tuple[tuple[Any, Any, Any], Any, dict[str, jax.Array]]:
    """Parameters, optimizer state and variables after a step, the state's own after a bad one; `grad_state`; and the
    metrics that tell of it.

    Args:
        new: these three as the step made them. metrics: its `loss`, `grad_norm`, `param_norm` and `tokens`.

    Chosen on the devices: the next step is on its way before a host reads this one's numbers.
    """
    old = state.params, state.opt_state, state.model_state.get("variables", new[2])
    reason, after = judge(guard, state.grad_state[KEY], metrics["loss"], metrics["grad_norm"])
    bad = reason != TAKEN
    kept = jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)
    told = {
        "skipped": reason,
        "skips": after["row"],
        "tokens": jnp.where(bad, 0, metrics["tokens"]),
        "param_norm": jnp.where(
            bad, jnp.nan, metrics["param_norm"]
        ),  # of the old ones it would be one more reduction
    }
    return kept, {**state.grad_state, KEY: after}, told


def pass_over(state: TrainState, rows: int) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step that looks at nothing: in place of one whose batch was found bad before a rewind."""
    old = state.grad_state[KEY]
    after = {**old, "skipped": old["skipped"] + 1, "row": old["row"] + 1}
    new = state.replace(
        step=state.step + 1,
        cursor=advance(state.cursor, rows),
        grad_state={**state.grad_state, KEY: after},
    )
    metrics = {name: jnp.float32(jnp.nan) for name in ("loss", "grad_norm", "param_norm")}
    return new, {**metrics, "tokens": jnp.float32(0), "skipped": jnp.int32(PASSED), "skips": after["row"]}


class Rewind(Exception):  # no error: the run goes on
    """Leaves the loop at a bad step. `step`: its number; `why`: a sentence."""

    def __init__(self, step: int, why: str):
        super().__init__(f"step {step}: {why}")
        self.step, self.why = step, why


class Verdicts:
    """Tells what a guard did, and ends or rewinds the run as it says.

    Args:
        rows: of a global batch. say: takes lines for people.
    """

    def __init__(self, guard: Guard, rows: int, say: Callable[[str], None]):
        self._guard, self._rows, self._say = guard, rows, say

    def skipped(self, step: int, metrics: Mapping[str, float], *, rewinds: bool) -> bool:
        """Whether the step was skipped. `rewinds`: False in a run that is about to leave.

        Raises:
            Rewind: the run goes back. RunError: it ends.
        """
        if not metrics["skipped"]:
            return False
        why = self._why(metrics)
        if (row := int(metrics["skips"])) >= self._guard.limit or self._guard.on_bad == "stop":
            first = step - row + 1
            raise RunError(
                f"{row} steps in a row were bad, the limit is {self._guard.limit}" if row > 1 else why,
                where=f"steps {first} to {step}" if row > 1 else f"step {step}",
                why=f"rows {self._span(first, step)}; the last: {why}",
                fix="look at these rows; a lower learning rate, clipping, or --precision f32; checkpoints from before"
                " are kept, and none of these steps changed the parameters",
            )
        if self._guard.on_bad == "rewind" and rewinds and metrics["skipped"] != PASSED:
            raise Rewind(step, why)
        line = f"step {step}: skipped, rows {self._span(step, step)}: {why}"
        log.warning(line)
        self._say(line)
        return True

    def _span(self, first: int, last: int) -> str:
        return f"{(first - 1) * self._rows} to {last * self._rows - 1}"

    def _why(self, metrics: Mapping[str, float]) -> str:
        return {
            LOSS: f"the loss is {metrics['loss']}",
            GRADIENT: f"the gradient norm is {metrics['grad_norm']}",
            SPIKE: f"the gradient norm {metrics['grad_norm']:.3g} is more than {self._guard.spike} deviations above"
            " those before",
            PASSED: "found bad before a rewind",
        }[int(metrics["skipped"])]
