"""Attention, rotary positions and dropout, by what they must satisfy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardtrain.models.layers.attention import SelfAttention
from shardtrain.models.layers.dense import Dropout
from shardtrain.models.layers.rotary import rotate
from shardtrain.parallel.attention import attention
from shardtrain.parallel.fused import kernel_for


def qkv(length, heads=4, kv_heads=2, width=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, heads, width), (2, length, kv_heads, width), (2, length, kv_heads, width)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def plain(q, k, v):
    """Scores written out, keys and values repeated for every head."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


@pytest.mark.parametrize("length", [16, 32, 27])
def test_chunks_of_queries_are_the_whole(length):
    """Grouped heads against explicit repeat; 16: one piece, 32: chunks, 27: the last one is not full.

    Failed once with the mask of the first chunk in every chunk, and with `>` for `>=`.
    """
    arrays = qkv(length)
    out = lambda f: jax.jit(jax.value_and_grad(lambda a: (f(*a) * jnp.cos(jnp.arange(8.0))).sum()))(arrays)
    (got, gradients), (want, wanted) = out(lambda *a: attention(*a, chunk=16)), out(plain)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [4096, 4095])
def test_scores_of_long_sequences_are_never_whole(length):
    """Temporary bytes below those of one float32 T x T per head. Failed once for lengths off the chunk."""
    q = jax.ShapeDtypeStruct((1, length, 8, 16), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, chunk=256).sum(), (0, 1, 2)))
    memory = gradient.lower(q, q, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 8 * length**2 * 4


def test_flash_only_where_it_exists():
    """Failed once on an AMD device, whose capability is no number."""
    h100, v100, amd = (
        types.SimpleNamespace(compute_capability=c, platform="gpu") for c in ("9.0", "7.0", "gfx942")
    )
    cpu = jax.devices()[0]
    narrow, wide = jnp.zeros((1, 1, 1, 64), jnp.bfloat16), jnp.zeros((1, 1, 1, 64))
    on = lambda device, x: kernel_for(device, x, x)
    assert on(h100, narrow) == on(h100, narrow.astype(jnp.float16)) == "cudnn"
    assert on(h100, wide) is None and on(h100, narrow[..., :60]) is None
    assert not any(on(device, narrow) for device in (v100, amd, cpu))


def test_grouped_queries_are_plain_heads_with_repeated_keys():
    """Failed once with key and value swapped."""
    grouped = SelfAttention(16, 4, 2, 4, nnx.Rngs(0), bias=False, theta=100.0)
    full = SelfAttention(16, 4, 4, 4, nnx.Rngs(1), bias=False, theta=100.0)
    q, k, v = jnp.split(grouped.qkv_kernel[...], (2, 3), axis=2)  # [embed, kv_heads, ., head_dim]
    q = q.reshape(16, 4, 1, 4)
    full.qkv_kernel[...] = jnp.concatenate([q, jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1)], 2)
    full.out_kernel[...] = grouped.out_kernel[...]
    x = 30 * jax.random.normal(jax.random.key(2), (2, 6, 16))
    got, want = jax.jit(lambda: (grouped(x)[0], full(x)[0]))()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    """And positions matter, and lengths are kept. Failed once with one sign flipped."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 5, 2, 8)) for i in (0, 1))
    score = lambda a, b: jnp.einsum(
        "bqhd,bkhd->bhqk", rotate(q, jnp.arange(5) + a, 1e4), rotate(k, jnp.arange(5) + b, 1e4)
    )
    np.testing.assert_allclose(score(0, 0), score(37, 37), atol=1e-4)
    assert jnp.abs(score(0, 0) - score(0, 1)).max() > 0.1
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm(rotate(q, jnp.arange(5), 1e4)), norm(q), rtol=1e-5)


def test_dropout_keeps_the_mean_and_goes_by_its_key():
    """Failed once without the scale, and with `deterministic` ignored."""
    drop, x = Dropout(0.25), jnp.ones((200, 200))
    once = drop(x, jax.random.key(0))
    assert abs(float(once.mean()) - 1) < 0.02 and abs(float((once == 0).mean()) - 0.25) < 0.02
    np.testing.assert_array_equal(once, drop(x, jax.random.key(0)))
    assert jnp.any(once != drop(x, jax.random.key(1)))
    assert drop(x, None) is x
    drop.eval()
    assert drop(x, jax.random.key(0)) is x
