"""Everything that a run carries from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FIELDS = ("step", "params", "model_state", "opt_state", "grad_state", "key", "cursor")


@jax.tree_util.register_pytree_with_keys_class
class TrainState:
    """A pytree that keeps its leaves flat, so that a step costs no tree work on the host.

    Fields:
        step: int32 scalar, optimizer steps taken.
        params: what the optimizer trains.
        model_state: variables that are no parameters (`variables`) and parameters that are not
            trained (`frozen`).
        opt_state: optax state.
        grad_state: state of the aggregation of gradients; empty unless an aggregation has one.
        key: uint32[2], raw data of the run's random key.
        cursor: uint32[2], high and low word of the number of rows consumed.
    """

    __slots__ = ("leaves", "structure")

    def __init__(self, leaves: Sequence[Any], structure: Any):
        self.leaves = leaves
        self.structure = structure

    @classmethod
    def of(cls, **fields: Any) -> TrainState:
        """From its fields, by name."""
        leaves, structure = jax.tree.flatten(tuple(fields.pop(name) for name in FIELDS))
        assert not fields, f"unknown fields {list(fields)}"
        return cls(tuple(leaves), structure)

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            return jax.tree.unflatten(self.structure, self.leaves)[FIELDS.index(name)]
        raise AttributeError(name)

    def replace(self, **fields: Any) -> TrainState:
        """A copy with some fields changed."""
        values = dict(zip(FIELDS, jax.tree.unflatten(self.structure, self.leaves), strict=True))
        return TrainState.of(**{**values, **fields})

    def rows_consumed(self) -> int:
        """Rows of the data that the run has seen. Waits for the device."""
        high, low = np.asarray(jax.device_get(self.cursor)).tolist()
        return (high << 32) + low

    def __int__(self) -> int:
        return int(self.step)

    def __repr__(self) -> str:
        return f"TrainState({len(self.leaves)} leaves)"

    def tree_flatten_with_keys(self) -> tuple[Iterable[tuple[Any, Any]], None]:
        values = jax.tree.unflatten(self.structure, self.leaves)
        return [(jax.tree_util.GetAttrKey(n), v) for n, v in zip(FIELDS, values, strict=True)], None

    def tree_flatten(self) -> tuple[Iterable[Any], None]:
        return jax.tree.unflatten(self.structure, self.leaves), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> TrainState:
        leaves, structure = jax.tree.flatten(tuple(children))
        return cls(tuple(leaves), structure)


def advance(cursor: jax.Array, rows: int) -> jax.Array:
    """The cursor after `rows` more rows, with carry from the low into the high word."""
    low = cursor[1] + jnp.uint32(rows)
    return jnp.stack([cursor[0] + (low < cursor[1]).astype(jnp.uint32), low])


def cursor_words(rows: int) -> np.ndarray:
    """A cursor at `rows`."""
    return np.array([rows >> 32, rows & 0xFFFFFFFF], np.uint32)
