"""A stack of equal blocks, scanned: one compiled body whatever the depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.parallel.fsdp import gather
from shardtrain.parallel.remat import over_layers

Blocks = Any
"""A module whose parameters have a leading `layers` dim."""


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Blocks:
    """`layers` blocks with parameters stacked on a leading dim, logical axis `layers`; each has its own key."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def scan_blocks(
    blocks: Blocks,
    x: jax.Array,
    *,
    path: str,
    policy: str,
    key: jax.Array | None = None,
    cache: Any = None,
    position: jax.Array | int = 0,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Run the stack: `x, cache = block(x, key=..., cache=..., position=..., segments=...)`, layer by layer.

    Args:
        path: where the stack lives in the model; its parameters are made whole one layer at a time.
        policy: what the backward recomputes, see `parallel/remat.py`.
        key: split over the layers, for dropout.
        cache: pytree with a leading layers dim, or None.
        segments: see `parallel.attention.attention`.

    Communicates: what `gather` says, once forward and once backward per layer.
    """
    graph, state = nnx.split(blocks)
    layers = jax.tree.leaves(state)[0].shape[0]
    keys = None if key is None else jax.random.split(key, layers)

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        state, key, cache = layer
        block = nnx.merge(graph, gather(state, path))
        return block(x, key=key, cache=cache, position=position, segments=segments)

    return over_layers(body, x, (state, keys, cache), policy)


def empty_caches(blocks: Blocks, batch: int, length: int, dtype: Any) -> Any:
    """A cache for every layer, stacked."""
    graph, state = nnx.split(blocks)
    layers = jax.tree.leaves(state)[0].shape[0]
    one = nnx.merge(graph, jax.tree.map(lambda x: x[0], state)).attention.empty_cache(batch, length, dtype)
    return jax.tree.map(lambda x: jnp.zeros((layers, *x.shape), x.dtype), one)
