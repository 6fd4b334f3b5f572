"""Parameters and moments in 16 bits: the bytes they save, and what they round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.config.build import learning_rate, optimizer
from shardtrain.config.schema import Optimizer, RunConfig
from shardtrain.errors import ConfigError
from shardtrain.models import GPTConfig
from shardtrain.tree import flatten

WIDTH = 64
ELEMENTS = 2 * WIDTH * WIDTH


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, WIDTH), jnp.float32) / 8,
        "down": jax.random.normal(down, (WIDTH, WIDTH), jnp.float32) / 8,
    }


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(model, batch):
    return jnp.square(model(batch["x"])).mean(-1).mean()


def planned(mesh, moments=None, **options):
    return st.plan(
        (init, apply),
        loss,
        optax.adamw(1e-2, mu_dtype=moments),
        batch=st.batch_spec(x=(16, WIDTH)),
        mesh=mesh,
        rules=st.rules.infer,
        **options,
    )


@pytest.fixture(scope="module")
def mesh():
    return st.make_mesh(fsdp=8)


def test_memory_shrinks_by_what_is_narrower(mesh):
    """The step's arguments, by the compiler's own count.

    Failed once: the optimizer started from parameters in 16 bits, and so did its squares.
    """
    wide, moments, both = (
        planned(mesh),
        planned(mesh, "bfloat16"),
        planned(mesh, "bfloat16", param_dtype="bf16"),
    )
    held = [plan.compile().memory()["arguments"] for plan in (wide, moments, both)]
    part = ELEMENTS // 8
    assert [held[0] - h for h in held] == [0, 2 * part, 4 * part]
    assert [wide.state_bytes - p.state_bytes for p in (wide, moments, both)] == [0, 2 * part, 4 * part]
    dtypes = {p: str(x.dtype) for p, x in flatten(both.abstract_state.opt_state).items() if x.ndim}
    assert {d for p, d in dtypes.items() if "mu" in p} == {"bfloat16"}
    assert {d for p, d in dtypes.items() if "nu" in p} == {"float32"}


def rows():
    return {"x": np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)}


def test_an_update_is_rounded_once(mesh, tmp_path):
    """Parameters after a step are those before plus the float32 update, rounded; dtypes stay; a checkpoint brings every
    bit back. The fault in mind: an optimizer that works in 16 bits because its parameters are."""
    plan = planned(mesh, "bfloat16", param_dtype="bf16")
    step, state = plan.compile(donate=False), plan.init(0)
    gradients, _ = jax.jit(plan.gradients)(state, plan.put(rows()))
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    before = jax.tree.map(lambda p: p.astype(jnp.float32), jax.device_get(state.params))
    tx = optax.adamw(1e-2, mu_dtype="bfloat16")
    updates, _ = tx.update(jax.device_get(gradients), tx.init(before), before)
    new, _ = step(state, plan.put(rows()))
    for path, leaf in flatten(jax.device_get(new.params)).items():
        exact = flatten(before)[path] + flatten(updates)[path]
        # One rounding: half a place of bf16, and the order of float32 sums.
        assert leaf.dtype == jnp.bfloat16
        assert np.all(np.abs(np.float32(leaf) - exact) <= np.abs(exact) * 2**-8 + 1e-6)
    for abstract, leaf in zip(jax.tree.leaves(plan.abstract_state), jax.tree.leaves(new), strict=True):
        assert abstract.dtype == leaf.dtype
    with st.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(new, force=True)
        back = checkpointer.restore(planned(st.make_mesh(data=8), "bfloat16", param_dtype="bf16"))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def config(**optimizer):
    return RunConfig(model=GPTConfig(), optimizer=Optimizer(**optimizer))


@pytest.mark.parametrize(
    ("options", "count"),
    [({"name": "adamw"}, 1), ({"name": "lion"}, 1), ({"name": "sgd", "momentum": 0.9}, 1)],
)
def test_state_dtype_of_a_config(options, count):
    made = config(**options, state_dtype="bf16")
    state = optimizer(made, learning_rate(made)).init({"kernel": jnp.zeros((4, 4))})
    narrow = [x for x in jax.tree.leaves(state) if x.ndim and x.dtype == jnp.bfloat16]
    assert len(narrow) == count


@pytest.mark.parametrize("options", [{"name": "adafactor"}, {"name": "sgd"}])
def test_no_state_to_narrow(options):
    made = config(**options, state_dtype="bf16")
    with pytest.raises(ConfigError, match=f"{options['name']} keeps no average"):
        optimizer(made, learning_rate(made))


def test_f64_takes_no_narrow_parameters(mesh):
    with jax.enable_x64(True), pytest.raises(ConfigError, match="under precision 'f64'"):
        planned(mesh, precision="f64", param_dtype="bf16")
