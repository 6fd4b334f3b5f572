"""Rows of a table: a lookup whose gradient is summed in float32, and that moves rows instead of the table."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.parallel.fsdp import Shard, varying
from shardtrain.sharding import context
from shardtrain.sharding.constrain import place

LOOKED_UP = "looked_up"  # marks a table in the first trace, so that its other uses can be told apart


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One use of a table in the loss of one group: how many rows it takes."""

    path: str
    rows: int


def lookup(table: jax.Array, ids: jax.Array, path: str) -> jax.Array:
    """`table[ids]`.

    Under a Plan whose rules divide the table over the batch axes (fsdp), a table of which every use is a
    `lookup` stays divided along its columns: each device looks its part of every row up for all devices, and an
    all-to-all hands the rows over, where that is fewer bytes than gathering the table.

    Args:
        table: [rows, columns], as the model holds it. ids: int, any shape, each in [0, rows).
        path: where the table lives in the model, for instance `"token_table"`.

    Returns:
        `[*ids.shape, columns]`. The gradient of the table is summed in float32, whatever its dtype: a frequent
        token in a 16-bit sum would lose most of its occurrences.

    Communicates: with n devices on fsdp and f = (n-1)/n, where rows are exchanged: an all-gather of the ids
    (f*n*4 bytes an id), an all-to-all of the rows forward and of their gradients backward (f bytes each).
    """
    layout = context.current()
    if layout is None:
        return table[ids]
    if layout.mesh is None:
        layout.lookups.append(Lookup(path, ids.size))
        return checkpoint_name(table, LOOKED_UP)[ids]
    shard = layout.params.get(path)
    return _lookup(table, ids, shard, path in layout.exchanged) if shard else table[ids]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lookup(table: jax.Array, ids: jax.Array, shard: Shard, exchange: bool) -> jax.Array:
    return _forward(table, ids, shard, exchange)[0]


def _forward(table: jax.Array, ids: jax.Array, shard: Shard, exchange: bool) -> tuple[jax.Array, Any]:
    taken = ids.reshape(-1)
    if exchange:
        taken = jax.lax.all_gather(taken, shard.axes, axis=0, tiled=True)
    rows = _place(table.astype(shard.compute)[taken], PartitionSpec())
    if exchange:
        rows = jax.lax.all_to_all(
            rows.astype(shard.wire), shard.axes, split_axis=0, concat_axis=1, tiled=True
        )
    like = jnp.zeros((0, *table.shape), table.dtype)
    rows = rows.astype(shard.compute).reshape(*ids.shape, -1)
    return rows, (taken, varying(like, tuple(jax.typeof(table).mat.varying)))


def _backward(shard: Shard, exchange: bool, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    taken, like = residuals
    rows = gradient.reshape(-1, gradient.shape[-1])
    if exchange:
        rows = jax.lax.all_to_all(
            rows.astype(shard.wire), shard.axes, split_axis=1, concat_axis=0, tiled=True
        )
    axes = tuple(sorted({*jax.typeof(like).mat.varying, *jax.typeof(rows).mat.varying}))
    total = _place(varying(jnp.zeros(like.shape[1:], jnp.float32), axes), shard.spec)
    total = total.at[taken].add(rows.astype(jnp.float32))
    return _place(total, shard.spec).astype(like.dtype), None


def _place(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    layout = context.current()
    return x if layout is None or layout.mesh is None else place(x, spec, layout)


_lookup.defvjp(_forward, _backward)
