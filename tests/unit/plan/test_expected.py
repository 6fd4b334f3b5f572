"""`st.assert_collectives`: exact, readable, and with the way out."""

import jax
import jax.numpy as jnp
import optax
import pytest

import shardtrain as st

WIDTH = 128
REDUCED = 2 * 7 / 8 * 2 * WIDTH * WIDTH * 4  # two float32 weights, all-reduced over 8


@pytest.fixture(scope="module")
def step():
    """Two weights under data: one all-reduce of both, and scalars."""
    init = lambda key: {n: jax.random.normal(key, (WIDTH, WIDTH)) for n in ("up", "out")}
    plan = st.plan(
        (init, lambda p, x: jnp.tanh(x @ p["up"]) @ p["out"]),
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(32, WIDTH)),
        mesh=st.make_mesh(data=8),
        rules="data",
        microbatches=2,
    )
    return plan.compile()


@pytest.mark.parametrize(
    "wanted", [1, range(1, 3), "224 KiB", "<= 224 KiB", "<= 1 MiB", "0.219 MiB", ...], ids=str
)
def test_what_fits(step, wanted):
    """Every form of a value. The fault in mind: a range taken for a number of bytes."""
    assert REDUCED == 224 * 1024
    st.assert_collectives(step, {"all-reduce over data": wanted})
    st.assert_collectives(step.collectives(), {"all-reduce over data": wanted})


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (2, "expected 2 runs, found 1 run, 224.0 KiB"),
        (range(2, 5), "expected 2 to 4 runs, found 1 run"),
        ("200 KiB", "expected 200 KiB, found 1 run, 224.0 KiB"),
        ("300 KiB", "expected 300 KiB, found"),
        ("<= 200 KiB", "expected <= 200 KiB, found"),
    ],
    ids=str,
)
def test_what_does_not_fit(step, wanted, says):
    """The faults in mind: a bound read as a value, a value as a bound."""
    with pytest.raises(AssertionError) as caught:
        st.assert_collectives(step, {"all-reduce over data": wanted})
    assert f"! all-reduce over data: {says}" in str(caught.value)


def test_what_is_not_named_is_forbidden(step):
    """With what it sends, and the mapping that would pass. The fault in mind: lines left out."""
    with pytest.raises(AssertionError) as caught:
        st.assert_collectives(step, {"reduce-scatter over data": 1})
    text = str(caught.value)
    assert "- reduce-scatter over data: expected 1 run, found none" in text
    assert "+ all-reduce over data: expected none, found 1 run, 224.0 KiB" in text
    assert (
        "f32[128,128]" in text and "parallel/fsdp.py:" in text
    )  # who sums gradients; nobody's line of a model
    assert '{"all-reduce over data": 1}' in text.splitlines()[-1]


def test_small_ones_are_left_out_unless_asked_for(step):
    """The loss and the norm travel in a few bytes. The fault in mind: `ignore_below` applied to what is named."""
    small = [c for c in step.collectives() if c.bytes < 4096]
    names = {f"{c.op} over {c.axis}" for c in step.collectives()}
    st.assert_collectives(step, dict.fromkeys(names, ...), ignore_below=0)
    everything = sum(c.count for c in step.collectives() if (c.op, c.axis) == ("all-reduce", "data"))
    st.assert_collectives(step, {"all-reduce over data": everything})
    with pytest.raises(AssertionError, match="found none"):
        st.assert_collectives(step, {"all-reduce over data": 1, "all-gather over data": 1})
    assert not small or everything > 1


@pytest.mark.parametrize(
    ("key", "wanted", "says"),
    [
        ("all-reduce", 1, "OPERATION over AXIS"),
        ("all-reduced over data", 1, "'all-reduce'"),
        ("all-reduce over data", "3 MB", "3 MB"),
        ("all-reduce over data", "many", "many"),
    ],
)
def test_expectations_that_say_nothing(step, key, wanted, says):
    """The fault in mind: a mistyped name that is never found, and a test that passes for it."""
    with pytest.raises(st.ConfigError) as caught:
        st.assert_collectives(step, {key: wanted})
    assert says in str(caught.value)


def test_an_axis_that_the_mesh_lacks(step):
    """`{"all-gather over modle": ...}` would pass for ever: the fault in mind."""
    with pytest.raises(st.ConfigError, match="no mesh axis 'modle'"):
        st.assert_collectives(step, {"all-reduce over data": 1, "all-gather over modle": ...})
