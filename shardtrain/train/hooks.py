"""What users add to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardtrain.errors import ConfigError


class Hook:
    """Override what you need. Metrics are plain numbers, one step late, so that nothing waits for the device.

    A plain function `(step, metrics)` works as a hook too.
    """

    def on_start(self, step: int, state: Any) -> None:
        """Before the first step of this start of the run."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each step."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each evaluation."""

    def on_end(self, step: int, state: Any) -> None:
        """After the last step, before the last checkpoint is awaited."""


class _Function(Hook):
    def __init__(self, function: Any):
        self.function = function

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.function(step, metrics)


def as_hook(hook: Any) -> Hook:
    """A `Hook` from itself or from a function `(step, metrics)`.

    Raises:
        ConfigError: it is neither; a class instead of an object of it, say.
    """
    if isinstance(hook, Hook):
        return hook
    if isinstance(hook, type) or not callable(hook):
        name = hook.__name__ if isinstance(hook, type) else type(hook).__name__
        raise ConfigError(
            f"{name} is no hook",
            where="hooks",
            fix=f"{name}()" if isinstance(hook, type) else "a Hook, or a function (step, metrics)",
        )
    return _Function(hook)
