"""Model families: one file each, sharing `layers/`. Plain Flax; they run with and without a mesh."""

from __future__ import annotations

import math

import jax
from flax import nnx

from shardtrain.models.generate import generate
from shardtrain.models.gpt import GPT, GPTConfig
from shardtrain.models.language import LanguageModel, language_model_loss
from shardtrain.models.llama import Llama, LlamaConfig
from shardtrain.models.moe import MoE, MoEConfig

Config = GPTConfig | LlamaConfig | MoEConfig
FAMILIES: dict[type, type] = {GPTConfig: GPT, LlamaConfig: Llama, MoEConfig: MoE}


def build_model(config: Config, rngs: nnx.Rngs) -> LanguageModel:
    """The model that a config describes."""
    return FAMILIES[type(config)](config, rngs)


def parameter_count(config: Config) -> int:
    """Parameters of the model that a config describes, tied ones once; allocates nothing."""
    shapes = nnx.eval_shape(lambda: nnx.state(build_model(config, nnx.Rngs(0)), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


__all__ = [
    "FAMILIES",
    "GPT",
    "GPTConfig",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "MoE",
    "MoEConfig",
    "build_model",
    "generate",
    "language_model_loss",
    "parameter_count",
]
