"""Normalisation, computed in float32 (or wider) whatever the activations' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.parallel.precision import widen
from shardtrain.sharding import logical


class LayerNorm(nnx.Module):
    """`(x - mean) / std * scale + bias` over the last dim. Source: Ba et al. (arXiv 1607.06450)."""

    def __init__(self, embed: int, rngs: nnx.Rngs, epsilon: float = 1e-5):
        self.scale = nnx.Param(logical(nnx.initializers.ones, "embed")(rngs.params(), (embed,), jnp.float32))
        self.bias = nnx.Param(logical(nnx.initializers.zeros, "embed")(rngs.params(), (embed,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last dim. Source: Zhang and Sennrich (arXiv 1910.07467)."""

    def __init__(self, embed: int, rngs: nnx.Rngs, epsilon: float = 1e-5):
        self.scale = nnx.Param(logical(nnx.initializers.ones, "embed")(rngs.params(), (embed,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widen(x)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)
