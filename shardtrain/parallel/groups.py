"""Groups: the rows that one call of the loss sees, and what adds up over them.

A run has G groups, whatever mesh it runs on. Group g holds the rows g, g+G, g+2G, ... of the global
batch and the key `fold_in(fold_in(key, step), g)`. A device takes one or several groups, one after
the other. So dropout, batch statistics and auxiliary losses are the same on every mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import ShardTrainError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss as a sum and a weight, which add exactly over groups, shards and padding.

    The loss of a step is `sum of sums / sum of weights` over all groups. A mean of means is not.

    Args:
        sum: scalar, differentiable: the weighted sum over rows (or tokens).
        weight: scalar: the sum of the weights (rows, or tokens that count). Not differentiated.
        metrics: name -> scalar, averaged over groups by `weight`; or name -> `(sum, weight)`,
            added up and divided.
    """

    sum: jax.Array | float
    weight: jax.Array | float
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def as_loss(value: Any, rows: int) -> Loss:
    """What a user's loss may return: `Loss`, a scalar (the mean over rows), or `(scalar, metrics)`."""
    if isinstance(value, Loss):
        _scalar(value.sum, "Loss.sum")
        _scalar(value.weight, "Loss.weight")
        return value
    metrics: Mapping[str, Any] = {}
    if isinstance(value, tuple) and len(value) == 2:
        value, metrics = value
        if not isinstance(metrics, Mapping):
            metrics = {"aux": metrics} if jnp.ndim(metrics) == 0 else {}
    _scalar(value, "the loss")
    return Loss(value * rows, jnp.float32(rows), metrics)


def _scalar(value: Any, where: str) -> None:
    if jnp.ndim(value) != 0:
        raise ShardTrainError(
            f"{where} has shape {jnp.shape(value)}, not ()",
            where="loss",
            fix="return st.Loss(sum=..., weight=...) with scalars, or the mean over the rows",
        )


def group_order(batch: int, groups: int) -> np.ndarray:
    """Rows of the global batch in the order in which devices hold them: group 0, group 1, ...

    Position p of the device array holds row `group_order(batch, groups)[p]`.
    """
    return np.arange(batch).reshape(batch // groups, groups).T.reshape(-1)


def group_key(key: jax.Array, step: jax.Array, group: jax.Array) -> jax.Array:
    """The random key of one group in one step; the same on every mesh."""
    return jax.random.fold_in(jax.random.fold_in(key, step), group)
