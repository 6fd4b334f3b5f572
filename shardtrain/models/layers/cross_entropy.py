"""Cross-entropy of a language model's head, without the logits of all tokens at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.parallel.fsdp import alike
from shardtrain.parallel.precision import wide, widen
from shardtrain.parallel.remat import REDUCED
from shardtrain.parallel.stream import collect, split_dim
from shardtrain.sharding import constrain, context
from shardtrain.sharding.constrain import spec_of

FEW, MANY = 2**22, 2**26  # float32 logits alive at a time: 16 MiB are always fine, 256 MiB rarely better


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Sum over tokens of `weight * (logsumexp(logits) - logit of the target)`, float32 or wider, in nats.

    Logits are made so for a chunk of tokens at a time, and the gradients of `x` and the head in
    the same pass, so that the backward multiplies nothing again. The target's logit is a masked sum,
    which under a vocab-sharded head is a partial sum: per token, three scalars cross the tensor axis.

    Args:
        x_BTD: hidden states. head_DV: [embed, vocab]. targets_BT: int. weights_BT: not differentiated.
        chunk: tokens at a time; default: see `chunk_size`.

    Communicates: under a vocab-sharded head, three scalars per token forward, one all-reduce of the
    gradient of `x` (2f*B*T*D) over tensor. Nothing over the batch axes where they are manual.

    Source: the chunked head of Wijmans et al. (arXiv 2411.09009), gradients in the forward pass as in
    Hsu et al., Liger kernels (arXiv 2410.10989). Held by tests/unit/models/test_cross_entropy.py.
    """
    tokens, (embed, vocab) = targets_BT.size, head_DV.shape
    wanted = -(-tokens // min(tokens, chunk or chunk_size(tokens, embed, vocab)))
    inside, stream = spec_of(x_BTD, "batch", "seq_block", "embed"), spec_of(x_BTD, "batch", "seq", "embed")
    if stream is not None and stream != inside:
        cut, spec = _along_sequence(targets_BT.shape, wanted, stream)
    else:
        cut, spec = _along_tokens(tokens, wanted), None
    inputs = (cut(x_BTD), head_DV, cut(targets_BT), cut(weights_BT).astype(wide(x_BTD)))
    return _summed(*alike(*inputs), spec)


def _along_tokens(tokens: int, wanted: int) -> Callable[[jax.Array], jax.Array]:
    """`[B, T, ...] -> [chunks, tokens, ...]`."""
    # A number of chunks nearby that divides; else tokens of weight zero fill up the last one.
    chunks = next((n for n in range(wanted, 2 * wanted) if tokens % n == 0), wanted)

    def cut(array: jax.Array) -> jax.Array:
        flat = array.reshape(tokens, *array.shape[2:])
        if missing := -tokens % chunks:
            flat = jnp.pad(flat, [(0, missing), *[(0, 0)] * (flat.ndim - 1)])
        return flat.reshape(chunks, -1, *flat.shape[1:])

    return cut


def _along_sequence(
    shape: tuple[int, ...], wanted: int, stream: PartitionSpec
) -> tuple[Callable[[jax.Array], jax.Array], PartitionSpec]:
    """`[B, T, ...] -> [chunks, parts, B, tokens, ...]`, and the spec of a chunk of x's gradient.

    A chunk takes tokens of every part of a divided sequence, so that the gradient of `x` leaves each chunk
    divided as the residual stream is: by a reduce-scatter.
    """
    axes = stream[1] if isinstance(stream[1], tuple) else (stream[1],)
    layout = context.current()
    assert layout is not None and layout.mesh is not None
    parts = math.prod(layout.mesh.shape[a] for a in axes)
    each = shape[1] // parts
    chunks = next(n for n in range(min(wanted, each), each + 1) if each % n == 0)

    def cut(array: jax.Array) -> jax.Array:
        split = array.reshape(shape[0], parts, chunks, each // chunks, *array.shape[2:])
        return jnp.moveaxis(split, (2, 1), (0, 1))

    return cut, PartitionSpec(stream[1], stream[0], None, None)


def chunk_size(tokens: int, embed: int, vocab: int) -> int:
    """Tokens at a time: a 16th of them, within bounds.

    At least `embed`, since the head's float32 gradient is read and written once per chunk and is then no
    larger than the chunk's logits; at least 2**22 logits; at most 2**26 logits where that leaves `embed`.
    """
    least = max(embed, FEW // vocab)
    return min(max(tokens // 16, least), max(MANY // vocab, least))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, spec: PartitionSpec | None
) -> jax.Array:
    losses = jax.lax.map(lambda xs: _chunk(xs[0], head, xs[1], xs[2])[0], (x, targets, weights))
    return losses.sum()


def _chunk(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of one chunk, and the gradient of its logits."""
    logits = jnp.einsum("...d,dv->...v", x, head, preferred_element_type=wide(x))
    logits = constrain(logits, "vocab")
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    top = logits.max(-1)
    exponentials = jnp.exp(logits - top[..., None])
    total = exponentials.sum(-1)
    gold = jnp.where(hit, logits, 0.0).sum(-1)
    loss = (weights * (jnp.log(total) + top - gold)).sum()
    gradient = (exponentials / total[..., None] - hit) * weights[..., None]
    return loss, gradient


def _forward(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, spec: PartitionSpec | None
) -> tuple[jax.Array, Any]:
    def gradients(xs: Any) -> tuple[jax.Array, Any]:
        x, targets, weights = xs
        loss, gradient = _chunk(x, head, targets, weights)
        gradient = gradient.astype(x.dtype)
        # In the dtype of x: what crosses the tensor axis is as narrow as the activations.
        if spec is None:
            x_gradient = jnp.einsum("...v,dv->...d", gradient, head).astype(x.dtype)
        else:
            split = (split_dim(g, g.ndim - 1, x.shape[0]) for g in (gradient, head))
            x_gradient = collect(jnp.einsum("...zv,dzv->z...d", *split).astype(x.dtype), spec, 0)
        head_gradient = jnp.einsum("...d,...v->dv", x, gradient, preferred_element_type=wide(x))
        return constrain(head_gradient, None, "vocab"), (loss, x_gradient)

    def add(head_gradient: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        more, rest = gradients(xs)
        return constrain(head_gradient + more, None, "vocab"), rest

    if x.shape[0] == 1:  # nothing to add up: of a large head two float32 copies less
        head_gradient, rest = gradients((x[0], targets[0], weights[0]))
        losses, x_gradient = jax.tree.map(lambda leaf: leaf[None], rest)
    else:
        start, _ = alike(jnp.zeros(head.shape, wide(head)), head)
        head_gradient, (losses, x_gradient) = jax.lax.scan(add, start, (x, targets, weights))
    # Saved under every remat policy: to recompute them would be to run the head again.
    return losses.sum(), checkpoint_name((x_gradient, head_gradient.astype(head.dtype)), REDUCED)


def _backward(spec: PartitionSpec | None, residuals: Any, upstream: jax.Array) -> tuple[Any, ...]:
    scaled = [(widen(g) * upstream).astype(g.dtype) for g in residuals]
    return *scaled, None, None


_summed.defvjp(_forward, _backward)
