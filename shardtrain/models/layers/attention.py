"""Causal self-attention, with grouped keys and values, rotary positions and a cache for generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.models.layers.dense import normal, zeros
from shardtrain.models.layers.rotary import rotate
from shardtrain.parallel.attention import attention
from shardtrain.parallel.sequence import positions
from shardtrain.parallel.stream import column, row
from shardtrain.sharding import constrain

Cache = dict[str, jax.Array]
"""`k`, `v`: [batch, length, kv_heads, head_dim] of one layer."""


class SelfAttention(nnx.Module):
    """Causal self-attention. One kernel makes a group's queries, its key and its value side by side:

        [embed, kv_heads, queries per group + 2, head_dim]

    Tensor parallelism divides `kv_heads`, so groups stay whole, nothing is exchanged to take q, k and v
    apart, and the gradient of the input is reduced once, not once for q and once for k and v.

    Args:
        embed, heads, kv_heads, head_dim: sizes; `kv_heads` divides `heads` (equal: plain multi-head).
        bias: whether projections have biases.
        theta: base of the rotary positions, or None for none.
        out_stddev: of the output projection's initial values.

    Source of grouped queries: Ainslie et al. (arXiv 2305.13245).
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
        self.theta = theta
        self.kv_shape = (kv_heads, head_dim)
        groups = dict(kv_heads=kv_heads, _group=heads // kv_heads + 2, head_dim=head_dim)
        self.qkv_kernel = normal(rngs, stddev, embed=embed, **groups)
        self.qkv_bias = zeros(rngs, **groups) if bias else None
        self.out_kernel = normal(rngs, out_stddev, heads=heads, head_dim=head_dim, embed=embed)
        self.out_bias = zeros(rngs, embed=embed) if bias else None

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        cache: Cache | None = None,
        position: jax.Array | int = 0,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        q, k, v = self._project(x_BTD)
        if self.theta is not None:
            places = position + positions(x_BTD.shape[1])
            q, k = rotate(q, places, self.theta), rotate(k, places, self.theta)
        if cache is None:
            mixed = attention(q, k, v, segments=segments)
        else:
            start = (0, position, 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
                "v": jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
            }
            # The prompt sees only itself: what the cache holds beyond it is empty.
            start_of_text = isinstance(position, int) and position == 0
            mixed = attention(q, k, v) if start_of_text else _attend_cache(q, cache, position)
        mixed = constrain(mixed, "batch", "seq_block", "heads", "head_dim")
        y = row(mixed, self.out_kernel[...], "bthk,hkd->btd", "heads", "head_dim", "embed")
        y = checkpoint_name(y, "attention_out")
        return (y if self.out_bias is None else y + self.out_bias[...]), cache

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, heads, head_dim]; k, v [B, T, kv_heads, head_dim]."""
        names = ("embed", "kv_heads", None, "head_dim")
        qkv = column(x_BTD, self.qkv_kernel[...], "btd,dngh->btngh", *names)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        qkv = checkpoint_name(constrain(qkv, "batch", "seq_block", "kv_heads", None, "head_dim"), "qkv")
        q = qkv[:, :, :, :-2].reshape(*x_BTD.shape[:2], -1, qkv.shape[-1])
        return constrain(q, "batch", "seq_block", "heads", "head_dim"), qkv[:, :, :, -2], qkv[:, :, :, -1]

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """Zeros for `length` positions."""
        return {name: jnp.zeros((batch, length, *self.kv_shape), dtype) for name in ("k", "v")}


def _attend_cache(q: jax.Array, cache: Cache, position: jax.Array | int) -> jax.Array:
    length = cache["k"].shape[1]
    mask = (position + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(length)[None]
    k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
