"""Cross-entropy of a language model's head, without the logits of all tokens at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from shardtrain.parallel.remat import REDUCED
from shardtrain.sharding import constrain

CHUNK_LOGITS = 2**22  # float32 logits alive at a time: 16 MiB


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Sum over tokens of `weight * (logsumexp(logits) - logit of the target)`, float32.

    Logits are made in float32 for a chunk of tokens at a time, and the gradients of `x` and the head in
    the same pass, so that the backward multiplies nothing again. The target's logit is a masked sum,
    which under a vocab-sharded head is a partial sum: per token, three scalars cross the tensor axis.

    Args:
        x_BTD: hidden states. head_DV: [embed, vocab]. targets_BT: int. weights_BT: not differentiated.
        chunk: tokens at a time; default: as many as make 2**22 logits.

    Communicates: under a vocab-sharded head, three scalars per token forward, one all-reduce of the
    gradient of `x` (2f*B*T*D) over tensor.

    Source: the chunked head of Wijmans et al. (arXiv 2411.09009), gradients in the forward pass as in
    Hsu et al., Liger kernels (arXiv 2410.10989).
    """
    tokens = targets_BT.size
    wanted = chunk or max(1, CHUNK_LOGITS // head_DV.shape[1])
    size = next(c for c in range(min(wanted, tokens), 0, -1) if tokens % c == 0)
    x = x_BTD.reshape(tokens // size, size, x_BTD.shape[-1])
    targets = targets_BT.reshape(tokens // size, size)
    weights = weights_BT.reshape(tokens // size, size).astype(jnp.float32)
    return _summed(x, head_DV, targets, weights)


@jax.custom_vjp
def _summed(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses = jax.lax.map(lambda xs: _chunk(xs[0], head, xs[1], xs[2])[0], (x, targets, weights))
    return losses.sum()


def _chunk(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of one chunk, and the gradient of its logits."""
    logits = jnp.einsum("td,dv->tv", x, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, None, "vocab")
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    top = jax.lax.stop_gradient(logits.max(-1))
    exponentials = jnp.exp(logits - top[:, None])
    total = exponentials.sum(-1)
    gold = jnp.where(hit, logits, 0.0).sum(-1)
    loss = (weights * (jnp.log(total) + top - gold)).sum()
    gradient = (exponentials / total[:, None] - hit) * weights[:, None]
    return loss, gradient


def _forward(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    def body(head_gradient: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        x, targets, weights = xs
        loss, gradient = _chunk(x, head, targets, weights)
        gradient = gradient.astype(x.dtype)
        x_gradient = jnp.einsum("tv,dv->td", gradient, head, preferred_element_type=jnp.float32)
        head_gradient += jnp.einsum("td,tv->dv", x, gradient, preferred_element_type=jnp.float32)
        return constrain(head_gradient, None, "vocab"), (loss, x_gradient.astype(x.dtype))

    # Zeros made from the inputs vary over the same mesh axes as they do inside a manual region.
    start = jnp.zeros_like(head, jnp.float32) + 0 * weights[0, 0] + 0 * x[0, 0, 0].astype(jnp.float32)
    head_gradient, (losses, x_gradient) = jax.lax.scan(body, start, (x, targets, weights))
    # Saved under every remat policy: to recompute them would be to run the head again.
    return losses.sum(), checkpoint_name((x_gradient, head_gradient.astype(head.dtype)), REDUCED)


def _backward(residuals: Any, upstream: jax.Array) -> tuple[Any, ...]:
    x_gradient, head_gradient = residuals
    scale = functools.partial(_scale, upstream)
    return scale(x_gradient), scale(head_gradient), None, None


def _scale(upstream: jax.Array, gradient: jax.Array) -> jax.Array:
    return (gradient.astype(jnp.float32) * upstream).astype(gradient.dtype)


_summed.defvjp(_forward, _backward)
