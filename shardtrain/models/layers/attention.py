"""Causal self-attention, with grouped keys and values, rotary positions and a cache for generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.models.layers.dense import normal, zeros
from shardtrain.models.layers.rotary import rotate
from shardtrain.parallel.remat import REDUCED
from shardtrain.sharding import constrain

CHUNK = 1024  # queries at a time where no fused kernel keeps the scores out of memory

Cache = dict[str, jax.Array]
"""`k`, `v`: [batch, length, kv_heads, head_dim] of one layer."""


class SelfAttention(nnx.Module):
    """Heads stay whole under tensor parallelism: q, k, v are separate dims of one kernel, never split.

    Args:
        embed, heads, kv_heads, head_dim: sizes; `kv_heads` divides `heads`.
        bias: whether projections have biases.
        theta: base of the rotary positions, or None for none.
        out_stddev: of the output projection's initial values.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        *,
        bias: bool,
        theta: float | None,
        stddev: float = 0.02,
        out_stddev: float = 0.02,
    ):
        self.fused = heads == kv_heads
        self.theta = theta
        if self.fused:
            self.qkv_kernel = normal(rngs, stddev, embed=embed, _three=3, heads=heads, head_dim=head_dim)
            self.qkv_bias = zeros(rngs, _three=3, heads=heads, head_dim=head_dim) if bias else None
        else:
            self.q_kernel = normal(rngs, stddev, embed=embed, heads=heads, head_dim=head_dim)
            self.kv_kernel = normal(rngs, stddev, embed=embed, _two=2, kv_heads=kv_heads, head_dim=head_dim)
        self.out_kernel = normal(rngs, out_stddev, heads=heads, head_dim=head_dim, embed=embed)
        self.out_bias = zeros(rngs, embed=embed) if bias else None

    def __call__(
        self, x_BTD: jax.Array, *, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        q, k, v = self._project(x_BTD)
        if self.theta is not None:
            positions = position + jnp.arange(x_BTD.shape[1])
            q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        if cache is None:
            mixed = causal_attention(q, k, v)
        else:
            start = (0, position, 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
                "v": jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
            }
            mixed = _attend_cache(q, cache, position)
        mixed = constrain(mixed, "batch", "seq", "heads", "head_dim")
        y = jnp.einsum("bthk,hkd->btd", mixed, self.out_kernel[...])
        y = checkpoint_name(constrain(y, "batch", "seq", "embed"), REDUCED)
        return (y if self.out_bias is None else y + self.out_bias[...]), cache

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self.fused:
            qkv = jnp.einsum("btd,dchk->btchk", x_BTD, self.qkv_kernel[...])
            if self.qkv_bias is not None:
                qkv = qkv + self.qkv_bias[...]
            qkv = checkpoint_name(constrain(qkv, "batch", "seq", None, "heads", "head_dim"), "qkv")
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q = jnp.einsum("btd,dhk->bthk", x_BTD, self.q_kernel[...])
        kv = jnp.einsum("btd,dchk->btchk", x_BTD, self.kv_kernel[...])
        q = checkpoint_name(constrain(q, "batch", "seq", "heads", "head_dim"), "qkv")
        kv = checkpoint_name(constrain(kv, "batch", "seq", None, "kv_heads", "head_dim"), "qkv")
        return q, kv[:, :, 0], kv[:, :, 1]

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """Zeros for `length` positions."""
        kernel = self.qkv_kernel if self.fused else self.kv_kernel
        shape = (batch, length, *kernel.shape[-2:])
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v with a causal mask.

    Args:
        q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim].
        chunk: queries at a time where no fused kernel is at hand; bounds the scores in memory.

    On NVIDIA GPUs with 16-bit values this is cuDNN's flash attention.
    """
    length = q.shape[1]
    if q.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if length <= chunk or length % chunk:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    # Later chunks of queries see more keys; scores exist for one chunk at a time, also in the backward.
    @jax.checkpoint
    def one(start: jax.Array, q_chunk: jax.Array) -> jax.Array:
        mask = (start + jnp.arange(chunk))[:, None] >= jnp.arange(length)[None]
        return jax.nn.dot_product_attention(q_chunk, k, v, mask=mask[None, None])

    chunks = jnp.moveaxis(q.reshape(q.shape[0], length // chunk, chunk, *q.shape[2:]), 1, 0)
    starts = jnp.arange(length // chunk) * chunk
    out = jax.lax.map(lambda xs: one(*xs), (starts, chunks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _attend_cache(q: jax.Array, cache: Cache, position: jax.Array | int) -> jax.Array:
    length = cache["k"].shape[1]
    mask = (position + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(length)[None]
    k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
