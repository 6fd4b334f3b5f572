"""Mixture of experts as a model: causality, losses and metrics, balancing, remat, generation, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models import (
    LlamaConfig,
    MoEConfig,
    build_model,
    generate,
    language_model_loss,
    llama,
    moe,
    parameter_count,
)
from shardtrain.models.layers.moe import Routed, balanced_bias

SIZES = dict(vocab=32, sequence=16, embed=16, layers=2, heads=4, kv_heads=2, experts=4, expert_mlp=24)
CONFIGS = {
    "mixtral": MoEConfig(**SIZES, capacity=1.0),
    "deepseek": MoEConfig(
        **SIZES,
        chosen=3,
        shared=2,
        dense_layers=1,
        mlp=40,
        score="sigmoid",
        scale=1.5,
        capacity=0.0,
        bias_rate=0.01,
    ),
}
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 32)
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@functools.cache
def parts(config):
    return nnx.split(build_model(config, nnx.Rngs(0)), nnx.Param, ...)


def build(config):
    """A fresh module over the same parameters, evaluated."""
    model = nnx.merge(*parts(config))
    model.eval()
    return model


def batch():
    weights = jnp.ones(TOKENS.shape).at[0, 3].set(0)
    return {"tokens": TOKENS, "targets": jnp.roll(TOKENS, -1, 1), "weights": weights}


@functools.cache
def step(config):
    """`variables -> (loss, (weight, metrics, variables)), gradients` of a step in training."""
    graph, params, _ = parts(config)

    def objective(params, rest):
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        loss = language_model_loss(model, batch(), None)
        return loss.sum, (loss.weight, loss.metrics, nnx.split(model, nnx.Param, ...)[2])

    compiled = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return lambda rest: compiled(params, rest)


@functools.cache
def trained(config):
    return step(config)(parts(config)[2])


def evaluated(config, params):
    graph, _, rest = parts(config)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        model.eval()
        return language_model_loss(model, batch(), None).sum

    return jax.jit(loss)(params)


@each
def test_later_tokens_change_nothing(config):
    """Also under a capacity, where tokens compete for places. Failed once with first choices of all before second."""
    model = build(dataclasses.replace(config, capacity=0.6 * (config.capacity > 0)))
    one = TOKENS[:1]
    hidden = jax.jit(lambda tokens: model.hidden(tokens))
    other = one.at[:, 7:].set((one[:, 7:] + 5) % 32)
    longer = lambda tokens: hidden(tokens)[:, :7]
    np.testing.assert_allclose(longer(one), longer(other), atol=1e-6)
    assert np.abs(hidden(one)[:, 7:] - hidden(other)[:, 7:]).max() > 1e-3


@each
def test_the_loss_is_the_cross_entropy_and_what_balances(config):
    """In evaluation the cross-entropy alone. The fault in mind: auxiliary losses that are not times the weight."""
    (total, (weight, metrics, _)), _ = trained(config)
    ce, ce_weight = metrics["ce"]
    layers = config.layers - config.dense_layers
    auxiliary = layers * (config.balance * metrics["balance"] + config.router_z * metrics["router_z"])
    assert weight == ce_weight == 23
    np.testing.assert_allclose(total, ce + weight * auxiliary, rtol=1e-6)
    dropped, choices = metrics["dropped"]
    assert choices == layers * TOKENS.size * config.chosen
    assert (dropped > 0) == (config.capacity > 0)
    np.testing.assert_allclose(evaluated(config, parts(config)[1]), ce, rtol=1e-5)


@each
def test_every_parameter_is_trained(config):
    """And the router by what its choices are worth. The fault in mind: weights cut off from the logits."""
    gradients = trained(config)[1]
    for path, leaf in nnx.to_flat_state(gradients):
        assert np.abs(leaf.get_value()).max() > 0, path


@each
def test_remat_changes_no_gradient(config):
    """The fault in mind: a second run of the router that chooses otherwise."""
    value, reference = trained(config)
    again, gradients = trained(dataclasses.replace(config, remat="full"))
    np.testing.assert_allclose(again[0], value[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_the_bias_follows_the_load():
    """Up by the rate under the mean, down above, and only in training."""
    config = CONFIGS["deepseek"]
    bias = balanced_bias(jnp.zeros(4), jnp.asarray([5.0, 1.0, 3.0, 3.0]), 0.01)
    np.testing.assert_allclose(bias, [-0.01, 0.01, 0, 0], rtol=1e-6)
    graph, params, rest = parts(config)
    for index in range(2):
        (_, (_, _, rest)), _ = step(config)(rest)
        assert rest["blocks"]["mlp"]["load"][...].sum(-1).tolist() == [TOKENS.size * 3]
        moved = np.abs(np.asarray(rest["blocks"]["mlp"]["bias"][...]))
        assert moved.max() == (0 if index == 0 else np.float32(0.01))
    model = nnx.merge(graph, params, rest)
    model.eval()
    language_model_loss(model, batch(), None)
    jax.tree.map(np.testing.assert_array_equal, rest, nnx.split(model, nnx.Param, ...)[2])


def test_the_bias_balances():
    """Of a router that prefers one expert. Failed once with the sign turned round."""
    random = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-random.normal(size=(512, 8)) - np.arange(8) / 4))
    bias = jnp.zeros(8)

    def loads(bias):
        chosen = np.argsort(-(scores + np.asarray(bias)), 1, kind="stable")[:, :2]
        return np.bincount(chosen.ravel(), minlength=8)

    first = loads(bias)
    for _ in range(100):
        bias = balanced_bias(bias, jnp.asarray(loads(bias), jnp.float32), 0.01)
    assert loads(bias).max() < 1.15 * 128 < first.max()


@each
def test_generation_is_the_whole_forward(config):
    """Token by token with a cache: what the model says of the whole text without drops. Failed once with a capacity."""
    model = build(dataclasses.replace(config, capacity=0.5))
    text = generate(model, TOKENS[:, :5], 6, temperature=0.0)
    free = build(dataclasses.replace(config, capacity=0.0))
    logits = jax.jit(lambda tokens: free(tokens))(jnp.asarray(text))
    np.testing.assert_array_equal(text[:, 5:], logits.argmax(-1)[:, 4:-1])


@each
def test_activations_follow_the_parameters(config):
    """bfloat16 inside, the router's choices and weights in float32, near the float32 loss."""
    graph, params, rest = parts(config)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    hidden = jax.eval_shape(lambda p: nnx.merge(graph, p, rest).hidden(TOKENS), narrow)
    assert hidden.dtype == jnp.bfloat16
    exact = evaluated(config, params)
    assert abs(evaluated(config, narrow) - exact) < 0.02 * exact


