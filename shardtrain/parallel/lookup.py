"""Rows of a table: a lookup whose gradient is summed in float32, and that moves rows instead of the table."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.parallel.fsdp import Shard, reduce_scatter, varying
from shardtrain.parallel.precision import widen
from shardtrain.parallel.region import on_parts
from shardtrain.sharding import context
from shardtrain.sharding.constrain import spec_of
from shardtrain.sharding.rules import spec_axes

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
    all-to-all hands the rows over, where that is fewer bytes than gathering the table. A table whose rows are divided
    (vocab over tensor) is looked up in parts, and the rows are summed: whole, or where the rules divide the residual
    stream along the sequence, divided.

    Args:
        table: [rows, columns], as the model holds it. ids: int, any shape, each in [0, rows).
        path: where the table lives in the model, for instance `"token_table"`.

    Returns:
        `[*ids.shape, columns]`. The gradient of the table is summed in float32 or wider, whatever its dtype: a frequent
        token in a 16-bit sum would lose most of its occurrences.

    Communicates: with n devices on fsdp and f = (n-1)/n, where rows are exchanged: an all-gather of the ids
    (f*n*4 bytes an id), an all-to-all of the rows forward and of their gradients backward (f bytes each). Over
    tensor an all-reduce of the rows (2f), or a reduce-scatter forward and an all-gather backward (f each).
    """
    layout = context.current()
    if layout is None:
        return table[ids]
    if layout.mesh is None:
        layout.lookups.append(Lookup(path, ids.size))
        return checkpoint_name(table, LOOKED_UP)[ids]
    shard = layout.params.get(path)
    if shard is None:
        return table[ids]
    rows: Any = jax.ShapeDtypeStruct((*ids.shape, table.shape[-1]), table.dtype)
    stream = spec_of(rows, "batch", "seq", "embed") if ids.ndim == 2 else None
    vocab = shard.spec[0] if shard.spec else None
    scatter = vocab is not None and stream is not None and stream[1] == vocab
    return _lookup(table, ids, _Way(shard, path in layout.exchanged, scatter))


@dataclasses.dataclass(frozen=True)
class _Way:
    """How the rows come. `exchange`: the table's columns are divided over manual axes, see `lookup`. Automatic axes may
    divide its rows, the vocabulary: then each device finds those that it has, and the partial results are summed, or with
    `scatter` summed and divided along the sequence, as the residual stream is."""

    shard: Shard
    exchange: bool
    scatter: bool

    @property
    def vocab(self) -> tuple[str, ...]:
        entry = self.shard.spec[0] if self.shard.spec else None
        return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)

    def rows_spec(self, ndim: int) -> PartitionSpec:
        """Of the rows, over the automatic axes."""
        columns = self.shard.spec[1] if len(self.shard.spec) > 1 else None
        sequence = self.shard.spec[0] if self.scatter else None
        return PartitionSpec(*[None] * (ndim - 2), sequence, columns) if ndim > 1 else PartitionSpec(columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: jax.Array, ids: jax.Array, way: _Way) -> jax.Array:
    return _forward(table, ids, way)[0]


def _forward(table: jax.Array, ids: jax.Array, way: _Way) -> tuple[jax.Array, Any]:
    shard, whole = way.shard, PartitionSpec()

    def find(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        taken = jax.lax.all_gather(ids, shard.axes) if way.exchange else ids
        place, mine = _place(taken, table.shape[0], way.vocab)
        rows = table.astype(shard.compute)[place]
        if way.vocab:
            rows = jnp.where(mine[..., None], rows, 0).astype(shard.wire)
            rows = (
                reduce_scatter(rows, way.vocab, rows.ndim - 2)
                if way.scatter
                else jax.lax.psum(rows, way.vocab)
            )
        if way.exchange:
            rows = rows.astype(shard.wire)
            rows = jax.lax.all_to_all(rows, shard.axes, split_axis=0, concat_axis=ids.ndim + 1, tiled=True)[0]
        return rows.astype(shard.compute), taken

    outs = way.rows_spec(ids.ndim + 1), whole
    rows, taken = on_parts(find, (shard.spec, whole), outs, spec_axes(shard.spec))(table, ids)
    like = jnp.zeros((0, *table.shape), table.dtype)
    return rows, (taken, varying(like, tuple(jax.typeof(table).mat.varying)))


def _backward(way: _Way, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    taken, like = residuals
    shard = way.shard
    height = like.shape[1] // math.prod(context.current().mesh.shape[a] for a in way.vocab)  # type: ignore[union-attr]

    def add_up(rows: jax.Array, taken: jax.Array) -> jax.Array:
        if way.exchange:
            rows = jax.lax.all_to_all(
                rows.astype(shard.wire)[None], shard.axes, split_axis=rows.ndim, concat_axis=0, tiled=True
            )
        if way.scatter:
            rows = jax.lax.all_gather(rows.astype(shard.wire), way.vocab, axis=rows.ndim - 2, tiled=True)
        place, mine = _place(taken, height, way.vocab)
        rows = jnp.where(mine[..., None], widen(rows), 0.0)
        axes = {*jax.typeof(like).mat.varying, *jax.typeof(rows).mat.varying}
        total = varying(jnp.zeros((height, rows.shape[-1]), rows.dtype), tuple(sorted(axes)))
        return total.at[place].add(rows)

    ins = way.rows_spec(gradient.ndim), PartitionSpec()
    run = on_parts(add_up, ins, shard.spec, spec_axes(shard.spec))
    return run(gradient, taken).astype(like.dtype), None


def _place(ids: jax.Array, height: int, vocab: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Where the ids are in this device's part of the rows, and which of them are."""
    if not vocab:
        return ids, jnp.ones_like(ids, bool)
    place = ids - height * jax.lax.axis_index(vocab).astype(ids.dtype)
    mine = (place >= 0) & (place < height)
    return jnp.where(mine, place, 0), mine


_lookup.defvjp(_forward, _backward)
