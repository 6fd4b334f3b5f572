"""GPT: the GPT-2 and GPT-3 family. Source: Radford et al. 2019; Brown et al. (arXiv 2005.14165)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models.language import LanguageModel, check_sizes, training_flops
from shardtrain.models.layers.attention import Cache, SelfAttention
from shardtrain.models.layers.dense import Dropout, normal
from shardtrain.models.layers.mlp import Mlp
from shardtrain.models.layers.norm import LayerNorm
from shardtrain.models.layers.stack import stack
from shardtrain.parallel.fsdp import meet
from shardtrain.parallel.lookup import lookup
from shardtrain.parallel.sequence import own, parts
from shardtrain.sharding import constrain
from shardtrain.sharding.constrain import join_stream


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `mlp`: 0 means 4 x embed. `remat`: what the backward recomputes (`none`, `dots`, `full`, names).

    `vocab` is best a multiple of 128, so that it divides over any tensor axis.
    """

    vocab: int = 512
    sequence: int = 128
    embed: int = 128
    layers: int = 4
    heads: int = 8
    mlp: int = 0
    dropout: float = 0.0
    tied: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.embed % self.heads:
            raise ConfigError(
                f"embed = {self.embed} is not divisible by heads = {self.heads}",
                where="GPTConfig",
                fix=f"embed={math.ceil(self.embed / self.heads) * self.heads}",
            )

    @property
    def columns(self) -> int:
        """Columns of the MLP."""
        return self.mlp or 4 * self.embed

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token; see `training_flops`."""
        layer = 4 * self.embed**2 + 2 * self.embed * self.columns
        return training_flops(
            self.layers * layer + self.embed * self.vocab, self.layers, self.embed, sequence
        )


TINY = GPTConfig()
SMALL = GPTConfig(vocab=50304, sequence=1024, embed=768, layers=12, heads=12, remat="dots")
MEDIUM = GPTConfig(vocab=50304, sequence=1024, embed=1024, layers=24, heads=16, remat="dots")
LARGE = GPTConfig(vocab=50304, sequence=1024, embed=1280, layers=36, heads=20, remat="full")
XL = GPTConfig(vocab=50304, sequence=1024, embed=1600, layers=48, heads=25, remat="full")
B175 = GPTConfig(vocab=50304, sequence=2048, embed=12288, layers=96, heads=96, remat="full")


class Block(nnx.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, c: GPTConfig, rngs: nnx.Rngs):
        out_stddev = 0.02 / math.sqrt(2 * c.layers)  # keeps the residual stream's variance at any depth
        self.attention_norm = LayerNorm(c.embed, rngs)
        self.attention = SelfAttention(
            c.embed, c.heads, c.heads, c.embed // c.heads, rngs, bias=True, theta=None, out_stddev=out_stddev
        )
        self.mlp_norm = LayerNorm(c.embed, rngs)
        self.mlp = Mlp(c.embed, c.columns, rngs, out_stddev=out_stddev)
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


class GPT(LanguageModel):
    """Token and position tables, a stack of blocks, a final norm, a head that is the token table by default."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.token_table = normal(rngs, 0.02, vocab=c.vocab, embed=c.embed)
        self.position_table = normal(rngs, 0.02, seq=c.sequence, embed=c.embed)
        self.dropout = Dropout(c.dropout)
        self.blocks = stack(lambda rngs: Block(c, rngs), c.layers, rngs)
        self.final_norm = LayerNorm(c.embed, rngs)
        self.head_kernel = None if c.tied else normal(rngs, 0.02, embed=c.embed, vocab=c.vocab)

    def keys(self, key: jax.Array | None) -> Any:
        return (None, None) if key is None else jax.random.split(key)

    def embed(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, position: jax.Array | int = 0
    ) -> jax.Array:
        length = tokens_BT.shape[1] * parts()
        if length > self.config.sequence:
            raise ConfigError(
                f"{length} tokens, the position table has {self.config.sequence}",
                where="GPT",
                fix="a shorter sequence, or a model with a larger one",
            )
        here = own(jax.lax.dynamic_slice_in_dim(self.position_table[...], position, length))
        x_BTD = lookup(self.token_table[...], tokens_BT, "token_table")
        x_BTD = constrain(x_BTD + join_stream(here), "batch", "seq", "embed")
        return self.dropout(x_BTD, key)

    def head(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.head_kernel is None:
            return x_BTD, self.token_table[...].T
        return meet(x_BTD, self.head_kernel[...], "head_kernel")
