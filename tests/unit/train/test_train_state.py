"""The state is one pytree: its fields come and go, its leaves stay flat, its cursor counts far."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardtrain.train.state import FIELDS, TrainState, advance, cursor_words
from shardtrain.tree import flatten


def make():
    params = {"b": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "a": jnp.arange(4.0)}
    return TrainState.of(
        step=jnp.int32(7),
        params=params,
        model_state={"variables": {"mean": jnp.ones(2)}, "frozen": {}},
        opt_state=optax.adamw(1e-3).init(params),
        grad_state={},
        key=jax.random.key_data(jax.random.key(0)),
        cursor=cursor_words(2**32 + 5),
    )


def test_it_is_a_tree_of_its_fields():
    """Through `jax.tree` and back, and through jit. Failed once with the leaves in another order than the fields."""
    state = make()
    leaves, structure = jax.tree.flatten(state)
    assert all(a is b for a, b in zip(leaves, state.leaves, strict=True))
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    for name in FIELDS:
        before, after = getattr(state, name), getattr(again, name)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(state)
    np.testing.assert_array_equal(doubled.params["a"], 2 * state.params["a"])
    assert int(doubled) == 14 and isinstance(doubled.opt_state[0], optax.ScaleByAdamState)


def test_leaves_have_paths():
    """Named by field. Failed once with positions instead of names."""
    paths = list(flatten(make()))
    assert {"step", "params/a", "params/b/bias", "params/b/kernel", "model_state/variables/mean"} <= set(
        paths
    )
    assert paths[-2:] == ["key", "cursor"] and len(paths) == len(make().leaves)
    assert all(p.split("/")[0] in FIELDS for p in paths)


def test_replace_changes_what_it_names():
    """Failed once when it changed the state in place."""
    state = make()
    new = state.replace(step=jnp.int32(8), params={"only": jnp.zeros(1)})
    assert int(new) == 8 and int(state) == 7 and list(new.params) == ["only"] and "a" in state.params
    np.testing.assert_array_equal(new.key, state.key)
    assert len(new.leaves) == len(state.leaves) - 2


@pytest.mark.parametrize("wrong", [lambda: make().replace(stpe=1), lambda: TrainState.of(step=1)])
def test_fields_are_these(wrong):
    """Failed once when an unknown field was dropped silently."""
    with pytest.raises((AssertionError, KeyError)):
        wrong()


def test_attributes_are_its_fields_alone():
    """Also while Python copies it, before it has any. Failed once with endless recursion in `copy`."""
    with pytest.raises(AttributeError):
        _ = make().parameters
    assert int(copy.copy(make())) == 7 and copy.deepcopy(make()).rows_consumed() == 2**32 + 5


@pytest.mark.parametrize(
    ("start", "rows"), [(0, 8), (2**32 - 8, 8), (2**32 - 1, 8), (2**33 - 3, 4096), (2**40 + 7, 2**31)]
)
def test_the_cursor_carries(start, rows):
    """Past 2**32, under jit and without 64-bit integers. Failed once with `<=`, which carried at 0 rows,
    and without the carry."""
    words = jax.jit(advance, static_argnums=1)(cursor_words(start), rows)
    assert words.dtype == jnp.uint32
    assert make().replace(cursor=words).rows_consumed() == start + rows
    same = jax.jit(advance, static_argnums=1)(cursor_words(start), 0)
    assert make().replace(cursor=same).rows_consumed() == start


def test_rows_add_up_over_many_steps():
    """Exactly what a counter without bounds counts. Failed once with the carry lost in a scan."""
    start = 2**32 - 100
    end = jax.lax.scan(lambda c, _: (advance(c, 48), None), jnp.asarray(cursor_words(start)), None, 50)[0]
    assert make().replace(cursor=end).rows_consumed() == start + 50 * 48
