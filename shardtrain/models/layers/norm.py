"""Normalisation, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.sharding import logical


class LayerNorm(nnx.Module):
    """`(x - mean) / std * scale + bias` over the last dim. Source: Ba et al. (arXiv 1607.06450)."""

    def __init__(self, embed: int, rngs: nnx.Rngs, epsilon: float = 1e-5):
        self.scale = nnx.Param(logical(nnx.initializers.ones, "embed")(rngs.params(), (embed,)))
        self.bias = nnx.Param(logical(nnx.initializers.zeros, "embed")(rngs.params(), (embed,)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last dim. Source: Zhang and Sennrich (arXiv 1910.07467)."""

    def __init__(self, embed: int, rngs: nnx.Rngs, epsilon: float = 1e-5):
        self.scale = nnx.Param(logical(nnx.initializers.ones, "embed")(rngs.params(), (embed,)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)
