"""Faults on purpose happen at their step, on their process, in their attempt."""

import math
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import pytest

from shardtrain.errors import ConfigError
from shardtrain.train.inject import Fault, injected, parse


def test_grammar():
    """The fault in mind: a word that is read and not meant."""
    assert parse("") == []
    assert parse("kill@step=12:process=1, slow@step=3:seconds=0.5:attempt=all") == [
        Fault("kill", 12, process=1),
        Fault("slow", 3, seconds=0.5, attempt=None),
    ]
    for wrong in (
        "kill",
        "kill@",
        "kill@step=0",
        "kill@step=1:step=2",
        "kill@step=-1",
        "kill@when=3",
        "slow@step=all",
    ):
        with pytest.raises(ConfigError, match="--inject"):
            parse(wrong)


def test_nothing_is_wrapped_without_a_fault():
    """Of another process or attempt there is none. The fault in mind: a step that pays for what it does not use."""
    step = lambda state, batch: (state, {})
    for environment in (
        {},
        {"SHARDTRAIN_INJECT": "kill@step=1:process=1"},
        {"SHARDTRAIN_INJECT": "kill@step=1", "SHARDTRAIN_ATTEMPT": "1"},
    ):
        assert injected(step, 0, 0, environment) is step
    assert injected(step, 0, 1, {"SHARDTRAIN_INJECT": "kill@step=1:process=1"}) is not step


def test_nan_at_one_step():
    """Floats of that batch alone; integers stay. The fault in mind: counted from the start of a resumed run."""
    seen = []
    step = injected(lambda s, b: seen.append((b["x"], b["id"])), 4, 0, {"SHARDTRAIN_INJECT": "nan@step=6"})
    for _ in range(3):
        step(None, {"x": jnp.ones(2), "id": jnp.arange(2)})
    assert [math.isnan(float(x[0])) for x, _ in seen] == [False, True, False]
    assert all(i.tolist() == [0, 1] for _, i in seen)


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("term", -15)])
def test_a_signal_before_its_step(kind, code):
    """Three steps are done when step 4 never begins. The fault in mind: after the step."""
    program = f"""
    import sys
    from shardtrain.train.inject import injected
    step = injected(lambda s, b: print(s, flush=True), 0, 0, {{"SHARDTRAIN_INJECT": "{kind}@step=4"}})
    for n in range(1, 7): step(n, None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == code and done.stdout.split() == ["1", "2", "3"], done.stderr
