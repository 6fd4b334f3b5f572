"""Mixture of experts on every layout equals one device with the same groups: dropout on, uneven weights, drops."""

import functools

import jax
import numpy as np
import optax
import pytest
from compare import EXPERT_LAYOUTS, GROUPS, Trained, assert_equal, difference, train
from test_parity_language import batches

from shardtrain.models import MoEConfig, build_model, language_model_loss
from shardtrain.train import step as steps

SIZES = dict(vocab=128, sequence=32, embed=64, heads=4, kv_heads=4, experts=8, expert_mlp=32, dropout=0.1)
CONFIGS = {
    # Both are balanced by a bias, so that their state tells who was chosen how often.
    "capacity": MoEConfig(**SIZES, layers=1, chosen=2, capacity=1.0, remat="full", bias_rate=0.001),
    "dropless": MoEConfig(
        **SIZES,
        layers=2,
        chosen=3,
        shared=1,
        dense_layers=1,
        mlp=64,
        score="sigmoid",
        capacity=0.0,
        bias_rate=0.001,
    ),
}
LOAD, BIAS = "variables/blocks/mlp/load", "variables/blocks/mlp/bias"


@functools.cache
def trained(name: str, layout: str | None) -> Trained:
    return train(
        lambda rngs: build_model(CONFIGS[name], rngs), language_model_loss, batches(), layout, steps=2
    )


def flips(a: Trained, b: Trained) -> float:
    """Choices of the last step that went to another expert."""
    return GROUPS * np.abs(a.state[LOAD] - b.state[LOAD]).sum() / 2


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("capacity", layout) for layout in ("expert8", "expert-tensor-fsdp", "expert-sequence")),
        *(("dropless", layout) for layout in ("data-expert", "fsdp-expert", "expert-context")),
        *(
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name in CONFIGS
            for layout in EXPERT_LAYOUTS
            if (name, layout) != ("capacity", "expert-context")
        ),
    ],
)
def test_experts(name, layout, record_property):
    """Gradients leaf by leaf, and not one choice that went elsewhere: a near tie that rounding decides otherwise is
    counted, not tolerated. The fault in mind: gradients of experts also added up over the expert axis."""
    ours, reference = trained(name, layout), trained(name, None)
    record_property("flips", flips(ours, reference))
    assert flips(ours, reference) == 0
    assert_equal(ours, reference)
    np.testing.assert_array_equal(ours.state[BIAS], reference.state[BIAS])
    assert np.abs(reference.state[BIAS]).max() > 0
    for metric in ("balance", "router_z", "dropped", "ce"):
        assert ours.metrics[metric] == pytest.approx(reference.metrics[metric], rel=1e-5), metric
    assert (reference.metrics["dropped"] > 0) == (name == "capacity")


def test_a_reduction_too_many_is_seen(monkeypatch):
    """Planted: gradients of experts added up over every batch axis."""
    true = steps.reduce_leaf

    def over_all(gradient, shard, target, axes):
        reduced = true(gradient, shard, target, axes)
        return jax.lax.psum(reduced, "expert") if shard.kept else reduced

    monkeypatch.setattr(steps, "reduce_leaf", over_all)
    make = lambda rngs: build_model(CONFIGS["capacity"], rngs)
    ours = train(make, language_model_loss, batches(), "expert8", steps=1, optimizer=optax.sgd(0.1))
    assert difference(ours.gradients, trained("capacity", None).gradients)[0] > 1e-3
