"""The fused cross-entropy against the plain one: values, gradients, memory, manual mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.models.layers.cross_entropy import chunk_size, cross_entropy
from shardtrain.parallel import presets
from shardtrain.parallel.fsdp import varying
from shardtrain.sharding import context


def naive(x, head, targets, weights):
    logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
    gold = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (weights * (jax.nn.logsumexp(logits, -1) - gold)).sum()


def inputs(rows=4, length=6, embed=8, vocab=40, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, length, embed), dtype)
    head = jax.random.normal(keys[1], (embed, vocab), dtype)
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    weights = jax.random.uniform(keys[3], (rows, length)).at[0, :2].set(0.0)
    return x, head, targets, weights


@pytest.mark.parametrize("chunk", [None, 1, 7, 8, 24, 100])
def test_value_and_gradients_are_the_plain_ones(chunk):
    """23 tokens, a prime, too. Failed once without `* weights` in the gradient, and with unpadded weights of 1."""
    for rows, length in ((4, 6), (1, 23)):
        x, head, targets, weights = inputs(rows, length)
        ours = lambda x, head: 0.3 * cross_entropy(x, head, targets, weights, chunk=chunk)  # noqa: B023
        plain = lambda x, head: 0.3 * naive(x, head, targets, weights)  # noqa: B023
        value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, head)
        expected, wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, head)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(ours)(x, head), expected, rtol=1e-6)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite():
    """Failed once without subtracting the largest logit."""
    x, head, targets, weights = inputs()
    value, gradient = jax.value_and_grad(cross_entropy)(1000 * x, head, targets, weights)
    np.testing.assert_allclose(value, naive(1000 * x, head, targets, weights), rtol=1e-6)
    assert jnp.isfinite(gradient).all()


def test_bfloat16_in_float32_accumulated():
    """Gradients have the dtype of what they are of; many chunks add up in float32.

    Failed once with the head's gradient accumulated in the head's dtype.
    """
    x, head, targets, weights = inputs(rows=32, length=64, dtype=jnp.bfloat16)
    got = jax.grad(cross_entropy, (0, 1))(x, head, targets, weights)
    many = jax.grad(lambda *a: cross_entropy(*a, chunk=4), (0, 1))(x, head, targets, weights)
    exact = jax.grad(naive, (0, 1))(x.astype(jnp.float32), head.astype(jnp.float32), targets, weights)
    for a, b, c in zip(got, many, exact, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        for ours in (a, b):
            assert jnp.linalg.norm(ours.astype(jnp.float32) - c) < 5e-3 * jnp.linalg.norm(c)


def test_under_checkpoint_and_with_constant_weights():
    """Failed once with a backward that returned one gradient too few."""
    x, head, targets, weights = inputs()
    plain = jax.grad(naive, 1)(x, head, targets, weights)
    again = jax.grad(jax.checkpoint(cross_entropy), 1)(x, head, targets, weights)
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6)
    assert not jnp.any(jax.grad(cross_entropy, 3)(x, head, targets, weights))


def test_three_products_with_the_head_not_four():
    """Logits once, gradients of `x` and head once, nothing multiplied again in the backward; one for the
    loss alone. Failed once with `jax.checkpoint` around the chunk instead."""
    arguments = inputs()
    both = jax.make_jaxpr(jax.grad(cross_entropy, (0, 1)))(*arguments)
    assert str(both).count("dot_general") == 3
    compiled = jax.jit(cross_entropy).lower(*arguments).compile().as_text()
    assert compiled.count(" dot(") <= 1


def test_memory_at_a_vocabulary_of_32k():
    """Temporary bytes at most 0.15 of the plain form's. Failed once with a chunk of half the tokens."""
    x = jax.ShapeDtypeStruct((4, 1024, 256), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((256, 32768), jnp.bfloat16)
    targets, weights = (jax.ShapeDtypeStruct((4, 1024), d) for d in (jnp.int32, jnp.float32))

    def temporary(function):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(x, head, targets, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(cross_entropy) <= 0.15 * temporary(naive)


def test_chunks_are_neither_tiny_nor_all():
    """Failed once at 2**22 logits whatever the sizes: 83 tokens at a time for GPT-2."""
    assert chunk_size(16 * 1024, 768, 50304) >= 768
    assert chunk_size(2048, 128, 512) == 8192  # all of them: 4 MiB
    assert chunk_size(4096, 256, 32768) == 256


def test_manual_batch_axes_with_a_sharded_vocabulary():
    """As a Plan runs it: batch axes manual, tensor automatic, the head's gradient one per batch shard.

    Failed once with zeros that vary over no axis as the start of the scan.
    """
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, head, targets, weights = inputs(rows=8)
    axes, rows = ("data", "fsdp"), P(("data", "fsdp"))
    layout = context.Layout(mesh, presets.fsdp_tensor.activations, frozenset(axes))

    def local(x, head, targets, weights):
        head = varying(head, axes)
        ours = lambda x, head: cross_entropy(x, head, targets, weights, chunk=4)
        value, (dx, dhead) = jax.value_and_grad(ours, (0, 1))(x, head)
        assert jax.typeof(dhead).mat.varying == frozenset(axes)
        return value[None], dx, dhead[None]

    head = jax.device_put(head, NamedSharding(mesh, P(None, "tensor")))
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=(rows, rows, rows), axis_names=set(axes)
    )
    with context.use(layout):
        lowered = jax.jit(mapped).lower(x, head, targets, weights)
    compiled = lowered.compile()
    value, dx, dhead = compiled(*jax.device_put((x, head), compiled.input_shardings[0][:2]), targets, weights)
    expected, wanted = jax.value_and_grad(naive, (0, 1))(x, jax.device_get(head), targets, weights)
    np.testing.assert_allclose(value.sum(), expected, rtol=1e-6)
    for got, want in ((dx, wanted[0]), (dhead.sum(0), wanted[1])):
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    assert "all-gather" not in compiled.as_text()


def test_a_head_that_does_not_vary_gets_the_sum_over_shards():
    """Failed once without the head made varying before the custom gradient."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, head, targets, weights = inputs(rows=8)

    def local(x, head, targets, weights):
        return jax.grad(cross_entropy, 1)(x, head, targets, weights)

    rows = P("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=P())
    wanted = jax.grad(naive, 1)(x, head, targets, weights)
    np.testing.assert_allclose(jax.jit(mapped)(x, head, targets, weights), wanted, rtol=1e-5, atol=1e-5)
