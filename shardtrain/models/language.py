"""What decoder-only language models share: from hidden states to logits, loss and FLOPs."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.models.layers.cross_entropy import cross_entropy
from shardtrain.models.layers.stack import empty_caches
from shardtrain.parallel.groups import Loss
from shardtrain.sharding import constrain


class LanguageModel(nnx.Module):
    """Base of the families. Arrays carry their shape in the name: B batch, T tokens, D embed, V vocab."""

    blocks: Any

    @abc.abstractmethod
    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        key: jax.Array | None = None,
        cache: Any = None,
        position: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Normalised hidden states [B, T, D] after the last block, and the cache."""

    @abc.abstractmethod
    def head(self) -> jax.Array:
        """The kernel [embed, vocab] of the head."""

    def __call__(self, tokens_BT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, T, V] in float32."""
        x_BTD, _ = self.hidden(tokens_BT, key=key)
        return self.logits(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits of hidden states."""
        logits = jnp.einsum("btd,dv->btv", x_BTD, self.head(), preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "seq", "vocab")

    def empty_cache(self, batch: int, length: int) -> Any:
        """Keys and values for `length` positions of every layer."""
        return empty_caches(self.blocks, batch, length, self.head().dtype)


def language_model_loss(model: LanguageModel, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None) -> Loss:
    """Weighted sum of next-token cross-entropies in nats, and the sum of the weights.

    `batch`: `tokens`, `targets` int32 [B, T], `weights` float32 [B, T].
    """
    key = None if rngs is None else rngs()
    x_BTD, _ = model.hidden(batch["tokens"], key=key)
    total = cross_entropy(x_BTD, model.head(), batch["targets"], batch["weights"])
    return Loss(total, batch["weights"].sum())


def training_flops(matrix_parameters: int, layers: int, width: int, sequence: int) -> float:
    """FLOPs to train on one token: 6 per parameter of a matrix product, 12 L T width for attention.

    Counts the causal half of the scores in full, as is customary. Source: Chowdhery et al., PaLM
    (arXiv 2204.02311), appendix B.
    """
    return 6.0 * matrix_parameters + 12.0 * layers * sequence * width
