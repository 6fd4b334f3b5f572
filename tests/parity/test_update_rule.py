"""theta <- theta - (eta/P) sum_i g_i, by hand in NumPy; and what weights change in it."""

import jax
import numpy as np
import optax
import pytest

import shardtrain as st

ETA, P, ROWS = 0.1, 8, 32
MODEL = (lambda key: {"w": jax.random.normal(key, (5,))}, lambda params, x: x @ params["w"])


def data():
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(ROWS, 5)).astype("f"), "y": random.normal(size=ROWS).astype("f")}


def gradient(w, x, y):
    """Of the mean of squares over these rows."""
    return 2 * x.T @ (x @ w - y) / len(y)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_equal_shards(sizes):
    """Failed once with the gradient summed over shards instead of averaged."""
    batch = data()
    loss = lambda model, batch: ((model(batch["x"]) - batch["y"]) ** 2).mean()
    plan = st.plan(MODEL, loss, optax.sgd(ETA), batch=st.batch_spec(**batch), mesh=st.make_mesh(**sizes))
    state = plan.init(0)
    w = np.asarray(state.params["w"], np.float64)
    shards = [gradient(w, batch["x"][i::P], batch["y"][i::P]) for i in range(P)]
    state, _ = plan.compile()(state, plan.put(batch))
    np.testing.assert_allclose(state.params["w"], w - ETA / P * sum(shards), rtol=1e-5)


def test_shards_that_weigh_differently():
    """The fault in mind: a mean of means. The sum of gradients over the sum of weights; a shard may weigh nothing."""
    batch = {**data(), "weight": np.random.default_rng(1).random(ROWS).astype("f")}
    batch["weight"][0::P] = 0

    def loss(model, batch):
        each = (model(batch["x"]) - batch["y"]) ** 2
        return st.Loss((batch["weight"] * each).sum(), batch["weight"].sum())

    plan = st.plan(MODEL, loss, optax.sgd(ETA), batch=st.batch_spec(**batch), mesh=st.make_mesh(data=8))
    state = plan.init(0)
    w = np.asarray(state.params["w"], np.float64)
    residual = batch["x"] @ w - batch["y"]
    whole = 2 * batch["x"].T @ (batch["weight"] * residual) / batch["weight"].sum()
    means = np.mean(
        [
            2
            * batch["x"][i::P].T
            @ (batch["weight"][i::P] * residual[i::P])
            / max(batch["weight"][i::P].sum(), 1e-9)
            for i in range(P)
        ],
        axis=0,
    )
    state, _ = plan.compile()(state, plan.put(batch))
    np.testing.assert_allclose(state.params["w"], w - ETA * whole, rtol=1e-5)
    assert np.abs(whole - means).max() > 1e-2, "the example must tell the two apart"
