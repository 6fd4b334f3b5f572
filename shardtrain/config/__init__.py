"""Configs: frozen dataclasses, Python functions that return them, flags over them."""

from shardtrain.config.load import difference, flat, from_json, load_config, to_json
from shardtrain.config.overrides import apply_overrides
from shardtrain.config.resolve import resolve
from shardtrain.config.schema import (
    Custom,
    Dcn,
    MeshSizes,
    Monitor,
    Optimizer,
    RunConfig,
    Text,
    custom,
)

__all__ = [
    "Custom",
    "Dcn",
    "MeshSizes",
    "Monitor",
    "Optimizer",
    "RunConfig",
    "Text",
    "apply_overrides",
    "custom",
    "difference",
    "flat",
    "from_json",
    "load_config",
    "resolve",
    "to_json",
]
