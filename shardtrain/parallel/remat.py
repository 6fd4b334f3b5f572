"""What the backward pass recomputes, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from shardtrain.errors import ConfigError

GATHERED = "gathered"  # weights that `gather` made whole: never saved, gathered again in the backward
REDUCED = "reduced"  # results of a collective of the forward: replaying them would send them again
POLICIES = ("none", "dots", "full")


def policy(name: str) -> Callable[..., bool]:
    """A `jax.checkpoint` policy.

    `none`: save everything but gathered weights. `dots`: save matrix products without a batch dim.
    `full`: save only the input of the block and what came out of a collective.
    `a,b`: as `full`, and the values that the model named `a` and `b`
    (our blocks name `attention_out`, `mlp_out`, `qkv`, `mlp_up`).
    """
    policies = jax.checkpoint_policies
    if name == "none":
        return policies.save_anything_except_these_names(GATHERED)
    if name == "dots":
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(REDUCED)
        )
    if name == "full":
        return policies.save_only_these_names(REDUCED)
    names = [part.strip() for part in name.split(",") if part.strip()]
    if not names:
        raise ConfigError(
            f"remat policy '{name}' names nothing",
            where="remat",
            fix=f"one of {', '.join(POLICIES)}, or names of values such as attention_out,mlp_out",
        )
    return policies.save_only_these_names(REDUCED, *names)


def remat(function: Callable[..., Any], name: str, *, in_scan: bool = False) -> Callable[..., Any]:
    """`function` under the named policy; `in_scan` when a scan keeps forward and backward apart."""
    return jax.checkpoint(function, policy=policy(name), prevent_cse=not in_scan)
