"""A parameter with its logical axes, and dropout with explicit keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.parallel.sequence import own_part
from shardtrain.sharding import logical


def normal(rngs: nnx.Rngs, stddev: float, **dims: int) -> nnx.Param:
    """A normally distributed parameter: `normal(rngs, 0.02, embed=768, mlp=3072)`.

    The keywords are logical axes in order; a name that starts with `_` has none.
    """
    init = logical(nnx.initializers.normal(stddev, jnp.float32), *_axes(dims))
    return nnx.Param(init(rngs.params(), tuple(dims.values())))


def zeros(rngs: nnx.Rngs, **dims: int) -> nnx.Param:
    """A parameter of zeros, named as in `normal`."""
    return nnx.Param(
        logical(nnx.initializers.zeros, *_axes(dims))(rngs.params(), tuple(dims.values()), jnp.float32)
    )


def _axes(dims: dict[str, int]) -> list[str | None]:
    return [None if name.startswith("_") else name for name in dims]


class Dropout(nnx.Module):
    """Sets a share `rate` of the values to zero, scaled to keep the mean; off in `eval()` or without a key."""

    def __init__(self, rate: float):
        self.rate = rate
        self.deterministic = False

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if self.rate == 0.0 or self.deterministic or key is None:
            return x
        keep = own_part(lambda shape: jax.random.bernoulli(key, 1.0 - self.rate, shape), x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
