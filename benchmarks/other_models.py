"""Decoders as other people write them, for `bytes.py`: nothing of shardtrain in them.

In the manner of the Flax examples (lm1b): layers unrolled, `MultiHeadAttention`, a tied embedding that makes the
logits, one in nnx and one in linen. What their dims mean is said outside, by path.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import shardtrain as st


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocab: int
    embed: int
    heads: int
    mlp: int
    layers: int
    sequence: int


class NnxBlock(nnx.Module):
    def __init__(self, c: Sizes, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(c.embed, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=c.heads, in_features=c.embed, decode=False, use_bias=False, rngs=rngs
        )
        self.ln2 = nnx.LayerNorm(c.embed, rngs=rngs)
        self.fc1 = nnx.Linear(c.embed, c.mlp, rngs=rngs)
        self.fc2 = nnx.Linear(c.mlp, c.embed, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.ln1(x), mask=mask)
        return x + self.fc2(nnx.gelu(self.fc1(self.ln2(x))))


class NnxDecoder(nnx.Module):
    def __init__(self, c: Sizes, rngs: nnx.Rngs):
        self.embed = nnx.Embed(c.vocab, c.embed, rngs=rngs)
        self.position = nnx.Embed(c.sequence, c.embed, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(c, rngs) for _ in range(c.layers)])
        self.ln_f = nnx.LayerNorm(c.embed, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.ln_f(x))


class LinenBlock(nn.Module):
    c: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.c.heads, use_bias=False)(y, mask=mask)
        y = nn.Dense(self.c.mlp, name="fc1")(nn.LayerNorm()(x))
        return x + nn.Dense(self.c.embed, name="fc2")(nn.gelu(y))


class LinenDecoder(nn.Module):
    c: Sizes

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.c.vocab, self.c.embed, name="embed")
        x = embed(tokens) + nn.Embed(self.c.sequence, self.c.embed)(jnp.arange(tokens.shape[1]))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.c.layers):
            x = LinenBlock(self.c)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def loss(model: Any, batch: Any) -> st.Loss:
    logits = model(batch["tokens"]).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return st.Loss((each * batch["weights"]).sum(), batch["weights"].sum())


NNX_AXES = {
    "embed/embedding": ("vocab", "embed"),
    r"blocks/\d+/attention/(query|key|value)/kernel": ("embed", "heads", "head_dim"),
    r"blocks/\d+/attention/out/kernel": ("heads", "head_dim", "embed"),
    r"blocks/\d+/fc1/kernel": ("embed", "mlp"),
    r"blocks/\d+/fc1/bias": ("mlp",),
    r"blocks/\d+/fc2/kernel": ("mlp", "embed"),
}
LINEN_AXES = {
    "embed/embedding": ("vocab", "embed"),
    r".*Attention_0/(query|key|value)/kernel": ("embed", "heads", "head_dim"),
    r".*Attention_0/out/kernel": ("heads", "head_dim", "embed"),
    r".*fc1/kernel": ("embed", "mlp"),
    r".*fc1/bias": ("mlp",),
    r".*fc2/kernel": ("mlp", "embed"),
}


def model(kind: str, sizes: Sizes) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Model and logical axes by path. `kind`: nnx or linen."""
    if kind == "nnx":
        return (lambda rngs: NnxDecoder(sizes, rngs)), NNX_AXES
    return st.linen(LinenDecoder(sizes), inputs=lambda batch: (batch["tokens"],)), LINEN_AXES
