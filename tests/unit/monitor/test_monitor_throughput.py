"""Speed by a clock that the test holds."""

import pytest

from shardtrain.monitor import Throughput
from shardtrain.monitor.progress import time_text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fed(seconds: list[float], tokens: float = 64.0, **facts: float | None) -> Throughput:
    clock = Clock()
    meter = Throughput(facts.get("flops_per_step"), facts.get("peak"), clock=clock)
    meter.start()
    for s in seconds:
        clock.now += s
        assert meter.step(tokens) == s
    return meter


def test_arithmetic_is_exact():
    """Failed once with FLOP/s of one device instead of all, and once with tokens times seconds."""
    meter = fed([0.5] * 8, tokens=64, flops_per_step=3e12, peak=2e13)
    assert meter.step_seconds == 0.5
    assert meter.tokens_per_second == 128
    assert meter.mfu == pytest.approx(3e12 / 0.5 / 2e13, rel=1e-12)
    assert meter.seconds_left(120) == 60


def test_unknown_stays_unknown():
    """Without peak or FLOPs there is no MFU, and before a step nothing. Failed once with an MFU of 0."""
    assert fed([1.0, 1.0], flops_per_step=1e9).mfu is None
    assert fed([1.0, 1.0], peak=1e12).mfu is None
    meter = fed([])
    assert (meter.step_seconds, meter.tokens_per_second, meter.mfu, meter.seconds_left(5)) == (None,) * 4


def test_compiling_does_not_count():
    """The first step counts only while it is the only one. Failed once at 2 steps: median 50.5."""
    assert fed([100.0]).step_seconds == 100
    assert fed([100.0, 1.0]).step_seconds == 1
    assert fed([100.0, 1.0, 3.0]).step_seconds == 2


def test_one_slow_step_does_not_matter():
    """Failed once with the mean."""
    assert fed([9.0, 1.0, 1.0, 500.0, 1.0]).tokens_per_second == 64


def test_the_last_steps_count():
    """A run that slowed down says so. Failed once with a median over the whole run."""
    assert fed([1.0] * 200 + [2.0] * 64).step_seconds == 2


def test_a_pause_is_left_out():
    """Failed once when `start` did not move the clock."""
    clock = Clock()
    meter = Throughput(None, None, clock=clock)
    meter.start()
    clock.now += 1
    meter.step(1)
    clock.now += 50  # an evaluation
    meter.start()
    clock.now += 2
    assert meter.step(1) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (123, "2:03"), (3723, "1:02:03"), (90061, "1d 1:01:01")],
)
def test_time_left_reads_as_a_clock(seconds, text):
    """Failed once with 59.6 as 0:60."""
    assert time_text(seconds) == text
