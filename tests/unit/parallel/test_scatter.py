"""A reduce-scatter done in turn over small rings is the one over the whole axis."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.parallel import fsdp
from shardtrain.sharding import context
from shardtrain.tree import flatten


@pytest.fixture
def rings_of_two(monkeypatch):
    monkeypatch.setattr(fsdp, "RING", 2)
    monkeypatch.setattr(fsdp, "device_of", lambda mesh: types.SimpleNamespace(platform="tpu"))


@pytest.mark.parametrize(
    ("n", "factors"), [(8, [8]), (16, [4, 4]), (32, [4, 8]), (24, [4, 6]), (256, [4, 4, 4, 4]), (17, [17])]
)
def test_factors(n, factors):
    assert fsdp._factors(n) == factors


@pytest.mark.parametrize("axes", [("x",), ("x", "y")])
@pytest.mark.parametrize(("shape", "dim"), [((16, 4), 0), ((3, 16, 2, 5), 1), ((8, 2, 3), 0), ((3, 16), 1)])
def test_in_turn_is_the_same(axes, shape, dim, rings_of_two):
    """Failed once with the digits of a member's index in the other order: parts came to the wrong devices; and with the
    parts of a short vector cut by the index along the last axis alone."""
    sizes = dict(zip(axes, (8,) if len(axes) == 1 else (2, 4), strict=True))
    mesh = st.make_mesh(**sizes)
    layout = context.Layout(mesh, {})
    x = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)

    def run(function):
        spec = jax.sharding.PartitionSpec(axes)
        body = lambda x: function(x[0])[None]
        with context.use(layout):
            return np.asarray(jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(x))

    whole = run(lambda x: jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True))
    np.testing.assert_allclose(run(lambda x: fsdp.reduce_scatter(x, axes, dim)), whole, rtol=1e-5, atol=1e-6)


def test_inside_of_a_step_with_an_automatic_axis(rings_of_two, monkeypatch):
    """Gradients of fsdp x tensor, in turn and not. The fault in mind: groups of the whole mesh, not of the axis."""

    def gradients():
        model = (
            lambda key: {"up": jax.random.normal(key, (64, 256)), "down": jax.random.normal(key, (256, 64))},
            lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"],
        )
        plan = st.plan(
            model,
            lambda model, batch: jnp.square(model(batch["x"])).mean(),
            optax.sgd(0.1),
            batch=st.batch_spec(x=(32, 64)),
            mesh=st.make_mesh(fsdp=4, tensor=2),
            annotations={"up": ("embed", "mlp"), "down": ("mlp", "embed")},
        )
        rows = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
        compiled = plan.jit(lambda state, batch: plan.gradients(state, batch)[0])
        runs = sum(c.count for c in compiled.collectives() if c.op == "reduce-scatter")
        return {
            k: np.asarray(v) for k, v in flatten(compiled(plan.init(0), plan.put({"x": rows}))).items()
        }, runs

    in_turn, many = gradients()
    monkeypatch.setattr(fsdp, "RING", 8)
    at_once, few = gradients()
    assert many == 2 * few > 0
    for name, gradient in at_once.items():
        np.testing.assert_allclose(in_turn[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)
