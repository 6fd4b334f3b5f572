"""Latency and bandwidth out of timings, some of which may be wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Timing(NamedTuple):
    """One collective: steps of a ring, bytes sent by a device, seconds."""

    hops: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """seconds = hops x `hop_seconds` + bytes / `bandwidth`. `residual`: median of |predicted / measured - 1| over all timings,
    those that were left out (`dropped`) included."""

    hop_seconds: float
    bandwidth: float
    residual: float
    dropped: int

    def seconds(self, hops: float, sent: float) -> float:
        return hops * self.hop_seconds + sent / self.bandwidth


def fit(timings: Sequence[Timing]) -> Fit:
    """The two constants under which the relative errors are smallest, a quarter of the timings (at least one) left out.

    A line through every pair is tried, and the one kept whose errors, the largest left out, have the smallest sum (least
    trimmed deviations; Rousseeuw, 1984); then the least squares of relative errors over what it explains. So timings that
    follow the formula give its constants exactly, also where one of four is anything at all.

    Raises:
        ValueError: fewer than three timings, or none of different bytes.
    """
    if len(timings) < 3 or len({t.bytes for t in timings}) < 2:
        raise ValueError(f"{len(timings)} timings of {len({t.bytes for t in timings})} sizes")
    most = max(1, len(timings) // 4)
    found = [c for a, b in itertools.combinations(timings, 2) if (c := _solved([a, b])) is not None]
    # Where latency does not show, or bandwidth does not, one constant alone explains it.
    found += [(0.0, t.seconds / t.bytes) for t in timings if t.bytes]

    def errors(constants: tuple[float, float]) -> list[float]:
        return [abs(constants[0] * t.hops + constants[1] * t.bytes - t.seconds) / t.seconds for t in timings]

    start = min(found, key=lambda c: sum(sorted(errors(c))[: len(timings) - most]))
    order = sorted(zip(errors(start), timings, strict=True), key=lambda pair: pair[0])
    kept = [t for _, t in order[: len(timings) - most]]
    near = 3 * order[len(kept) - 1][0] + 1e-9
    kept += [t for error, t in order[len(kept) :] if error <= near]
    better = _solved(kept) or start
    constants = better if sum(errors(better)) <= sum(errors(start)) or len(kept) < len(timings) else start
    return Fit(
        hop_seconds=constants[0],
        bandwidth=1 / constants[1] if constants[1] else math.inf,
        residual=statistics.median(errors(constants)),
        dropped=len(timings) - len(kept),
    )


def _solved(timings: Sequence[Timing]) -> tuple[float, float] | None:
    """Least squares of relative errors; None where both constants cannot be told apart or one would be negative."""
    hh = hb = bb = h = b = 0.0
    for t in timings:
        x, y = t.hops / t.seconds, t.bytes / t.seconds
        hh, hb, bb, h, b = hh + x * x, hb + x * y, bb + y * y, h + x, b + y
    determinant = hh * bb - hb * hb
    if determinant <= 1e-12 * hh * bb:
        return None
    latency, slope = (h * bb - b * hb) / determinant, (b * hh - h * hb) / determinant
    return (max(0.0, latency), slope) if latency >= -1e-9 and slope > 0 else None
