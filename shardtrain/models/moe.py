"""Mixture of experts, on the attention and norms of Llama: Mixtral-like and DeepSeek-like models by their config.

Source: Jiang et al., Mixtral (arXiv 2401.04088); Dai et al., DeepSeekMoE (arXiv 2401.06066); DeepSeek-V3
(arXiv 2412.19437), without its latent attention.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models.language import (
    Auxiliary,
    LanguageModel,
    Travelling,
    check_heads,
    check_sizes,
    training_flops,
)
from shardtrain.models.layers.attention import Cache, SelfAttention
from shardtrain.models.layers.dense import Dropout, normal
from shardtrain.models.layers.mlp import GatedMlp
from shardtrain.models.layers.moe import ExpertMlp, Routed, balanced_bias
from shardtrain.models.layers.norm import RMSNorm
from shardtrain.models.layers.stack import empty_caches, scan_blocks, stack
from shardtrain.parallel.fsdp import meet
from shardtrain.parallel.lookup import lookup
from shardtrain.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sizes of a mixture of experts. The defaults route as Mixtral does.

    `experts`, `chosen`: in a layer, and of them per token. `expert_mlp`: columns of one. `shared`: experts that every
    token takes. `dense_layers`: so many first layers have one MLP of `mlp` columns instead.
    `score`, `renormalise`, `scale`: the weights of the chosen experts, see `models/layers/moe.py`.
    `capacity`: an expert keeps that many times its even share of a group's choices and drops the rest; 0 drops none.
    `balance`, `router_z`: coefficients of the auxiliary losses, summed over layers. `bias_rate`: step of the bias that
    balances the selection, 0 for none.
    """

    vocab: int = 512
    sequence: int = 128
    embed: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 0
    experts: int = 8
    chosen: int = 2
    expert_mlp: int = 128
    shared: int = 0
    dense_layers: int = 0
    mlp: int = 384
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    capacity: float = 1.25
    balance: float = 0.01
    router_z: float = 0.001
    bias_rate: float = 0.0
    theta: float = 10000.0
    dropout: float = 0.0
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self)
        check_heads(self)
        if not 1 <= self.chosen <= self.experts:
            raise ConfigError(
                f"chosen = {self.chosen} of experts = {self.experts}",
                where="MoEConfig",
                why="a token takes different experts",
                fix=f"1 <= chosen <= {self.experts}",
            )
        if not 0 <= self.dense_layers < self.layers:
            raise ConfigError(
                f"dense_layers = {self.dense_layers} of layers = {self.layers}",
                where="MoEConfig",
                why="without a layer of experts it is a Llama",
                fix=f"0 <= dense_layers < {self.layers}",
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ConfigError(f"'{self.score}' is none", where="MoEConfig.score", fix="softmax or sigmoid")
        for name in ("capacity", "balance", "router_z", "bias_rate", "shared"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{getattr(self, name)}", where=f"MoEConfig.{name}", fix="0 or more")

    @property
    def width(self) -> int:
        """Of one head."""
        return self.head_dim or self.embed // self.heads

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token, of the parameters that a token meets; see `training_flops`."""
        attention = 2 * self.embed * (self.heads + self.kv_heads) * self.width
        routed = self.embed * self.experts + 3 * self.embed * self.expert_mlp * (self.chosen + self.shared)
        matrices = (
            self.layers * attention
            + self.dense_layers * 3 * self.embed * self.mlp
            + (self.layers - self.dense_layers) * routed
            + self.embed * self.vocab
        )
        return training_flops(matrices, self.layers, self.heads * self.width, sequence)


TINY = MoEConfig()
MIXTRAL_8X7B = MoEConfig(
    vocab=32000,
    sequence=4096,
    embed=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    expert_mlp=14336,
    balance=0.02,
    theta=1e6,
    remat="full",
)
DEEPSEEK_16B = MoEConfig(  # DeepSeekMoE 16B, balanced as DeepSeek-V3 is
    vocab=102400,
    sequence=4096,
    embed=2048,
    layers=28,
    heads=16,
    kv_heads=16,
    head_dim=128,
    experts=64,
    chosen=6,
    expert_mlp=1408,
    shared=2,
    dense_layers=1,
    mlp=10944,
    score="sigmoid",
    balance=0.0001,
    router_z=0.0,
    bias_rate=0.001,
    remat="full",
)


class Block(nnx.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + experts(norm(x))`, or a dense MLP in place of experts."""

    def __init__(self, c: MoEConfig, dense: bool, rngs: nnx.Rngs):
        out_stddev = 0.02 / math.sqrt(2 * c.layers)
        self.attention_norm = RMSNorm(c.embed, rngs)
        self.attention = SelfAttention(
            c.embed, c.heads, c.kv_heads, c.width, rngs, bias=False, theta=c.theta, out_stddev=out_stddev
        )
        self.mlp_norm = RMSNorm(c.embed, rngs)
        self.mlp: Any = (
            GatedMlp(c.embed, c.mlp, rngs, out_stddev=out_stddev)
            if dense
            else ExpertMlp(
                c.embed,
                c.expert_mlp,
                rngs,
                experts=c.experts,
                chosen=c.chosen,
                shared=c.shared * c.expert_mlp,
                score=c.score,
                renormalise=c.renormalise,
                scale=c.scale,
                capacity=c.capacity,
                biased=c.bias_rate > 0,
                out_stddev=out_stddev,
            )
        )
        self.dropout = Dropout(c.dropout)

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        position: jax.Array | int = 0,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache | None, Routed | None]]:
        keys: Any = (None, None) if key is None else jax.random.split(key)
        mixed, cache = self.attention(
            self.attention_norm(x_BTD), cache=cache, position=position, segments=segments
        )
        x_BTD = x_BTD + self.dropout(mixed, keys[0])
        normed = self.mlp_norm(x_BTD)
        # Text that is generated goes token by token: a capacity would make it depend on what is next to it.
        dense = isinstance(self.mlp, GatedMlp)
        mixed, told = (self.mlp(normed), None) if dense else self.mlp(normed, drop=cache is None)
        x_BTD = x_BTD + self.dropout(mixed, keys[1])
        return constrain(x_BTD, "batch", "seq", "embed"), (cache, told)


