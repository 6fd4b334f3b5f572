"""Which experts a token goes to, and which choices an expert has places for.

Everything here is a function of one group, the rows that one call of the loss sees, and so the same on every mesh: who is
chosen, who is dropped, the balance.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from shardtrain.parallel.precision import widen
from shardtrain.parallel.remat import REDUCED
from shardtrain.parallel.sequence import own, parts, sequence_axes, zigzag_order


def scores_of(logits: jax.Array, score: str) -> jax.Array:
    """Float32 scores [T, E] of router logits: `softmax` over the experts, or `sigmoid` of each."""
    logits = widen(logits)
    return jax.nn.softmax(logits) if score == "softmax" else jax.nn.sigmoid(logits)


def route(
    logits: jax.Array,
    k: int,
    *,
    score: str = "softmax",
    bias: jax.Array | None = None,
    renormalise: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The k experts of each token, best first, and their weights. Ties go to the lower index.

    Args:
        logits: [T, E]. score: `softmax` (Mixtral) or `sigmoid` (DeepSeek-V3).
        bias: [E], added to the scores for the selection alone; weights and gradients do not see it.
        renormalise: weights of a token add up to one.

    Returns:
        Experts int32 [T, k], different ones for each token; weights float32 [T, k].

    Source: Jiang et al., Mixtral (arXiv 2401.04088); DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    scores = scores_of(logits, score)
    wanted = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    # Saved under every remat policy: a tie that a second run decides otherwise would not fit what was sent.
    chosen = checkpoint_name(jax.lax.top_k(wanted, k)[1].astype(jnp.int32), REDUCED)
    weights = jnp.take_along_axis(scores, chosen, -1)
    return chosen, weights / weights.sum(-1, keepdims=True) if renormalise else weights


def load(chosen: jax.Array, experts: int) -> jax.Array:
    """How often a group chose each expert, int32 [E]."""
    here, axes = _count(chosen, experts), sequence_axes()
    return jax.lax.psum(here, axes) if axes else here


def _count(chosen: jax.Array, experts: int) -> jax.Array:
    return (chosen[..., None] == jnp.arange(experts)).sum((0, 1), dtype=jnp.int32)


def _of_group(mean: jax.Array) -> jax.Array:
    """The mean over the tokens of a group, from that of this device's part of its sequences."""
    axes = sequence_axes()
    return jax.lax.pmean(mean, axes) if axes else mean


def balance_loss(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """E * sum over experts of (share of the choices) * (mean share of the scores): 1 where all are alike.

    Source: Fedus et al., Switch Transformers (arXiv 2101.03961), section 2.2, with choices counted over all k.
    """
    experts = scores.shape[-1]
    chosen_of = load(chosen, experts)
    share = _of_group((scores / scores.sum(-1, keepdims=True)).mean(0))
    return experts * (chosen_of / chosen_of.sum() * share).sum()


def router_z_loss(logits: jax.Array) -> jax.Array:
    """Mean over tokens of logsumexp(logits)^2: keeps logits small. Source: Zoph et al., ST-MoE (arXiv 2202.08906)."""
    return _of_group(jnp.square(jax.nn.logsumexp(widen(logits), -1)).mean())


def capacity(tokens: int, k: int, experts: int, factor: float) -> int:
    """Places of one expert for the tokens of one group: ceil(T * k / E * factor), never more than T."""
    return min(tokens, math.ceil(tokens * k / experts * factor))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Where choices go. `choice`: [places], the number of the choice that takes a place (t*k + j for choice j of token t),
    T*k where none does. `place`: [T, k], of each choice; as many as there are places where it has none. `sizes`: [E],
    choices of each expert, dropped ones too.
    """

    choice: jax.Array
    place: jax.Array
    sizes: jax.Array


def places(chosen: jax.Array, experts: int, most: int) -> Places:
    """Places by expert, and within one in the order of the tokens, a token's first choice before its second. So what a
    token gets does not depend on later ones. By sorting; no mask of tokens x experts x places.

    Args:
        chosen: [T, k]; E for a choice that is to have no place. most: places of each expert, which keeps as many choices (the
            place of its r-th is `e*most + r`); 0: as many as it was chosen, one expert right after the other, T*k in all.
    """
    flat, sizes = chosen.reshape(-1), _count(chosen, experts)
    order = jnp.argsort(flat, stable=True)
    place = jnp.argsort(order)
    if not most:
        place = jnp.where(flat < experts, place, flat.size)
        choice = jnp.where(jnp.arange(flat.size) < sizes.sum(), order, flat.size)
        return Places(choice, place.reshape(chosen.shape), sizes)
    starts = jnp.cumsum(sizes) - sizes
    rank, here = place - starts[flat], jnp.arange(most)
    place = jnp.where(rank < most, flat * most + rank, experts * most)
    taken = order.at[starts[:, None] + here].get(mode="fill", fill_value=flat.size)
    choice = jnp.where(here < sizes[:, None], taken, flat.size)
    return Places(choice.reshape(-1), place.reshape(chosen.shape), sizes)


def kept(chosen: jax.Array, experts: int, most: int) -> jax.Array:
    """bool [B, T, k]: the choices for which an expert has a place when it has `most` of them for the whole group, of which
    this device may have a part of every sequence.

    Args:
        chosen: [B, T, k], of this device's tokens.

    Communicates: where mesh axes divide the sequence, an all-gather of the choices over them (f*4 bytes a choice).
    """
    axes = sequence_axes()
    if axes:
        order = zigzag_order(chosen.shape[1] * parts(), parts())
        chosen = jax.lax.all_gather(chosen, axes, axis=1, tiled=True)[:, order.argsort()]
    place = places(chosen.reshape(-1, chosen.shape[-1]), experts, most).place
    return own((place < experts * most).reshape(chosen.shape), 1)
