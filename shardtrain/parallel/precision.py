"""Dtypes by name, and the dtype of sums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import ConfigError, suggestion

PRECISIONS = {"f32": jnp.float32, "bf16": jnp.bfloat16, "f64": jnp.float64}


def dtype_of(where: str, name: str) -> Any:
    """The dtype that a name stands for.

    Raises:
        ConfigError: another name; f64 where JAX makes float32 of it.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"'{name}' is none", where=where, fix=suggestion(name, PRECISIONS, "f32"))
    if name == "f64" and not jax.config.jax_enable_x64:
        raise ConfigError(
            "f64, but JAX has 64 bits off",
            where=where,
            why="it would make float32 of every float64, without a word",
            fix="JAX_ENABLE_X64=1 in the environment, or jax.config.update('jax_enable_x64', True) before anything else",
        )
    return PRECISIONS[name]


def wide(x: Any) -> Any:
    """The dtype in which values such as `x` are added up and normalised: float32, or float64 where they are."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widen(x: jax.Array) -> jax.Array:
    """`x` in that dtype; whole numbers as they are."""
    return x.astype(wide(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
