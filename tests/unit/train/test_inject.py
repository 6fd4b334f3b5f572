"""Faults on purpose happen at their step, on their process, in their attempt."""

import math
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.checkpoint import list_steps, verify
from shardtrain.errors import ConfigError, RunError
from shardtrain.train.inject import Fault, injected, parse


def test_grammar():
    """The fault in mind: a word that is read and not meant."""
    assert parse("") == []
    assert parse("kill@step=12:process=1, slow@step=3:seconds=0.5:attempt=all") == [
        Fault("kill", 12, process=1),
        Fault("slow", 3, seconds=0.5, attempt=None),
    ]
    assert parse("disk-full@step=4:saves=2") == [Fault("disk-full", 4, saves=2)]
    for wrong in (
        "kill",
        "kill@",
        "kill@step=0",
        "kill@step=1:step=2",
        "kill@step=-1",
        "kill@when=3",
        "slow@step=all",
        "disk-full@step=2:process=1",
        "disk-full@step=2:saves=x",
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
    with pytest.raises(ConfigError, match="nothing is saved"):
        injected(step, 0, 0, {"SHARDTRAIN_INJECT": "corrupt@step=1"})


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


def fit(output, steps):
    return st.fit(
        (lambda key: {"w": jnp.ones((8, 8))}, lambda p, x: x @ p["w"]),
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adam(1e-3),
        [{"x": np.full((8, 8), i, np.float32)} for i in range(14)],
        mesh=st.make_mesh(data=8),
        steps=steps,
        output=output,
        checkpoint_every=2,
        keep=9,
        progress=False,
    )


def intact(output):
    return {entry["step"]: entry["intact"] for entry in verify(output / "checkpoints")["steps"]}


def test_a_corrupted_checkpoint(tmp_path, monkeypatch, caplog):
    """One bit of the newest committed step, no other; the next start goes on from the one before, to the same end.
    Failed once with the step whose save was still under way."""
    whole = fit(None, 9)
    monkeypatch.setenv("SHARDTRAIN_INJECT", "corrupt@step=7")
    fit(tmp_path, 6)  # the fault is of a step that is not reached
    with pytest.raises(ConfigError, match="no step is committed yet"):
        monkeypatch.setenv("SHARDTRAIN_INJECT", "corrupt@step=1")
        fit(tmp_path / "new", 2)
    monkeypatch.setenv("SHARDTRAIN_INJECT", "corrupt@step=7, corrupt@step=9")
    fit(tmp_path, 9)
    assert intact(tmp_path) == {2: True, 4: True, 6: False, 8: False, 9: True}
    monkeypatch.delenv("SHARDTRAIN_INJECT")
    (tmp_path / "checkpoints/9").rename(tmp_path / "elsewhere")
    run = fit(tmp_path, 9)
    assert run.resumed_from == 4 and "checkpoints/6 is damaged" in caplog.text
    assert np.asarray(run.state.params["w"]).tobytes() == np.asarray(whole.state.params["w"]).tobytes()


def test_a_full_disk(tmp_path, monkeypatch, caplog):
    """Two saves fail and say so, the one under way and those after are whole; all fail, and the run ends with the steps
    before. Failed once with the fault in the save under way."""
    monkeypatch.setenv("SHARDTRAIN_INJECT", "disk-full@step=5:saves=2")
    assert fit(tmp_path / "a", 14).stopped == "done"
    steps = [entry["step"] for entry in list_steps(tmp_path / "a/checkpoints")]
    # a failure is told when the next save falls due, in its place
    assert steps[:2] == [2, 4] and 6 not in steps and steps[-1] == 14, steps
    assert caplog.text.count("No space left on device") == 2 and set(intact(tmp_path / "a").values()) == {
        True
    }
    monkeypatch.setenv("SHARDTRAIN_INJECT", "disk-full@step=3")
    with pytest.raises(
        RunError, match=r"(5 saves in a row|the last save) failed.*\n.*No space left"
    ) as caught:
        fit(tmp_path / "b", 14)
    assert "free space" in str(caught.value) and intact(tmp_path / "b") == {2: True}
