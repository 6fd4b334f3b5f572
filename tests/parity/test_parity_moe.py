"""Mixture of experts on every layout equals one device with the same groups: dropout on, uneven weights, drops."""

import functools

import jax
import numpy as np
import pytest
from compare import EXPERT_LAYOUTS, GROUPS, Trained, assert_equal, difference, leaf_difference, planned, train
from test_parity_language import batches

from shardtrain.models import MoEConfig, build_model, language_model_loss
from shardtrain.train import step as steps
from shardtrain.tree import flatten

SIZES = dict(vocab=128, sequence=32, embed=64, heads=4, kv_heads=4, experts=8, expert_mlp=32, dropout=0.1)
CONFIGS = {
    # Both are balanced by a bias, so that their state tells who was chosen how often.
    "capacity": MoEConfig(**SIZES, layers=1, chosen=2, capacity=1.0, remat="full", bias_rate=0.001),
    "dropless": MoEConfig(
        **SIZES,
        layers=1,
        chosen=3,
        shared=1,
        score="sigmoid",
        capacity=0.0,
        bias_rate=0.001,
    ),
}
LOAD, BIAS = "variables/blocks/mlp/load", "variables/blocks/mlp/bias"
make = lambda name: lambda rngs: build_model(CONFIGS[name], rngs)


@functools.cache
def first_step(name: str, layout: str | None) -> tuple[dict, dict, dict]:
    """Gradients, metrics and state of the first step, of one program."""
    plan = planned(make(name), language_model_loss, batches(1)[0], layout)

    def run(state, batch):
        grads, scalars, variables, names = steps.gradients(
            plan._parts(train=True), state.params, state.model_state, state.key, state.step, batch
        )
        return grads, steps._ratios(scalars, names), variables

    state = plan.init(0)
    return tuple(jax.device_get(flatten(x)) for x in jax.jit(run)(state, plan.put(batches(1)[0])))


@functools.cache
def trained(name: str, layout: str | None) -> Trained:
    return train(make(name), language_model_loss, batches(), layout, steps=5)


def flips(ours: dict, reference: dict, load: str) -> float:
    """Choices that went to another expert."""
    return float(GROUPS * np.abs(ours[load] - reference[load]).sum() / 2)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("capacity", layout) for layout in ("expert8", "data-expert", "expert-tensor-fsdp")),
        *(("dropless", layout) for layout in ("fsdp-expert", "expert-context")),
    ],
)
def test_first_step(name, layout, record_property):
    """Gradients leaf by leaf, and not one choice that went elsewhere: a near tie that rounding decides otherwise is
    counted, not tolerated. The fault in mind: gradients of experts also added up over the expert axis."""
    (ours, metrics, state), (reference, expected, before) = first_step(name, layout), first_step(name, None)
    record_property("flips", flips(state, before, "blocks/mlp/load"))
    assert flips(state, before, "blocks/mlp/load") == 0
    worst, leaf = leaf_difference(ours, reference)
    assert worst < 1e-5, f"gradient of {leaf} differs by {worst:.2e}"
    for metric in ("balance", "router_z", "dropped", "ce"):
        assert metrics[metric] == pytest.approx(expected[metric], rel=1e-5), metric
    assert (expected["dropped"] > 0) == (name == "capacity")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, x) for n in CONFIGS for x in EXPERT_LAYOUTS if (n, x) != ("capacity", "expert-context")],
)
def test_five_steps(name, layout):
    """Losses and parameters too, on every layout, and the bias bit for bit."""
    ours, reference = trained(name, layout), trained(name, None)
    assert flips(ours.state, reference.state, LOAD) == 0
    assert_equal(ours, reference)
    np.testing.assert_array_equal(ours.state[BIAS], reference.state[BIAS])
    assert np.abs(reference.state[BIAS]).max() > 0


def test_a_reduction_too_many_is_seen(monkeypatch):
    """Planted: gradients of experts added up over every batch axis."""
    true = steps.reduce_leaf

    def over_all(gradient, shard, target, axes):
        reduced = true(gradient, shard, target, axes)
        return jax.lax.psum(reduced, "expert") if shard.kept else reduced

    monkeypatch.setattr(steps, "reduce_leaf", over_all)
    ours = first_step.__wrapped__("capacity", "expert8")[0]
    assert difference(ours, first_step("capacity", None)[0])[0] > 1e-3
