"""Tokens per second, model FLOPs utilisation, and when it will be done."""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable


class Throughput:
    """Fed the time of each step; answers with medians, so that one slow step does not matter.

    The first step, which may compile, does not count once there is a second.

    Args:
        flops_per_step: training FLOPs of a global batch, or None.
        peak: FLOP/s of all devices together, or None where it is not known (CPUs): then there is no MFU.
        clock: seconds; for tests.
    """

    def __init__(
        self, flops_per_step: float | None, peak: float | None, clock: Callable[[], float] = time.perf_counter
    ):
        self.flops_per_step, self.peak, self.clock = flops_per_step, peak, clock
        self._seconds: collections.deque[float] = collections.deque(maxlen=64)
        self._tokens: collections.deque[float] = collections.deque(maxlen=64)
        self._last: float | None = None
        self._steps = 0

    def start(self) -> None:
        """From here on; called again after a pause (evaluation, a save) so that it does not count."""
        self._last = self.clock()

    def step(self, tokens: float) -> float:
        """One more step is done. Returns its seconds."""
        now = self.clock()
        seconds = now - self._last if self._last is not None else 0.0
        self._last = now
        self._steps += 1
        if self._steps == 2:
            self._seconds.clear()
            self._tokens.clear()
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        return seconds

    @property
    def step_seconds(self) -> float | None:
        """Median of the last steps."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median tokens of a step over its median seconds."""
        seconds = self.step_seconds
        return statistics.median(self._tokens) / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, 0 to 1. Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B."""
        if not self.flops_per_step or not self.peak or not self.step_seconds:
            return None
        return self.flops_per_step / self.step_seconds / self.peak

    def seconds_left(self, steps: int) -> float | None:
        """Estimated seconds for `steps` more steps; evaluations and saves come on top."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * steps
