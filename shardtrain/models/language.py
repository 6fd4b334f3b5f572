"""What decoder-only language models share: from hidden states to logits, loss and FLOPs."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models.layers.cross_entropy import cross_entropy
from shardtrain.models.layers.stack import empty_caches, scan_blocks
from shardtrain.parallel.groups import Loss
from shardtrain.parallel.precision import wide
from shardtrain.parallel.stages import Stages
from shardtrain.sharding import constrain
from shardtrain.sharding.constrain import enter_block


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """What a model adds to its loss, per unit of weight, and what it reports (see `Loss.metrics`)."""

    loss: jax.Array
    metrics: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Travelling:
    """The residual stream [B, T, D], and what the layers it has passed told: arrays with a leading dim of layers."""

    x_BTD: jax.Array
    told: Any


class LanguageModel(nnx.Module):
    """Base of the families. Arrays carry their shape in the name: B batch, T tokens, D embed, V vocab.

    Parameters are float32; activations have the dtype of the parameters (a Plan casts them), while norms,
    softmax, logits and loss are float32. Dropout needs a `key`, and is off after `model.eval()`.
    The loss is `enter`, the blocks and `leave`, one after the other; what else layers tell travels with the stream.
    """

    config: Any
    blocks: Any
    final_norm: Any

    @abc.abstractmethod
    def embed(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, position: jax.Array | int = 0
    ) -> jax.Array:
        """What enters the first block [B, T, D], for tokens that stand at `position` and after."""

    def keys(self, key: jax.Array | None) -> Any:
        """Keys of `embed` and of the blocks, from the model's."""
        return None, key

    def forward(
        self,
        tokens_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        position: jax.Array | int = 0,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Hidden states and the cache, with these tokens added to it at `position`."""
        keys = self.keys(key)
        x_BTD, cache = scan_blocks(
            self.blocks,
            self.embed(tokens_BT, key=keys[0], position=position),
            path="blocks",
            policy=self.config.remat,
            key=keys[1],
            cache=cache,
            position=position,
            segments=segments,
        )
        return self.final_norm(x_BTD), cache

    @abc.abstractmethod
    def head(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states, and the head's kernel [embed, vocab] that they meet."""

    @property
    def dtype(self) -> Any:
        """Of parameters and activations."""
        return self.final_norm.scale[...].dtype

    def __call__(self, tokens_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V] in float32."""
        return self.logits(self.hidden(tokens_BT, key=key))

    def hidden(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Normalised hidden states [B, T, D] after the last block."""
        return self.forward(tokens_BT, key=key, segments=segments)[0]

    def begin(self) -> None:
        """Before a call of the loss: what changes in the model's variables from step to step."""

    def enter(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, segments: jax.Array | None = None
    ) -> Any:
        """What enters the first block of the stack: [B, T, D], or `Travelling`."""
        return self.embed(tokens_BT, key=key)

    def leave(self, x: Any) -> tuple[jax.Array, Auxiliary | None]:
        """Normalised hidden states [B, T, D] of what leaves the last block, and what the model adds to the loss."""
        return self.final_norm(x), None

    def with_choices(self, x: Any) -> Any:
        """What `enter` made, with room for what routers decide, where there are any."""
        return x

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits of hidden states."""
        x_BTD, kernel = self.head(x_BTD)
        x_BTD = enter_block(x_BTD)
        logits = jnp.einsum("btd,dv->btv", x_BTD, kernel, preferred_element_type=wide(x_BTD))
        return constrain(logits, "batch", "seq_block", "vocab")

    def empty_cache(self, batch: int, length: int) -> Any:
        """Keys and values for `length` positions of every layer."""
        return empty_caches(self.blocks, batch, length, self.dtype)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token; see `training_flops`."""
        return self.config.flops_per_token(sequence)


Batch = Mapping[str, jax.Array]


def _key(model: LanguageModel, rngs: nnx.Rngs | None) -> jax.Array | None:
    return rngs.dropout() if rngs is not None and model.config.dropout > 0 else None


def _keys(model: LanguageModel, rngs: nnx.Rngs | None) -> Any:
    return model.keys(_key(model, rngs))


def _embed(model: LanguageModel, batch: Batch, rngs: nnx.Rngs | None) -> Any:
    return model.enter(batch["tokens"], key=_keys(model, rngs)[0], segments=batch.get("segments"))


def _block(block: Any, x: Any, key: jax.Array | None, batch: Batch) -> Any:
    if not isinstance(x, Travelling):
        return block(x, key=key, segments=batch.get("segments"))[0]
    x_BTD, (_, told) = block(x.x_BTD, key=key, segments=batch.get("segments"))
    return Travelling(x_BTD, told.after(x.told))


def _head(model: LanguageModel, x: Any, batch: Batch) -> Loss:
    x_BTD, auxiliary = model.leave(x)
    ce = _cross_entropy(model, x_BTD, batch)
    if auxiliary is None:
        return ce
    # Times the weight, so that it is a mean over groups like the rest.
    metrics = {"ce": (ce.sum, ce.weight), **auxiliary.metrics}
    return Loss(ce.sum + ce.weight * auxiliary.loss, ce.weight, metrics)


def _cross_entropy(model: LanguageModel, x_BTD: jax.Array, batch: Batch) -> Loss:
    x_BTD, kernel = model.head(x_BTD)
    total = cross_entropy(enter_block(x_BTD), kernel, batch["targets"], batch["weights"])
    return Loss(total, batch["weights"].sum())


def _embed_to_choose(model: LanguageModel, batch: Batch, rngs: nnx.Rngs | None) -> Any:
    return model.with_choices(_embed(model, batch, rngs))


def _chosen(model: LanguageModel, x: Any, batch: Batch) -> Loss:
    told = {"choices": jnp.moveaxis(x.told.chosen, 0, 2)} if isinstance(x, Travelling) else {}
    return Loss(0.0, 0.0, told)


_PARTS: dict[str, Any] = dict(
    keys=lambda model, rngs: _keys(model, rngs)[1],
    remat=lambda model: model.config.remat,
    begin=lambda model: model.begin(),
)
language_model_loss = Stages(
    _embed, _block, _head, **_PARTS, choices=Stages(_embed_to_choose, _block, _chosen, **_PARTS)
)
"""`(model, batch, rngs)`: weighted sum of next-token cross-entropies in nats, and the sum of the weights.

A mixture of experts adds its auxiliary losses times the weight; the metric `ce` is then the cross-entropy alone.

Args:
    batch: `tokens`, `targets` int32 [B, T], `weights` float32 [B, T]; `segments` int32 [B, T] where documents
        are packed that must not see each other.
    rngs: of this group, for dropout; None for none.

Communicates: what the model's `gather` and `constrain` say, and what `cross_entropy` says; on a mesh with stages
what `Stages` says.
"""


def training_flops(matrix_parameters: int, layers: int, width: int, sequence: int) -> float:
    """FLOPs to train on one token: 6 per parameter of a matrix product, 12 L T width for attention.

    Counts the head (tied or not), not the tables that are looked up; counts the scores in full although
    half are masked, as is customary. Source: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.
    """
    return 6.0 * matrix_parameters + 12.0 * layers * sequence * width


def check_sizes(config: Any) -> None:
    """Refuse sizes below 1 (0 where a config gives it a meaning) and a dropout outside [0, 1)."""
    name = type(config).__name__
    for field in ("vocab", "sequence", "embed", "layers", "heads"):
        if getattr(config, field) < 1:
            raise ConfigError(f"{getattr(config, field)}", where=f"{name}.{field}", fix="1 or more")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"{config.dropout}", where=f"{name}.dropout", fix="0 <= dropout < 1")


def check_heads(config: Any) -> None:
    """Refuse heads that do not group over `kv_heads`, and an embed that heads do not divide."""
    name = type(config).__name__
    if config.kv_heads < 1 or config.heads % config.kv_heads:
        raise ConfigError(
            f"heads = {config.heads} is not divisible by kv_heads = {config.kv_heads}",
            where=name,
            fix=f"kv_heads={math.gcd(config.heads, config.kv_heads) or 1}",
        )
    if not config.head_dim and config.embed % config.heads:
        raise ConfigError(
            f"embed = {config.embed} is not divisible by heads = {config.heads}",
            where=name,
            fix=f"embed={math.ceil(config.embed / config.heads) * config.heads}",
        )
