"""Rotary positions. Source: Su et al., RoFormer (arXiv 2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shardtrain.parallel.precision import wide, widen


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Turn pairs (i, i + head_dim/2) of [batch, seq, heads, head_dim] by position * theta^(-2i/head_dim).

    `positions`: [seq], global ones where a sequence is divided.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=wide(x)) / half)
    angle = positions.astype(wide(x))[:, None] * frequency
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = widen(x[..., :half]), widen(x[..., half:])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
