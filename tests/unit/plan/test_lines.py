"""Whose lines a program knows."""

import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.plan import aot, compiled, lines


def squared(model, batch, rngs):
    return ((model(batch["x"]) - batch["x"]) ** 2).mean()


def modules(monkeypatch, plan):
    """What a target's compiler would be given of the same plan, asked for from two lines."""
    found = []

    def refuse(module, *_):
        found.append(module.operation.get_asm(enable_debug_info=True))
        raise st.CompileError("seen")

    monkeypatch.setattr(aot, "compile_for", refuse)
    with pytest.raises(st.CompileError):
        plan.compile(target=st.Target("cpu:8"))
    with pytest.raises(st.CompileError):
        plan.compile(target=st.Target("cpu:8"))
    return found


def test_who_asks_for_a_program_is_no_part_of_it(monkeypatch):
    """A cell that is run again, or another command, finds the program in the cache, with the lines of the model in it.
    Failed once with all frames kept."""
    plan = st.plan(
        lambda rngs: nnx.Linear(8, 8, rngs=rngs),
        squared,
        optax.adam(1e-3),
        batch=st.batch_spec(x=(16, 8)),
        mesh=st.Target("cpu:8").mesh(data=8),
    )
    first, second = modules(monkeypatch, plan)
    assert first == second
    line = squared.__code__.co_firstlineno + 1
    assert f'"{__file__}":{line}:' in first
    monkeypatch.setattr(compiled, "without_callers", lambda module, file: module)
    first, second = modules(monkeypatch, plan)
    assert first != second


def test_frames_within_frames_are_cut_one_by_one():
    outer = '"main"("/a/(b.py":9:1 to :9)'
    ours = '"step"("/of/ours.py":5:1 to :9)'
    inner = (
        f'callsite("f"("/m.py":1:2 to :3) at callsite({ours} at callsite("x"("/y.py":2:2 to :3) at {outer})))'
    )
    text = f'loc("mul"(callsite({inner} at {outer})))'
    cut = f'callsite("f"("/m.py":1:2 to :3) at {ours})'
    assert lines._up_to("/of/ours.py", text) == f'loc("mul"(callsite({cut} at {outer})))'
    assert lines._up_to("/of/others.py", text) == text
