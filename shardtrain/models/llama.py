"""Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

Source: Touvron et al. (arXiv 2302.13971); Llama 3 (arXiv 2407.21783).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from shardtrain.models.language import LanguageModel, check_heads, check_sizes, training_flops
from shardtrain.models.layers.attention import Cache, SelfAttention
from shardtrain.models.layers.dense import Dropout, normal
from shardtrain.models.layers.mlp import GatedMlp
from shardtrain.models.layers.norm import RMSNorm
from shardtrain.models.layers.stack import stack
from shardtrain.parallel.fsdp import meet
from shardtrain.parallel.lookup import lookup
from shardtrain.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama. `head_dim`: 0 means embed / heads. `theta`: base of the rotary positions."""

    vocab: int = 512
    sequence: int = 128
    embed: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 0
    mlp: int = 384
    theta: float = 10000.0
    dropout: float = 0.0
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self)
        check_heads(self)

    @property
    def width(self) -> int:
        """Of one head."""
        return self.head_dim or self.embed // self.heads

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token; see `training_flops`."""
        attention = 2 * self.embed * (self.heads + self.kv_heads) * self.width
        matrices = self.layers * (attention + 3 * self.embed * self.mlp) + self.embed * self.vocab
        return training_flops(matrices, self.layers, self.heads * self.width, sequence)


TINY = LlamaConfig(kv_heads=4)
B1 = LlamaConfig(128256, 4096, 2048, 16, 32, 8, 64, 8192, 500000.0, remat="dots")
B8 = LlamaConfig(128256, 4096, 4096, 32, 32, 8, 128, 14336, 500000.0, remat="full")
B70 = LlamaConfig(128256, 4096, 8192, 80, 64, 8, 128, 28672, 500000.0, remat="full")


class Block(nnx.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        out_stddev = 0.02 / math.sqrt(2 * c.layers)
        self.attention_norm = RMSNorm(c.embed, rngs)
        self.attention = SelfAttention(
            c.embed, c.heads, c.kv_heads, c.width, rngs, bias=False, theta=c.theta, out_stddev=out_stddev
        )
        self.mlp_norm = RMSNorm(c.embed, rngs)
        self.mlp = GatedMlp(c.embed, c.mlp, rngs, out_stddev=out_stddev)
        self.dropout = Dropout(c.dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        position: jax.Array | int = 0,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        keys: Any = (None, None) if key is None else jax.random.split(key)
        mixed, cache = self.attention(
            self.attention_norm(x_BTD), cache=cache, position=position, segments=segments
        )
        x_BTD = x_BTD + self.dropout(mixed, keys[0])
        x_BTD = x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)), keys[1])
        return constrain(x_BTD, "batch", "seq", "embed"), cache


class Llama(LanguageModel):
    """A token table, a stack of blocks, a final norm, a head of its own."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.token_table = normal(rngs, 0.02, vocab=c.vocab, embed=c.embed)
        self.blocks = stack(lambda rngs: Block(c, rngs), c.layers, rngs)
        self.final_norm = RMSNorm(c.embed, rngs)
        self.head_kernel = normal(rngs, 0.02, embed=c.embed, vocab=c.vocab)

    def embed(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, position: jax.Array | int = 0
    ) -> jax.Array:
        x_BTD = lookup(self.token_table[...], tokens_BT, "token_table")
        return constrain(x_BTD, "batch", "seq", "embed")

    def head(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return meet(x_BTD, self.head_kernel[...], "head_kernel")