class MoE(LanguageModel):
    """A token table, a stack of dense blocks (if any), a stack of blocks with experts, a final norm, a head."""

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.deterministic = False
        self.token_table = normal(rngs, 0.02, vocab=c.vocab, embed=c.embed)
        self.dense_blocks = (
            stack(lambda r: Block(c, True, r), c.dense_layers, rngs) if c.dense_layers else None
        )
        self.blocks = stack(lambda r: Block(c, False, r), c.layers - c.dense_layers, rngs)
        self.final_norm = RMSNorm(c.embed, rngs)
        self.head_kernel = normal(rngs, 0.02, embed=c.embed, vocab=c.vocab)

    def keys(self, key: jax.Array | None) -> Any:
        return (None, None) if key is None else jax.random.split(key)

    def embed(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, position: jax.Array | int = 0
    ) -> jax.Array:
        return constrain(lookup(self.token_table[...], tokens_BT, "token_table"), "batch", "seq", "embed")

    def forward(
        self,
        tokens_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        position: jax.Array | int = 0,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        x_BTD, cache, _ = self._run(tokens_BT, key, segments, cache, position)
        return x_BTD, cache

    def begin(self) -> None:
        """In training the routers' biases take a step.

        That is the step of the load before: the load of a whole step is known when its groups have been merged.
        """
        mlp = self.blocks.mlp
        if not self.deterministic and mlp.bias is not None:
            mlp.bias.set_value(balanced_bias(mlp.bias[...], mlp.load[...], self.config.bias_rate))

    def enter(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, segments: jax.Array | None = None
    ) -> Travelling:
        c, x_BTD = self.config, self.embed(tokens_BT)
        if self.dense_blocks is not None:
            x_BTD = scan_blocks(
                self.dense_blocks, x_BTD, path="dense_blocks", policy=c.remat, key=key, segments=segments
            )[0]
        return Travelling(x_BTD, Routed.of_none(c.layers - c.dense_layers, c.experts, x_BTD))

    def leave(self, x: Travelling) -> tuple[jax.Array, Auxiliary]:
        """Hidden states, and balance and router z loss of this group."""
        c, told, learns = self.config, x.told, not self.deterministic
        if learns and self.blocks.mlp.load is not None:
            self.blocks.mlp.load.set_value(told.load)
        loss = c.balance * told.balance.sum() + c.router_z * told.router_z.sum()
        metrics = {
            "balance": told.balance.mean(),
            "router_z": told.router_z.mean(),
            "dropped": (told.dropped.sum(), told.load.sum()),
        }
        return self.final_norm(x.x_BTD), Auxiliary(loss if learns else jnp.zeros_like(loss), metrics)

    def with_choices(self, x: Travelling) -> Travelling:
        shape = (*x.x_BTD.shape[:2], self.config.chosen)
        return Travelling(x.x_BTD, x.told.with_choices(shape, x.x_BTD))

    def _run(
        self, tokens_BT: jax.Array, key: Any, segments: Any, cache: Any, position: Any
    ) -> tuple[jax.Array, Any, Routed]:
        options: dict[str, Any] = dict(policy=self.config.remat, position=position, segments=segments)
        keys = self.keys(key)
        dense_cache, cache = (None, None) if cache is None else cache
        x_BTD = self.embed(tokens_BT)
        if self.dense_blocks is not None:
            x_BTD, (dense_cache, _) = scan_blocks(
                self.dense_blocks, x_BTD, path="dense_blocks", key=keys[0], cache=dense_cache, **options
            )
        x_BTD, (cache, told) = scan_blocks(
            self.blocks, x_BTD, path="blocks", key=keys[1], cache=cache, **options
        )
        return self.final_norm(x_BTD), (dense_cache, cache), told

    def empty_cache(self, batch: int, length: int) -> Any:
        dense = self.dense_blocks
        first = None if dense is None else empty_caches(dense, batch, length, self.dtype)
        return first, super().empty_cache(batch, length)

    def head(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return meet(x_BTD, self.head_kernel[...], "head_kernel")
