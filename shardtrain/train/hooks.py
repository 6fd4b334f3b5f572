"""What users add to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
    """A `Hook` from itself or from a function `(step, metrics)`."""
    return hook if isinstance(hook, Hook) else _Function(hook)
