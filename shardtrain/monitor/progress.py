"""A progress bar on stderr; plain lines where stderr is no terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any


class Progress:
    """Shows step, loss, tokens/s, MFU and time left. `enabled=False` is silent."""

    def __init__(self, steps: int, *, enabled: bool = True, every: float = 10.0):
        self.steps, self.every = steps, every
        self._bar: Any = None
        self._task: Any = None
        self._enabled = enabled
        self._said = -math.inf

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),  # with our own time left: rich takes a resume for speed
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.steps, text="compiling")
        return self

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float | None,
        mfu: float | None,
        seconds_left: float | None = None,
    ) -> None:
        """After a step whose metrics are known."""
        text = f"loss {loss:.4f}"
        if tokens_per_second:
            text += f"  {tokens_per_second:,.0f} tokens/s"
        if mfu is not None:
            text += f"  MFU {mfu:.1%}"
        if seconds_left is not None and step < self.steps:
            text += f"  {time_text(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._enabled and (time.monotonic() - self._said > self.every or step == self.steps):
            self._said = time.monotonic()
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def time_text(seconds: float) -> str:
    """`1:02:03`, `2:03`, or days in front: `3d 1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock
