"""Model families: one file each, sharing `layers/`. Plain Flax; they run with and without a mesh."""

from typing import Any

from shardtrain.models.generate import generate
from shardtrain.models.gpt import GPT, GPTConfig
from shardtrain.models.language import LanguageModel, language_model_loss
from shardtrain.models.llama import Llama, LlamaConfig

FAMILIES: dict[type, type] = {GPTConfig: GPT, LlamaConfig: Llama}


def build_model(config: GPTConfig | LlamaConfig, rngs: Any) -> LanguageModel:
    """The model that a config describes."""
    return FAMILIES[type(config)](config, rngs)


__all__ = [
    "FAMILIES",
    "GPT",
    "GPTConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "build_model",
    "generate",
    "language_model_loss",
]
