"""What decoder-only language models share: from hidden states to logits, loss and FLOPs."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import ConfigError
from shardtrain.models.layers.cross_entropy import cross_entropy
from shardtrain.models.layers.stack import empty_caches
from shardtrain.parallel.groups import Loss
from shardtrain.sharding import constrain
from shardtrain.sharding.constrain import enter_block


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """What a model adds to its loss, per unit of weight, and what it reports (see `Loss.metrics`)."""

    loss: jax.Array
    metrics: Mapping[str, Any]


class LanguageModel(nnx.Module):
    """Base of the families. Arrays carry their shape in the name: B batch, T tokens, D embed, V vocab.

    Parameters are float32; activations have the dtype of the parameters (a Plan casts them), while norms,
    softmax, logits and loss are float32. Dropout needs a `key`, and is off after `model.eval()`.
    """

    config: Any
    blocks: Any

    @abc.abstractmethod
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

    @abc.abstractmethod
    def head(self) -> jax.Array:
        """The kernel [embed, vocab] of the head."""

    def __call__(self, tokens_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V] in float32."""
        return self.logits(self.hidden(tokens_BT, key=key))

    def hidden(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Normalised hidden states [B, T, D] after the last block."""
        return self.forward(tokens_BT, key=key, segments=segments)[0]

    def hidden_and_auxiliary(
        self, tokens_BT: jax.Array, *, key: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Auxiliary | None]:
        """As `hidden`, and what the model adds to the loss; None: nothing."""
        return self.hidden(tokens_BT, key=key, segments=segments), None

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits of hidden states."""
        x_BTD = enter_block(x_BTD)
        logits = jnp.einsum("btd,dv->btv", x_BTD, self.head(), preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "seq_block", "vocab")

    def empty_cache(self, batch: int, length: int) -> Any:
        """Keys and values for `length` positions of every layer."""
        return empty_caches(self.blocks, batch, length, self.head().dtype)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token; see `training_flops`."""
        return self.config.flops_per_token(sequence)


def language_model_loss(model: LanguageModel, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None) -> Loss:
    """Weighted sum of next-token cross-entropies in nats, and the sum of the weights.

    A model that adds something of its own (mixture of experts) adds it times the weight, so that it is a mean over
    groups like the rest; the metric `ce` is then the cross-entropy alone.

    Args:
        batch: `tokens`, `targets` int32 [B, T], `weights` float32 [B, T]; `segments` int32 [B, T] where documents
            are packed that must not see each other.
        rngs: of this group, for dropout; None for none.

    Communicates: what the model's `gather` and `constrain` say, and what `cross_entropy` says.
    """
    dropout = rngs is not None and model.config.dropout > 0
    key = rngs.dropout() if dropout else None  # type: ignore[union-attr]
    x_BTD, auxiliary = model.hidden_and_auxiliary(batch["tokens"], key=key, segments=batch.get("segments"))
    x_BTD = enter_block(x_BTD)
    total = cross_entropy(x_BTD, model.head(), batch["targets"], batch["weights"])
    weight = batch["weights"].sum()
    if auxiliary is None:
        return Loss(total, weight)
    metrics = {"ce": (total, weight), **auxiliary.metrics}
    return Loss(total + weight * auxiliary.loss, weight, metrics)


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