@pytest.mark.parametrize(
    ("config", "count"), [(moe.MIXTRAL_8X7B, 46_702_792_704), (moe.DEEPSEEK_16B, 16_375_728_128)]
)
def test_published_parameter_counts(config, count):
    """Nothing is allocated. The fault in mind: a shared expert of the wrong width."""
    assert parameter_count(config) == count


def test_flops_count_what_a_token_meets():
    """As a Llama whose MLP is as wide as the experts that a token takes, and the router."""
    common = dict(vocab=64, sequence=32, embed=32, layers=2, heads=4, kv_heads=2)
    ours = MoEConfig(**common, experts=8, chosen=2, shared=1, expert_mlp=40)
    wide = LlamaConfig(**common, mlp=3 * 40)
    assert ours.flops_per_token(32) - wide.flops_per_token(32) == 6 * 2 * 32 * 8
    first = dataclasses.replace(ours, dense_layers=1, mlp=120)
    assert ours.flops_per_token(32) - first.flops_per_token(32) == 6 * 32 * 8


@pytest.mark.parametrize(
    "wrong",
    [{"chosen": 5}, {"chosen": 0}, {"dense_layers": 2}, {"score": "relu"}, {"capacity": -1.0}, {"heads": 3}],
)
def test_wrong_sizes_are_refused(wrong):
    """With the way out. Failed once on more choices than experts."""
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**{**SIZES, **wrong})
    assert caught.value.fix


def test_tiny_is_as_large_as_the_others():
    assert 1e6 < parameter_count(moe.TINY) < 2.5e6 and parameter_count(llama.TINY) < parameter_count(moe.TINY)


def test_layers_tell_in_their_order():
    """What travels past three layers stands as they do, and without their choices. Failed once with the last one first."""
    travelling = Routed.of_none(3, 4, jnp.ones((2, 5)))
    for layer in range(3):
        one = jnp.float32(layer + 1)
        travelling = Routed(one, -one, jnp.full(4, one), one**2, jnp.ones((2, 5, 2), int)).after(travelling)
    assert travelling.chosen is None
    np.testing.assert_array_equal(travelling.balance, [1, 2, 3])
    np.testing.assert_array_equal(travelling.load[:, 1], [1, 2, 3])
    np.testing.assert_array_equal(travelling.dropped, [1, 4, 9])
