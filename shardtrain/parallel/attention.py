"""Attention on any mesh: on one device's rows and heads, and over a divided sequence (see `ring.py`)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.errors import ShardingError
from shardtrain.mesh import device_of
from shardtrain.parallel import fused, ring
from shardtrain.parallel.region import free_axes, on_parts
from shardtrain.parallel.remat import REDUCED, opaque
from shardtrain.parallel.sequence import zigzag_order
from shardtrain.sharding import context
from shardtrain.sharding.constrain import spec_of

CHUNK = 1024  # queries at a time where no fused kernel keeps the scores out of memory
QUERIES, KEYS = "attention_queries", "attention_keys"  # mark what may travel in the first trace
MODES = ("ring", "gather", "ulysses")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segments: jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v; scores and softmax in float32 or wider. Exact on every mesh.

    Under a Plan with a `context` axis each device holds a part of every sequence, and `plan(attention=...)` says how
    queries meet the keys of the others:

    - `ring`: keys and values travel from neighbour to neighbour while their scores are made; two blocks are held.
    - `gather`: keys and values are gathered, and again for the backward.
    - `ulysses`: an all-to-all gives each device whole sequences of some heads, and another one takes them back.

    Args:
        q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim]; `kv_heads` divides `heads`.
        causal: a token sees itself and those before it.
        segments: int [batch, seq]; a token sees only its own segment (packed documents). None: one segment.
        chunk: queries at a time where no fused kernel is at hand; bounds the scores in memory.

    Where whole sequences are at hand, in 16 bits, NVIDIA GPUs and TPUs run a fused kernel (`fused.py`).

    Communicates: over context, with f = (n-1)/n, K bytes of all keys and values and Q of all queries of the rows:
    ring and gather f*K forward, 2f*K backward; ulysses 2f*(2Q + K)/n in all.

    Raises:
        ShardingError: heads that the context axis does not divide under `ulysses`.

    Source: Liu et al., ring attention (arXiv 2310.01889); Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
    """
    layout = context.current()
    if layout is not None and layout.mesh is None:
        q, k, v = (checkpoint_name(x, name) for x, name in ((q, QUERIES), (k, KEYS), (v, KEYS)))
        layout.attentions.append(causal)
    if layout is None or layout.mesh is None or not layout.sequence:
        return attend(q, k, v, causal=causal, segments=segments, chunk=chunk)
    if layout.attention == "ulysses":
        return _ulysses(q, k, v, causal, segments, chunk)
    return ring.attention(q, k, v, segments, causal=causal, gathered=layout.attention == "gather")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segments: jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """`attention` where every device has whole sequences."""
    length = q.shape[1]
    kernel = fused.kernel_for(_device(), q, k, segments)
    if kernel is not None:
        return fused.attend(kernel, q, k, v, segments, causal=causal)
    if segments is None and length <= chunk:
        return _product(q, k, v, causal=causal)

    # Scores exist for one chunk of queries at a time, in the backward too, where they are made again.
    @jax.checkpoint
    def one(start: jax.Array, q_chunk: jax.Array, q_segments: jax.Array | None) -> jax.Array:
        places = (start + jnp.arange(q_chunk.shape[1]))[:, None]
        mask = places >= jnp.arange(length)[None] if causal else jnp.ones((q_chunk.shape[1], length), bool)
        mask = mask[None, None]
        if segments is not None and q_segments is not None:
            mask = mask & (q_segments[:, None, :, None] == segments[:, None, None])
        return _product(q_chunk, k, v, mask=mask)

    if length <= chunk:
        return one(jnp.int32(0), q, segments)
    chunks = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    parts = (jnp.arange(chunks) * chunk, cut(q), None if segments is None else cut(segments))
    out = jax.lax.map(lambda xs: one(*xs), parts)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], chunks * chunk, *q.shape[2:])[:, :length]


def _product(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, mask: jax.Array | None = None
) -> jax.Array:
    """On what is at hand. JAX's own takes its softmax in float32 whatever comes; here float64 stays so."""
    if q.dtype != jnp.float64:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, mask=mask)
    if causal:
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))[None, None]
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btngh,bsnh->bngts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    out = jnp.einsum("bngts,bsnh->btngh", jax.nn.softmax(scores), v)
    return out.reshape(*q.shape[:2], -1, q.shape[-1])


def _ulysses(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, segments: jax.Array | None, chunk: int
) -> jax.Array:
    """Whole sequences of some heads: exchanged in, attended as on one device, exchanged back."""
    layout = context.current()
    assert layout is not None and layout.mesh is not None
    axes = layout.sequence
    n = jax.lax.axis_size(axes)
    heads = spec_of(q, "batch", "seq_block", "heads", "head_dim")
    kv = spec_of(k, "batch", "seq_block", "kv_heads", "head_dim")
    for name, x, spec in (("heads", q, heads), ("kv_heads", k, kv)):
        if x.shape[2] % (n * _parts(spec, 2)):
            raise ShardingError(
                f"{x.shape[2]} {name} are not divisible by {n} (mesh {'+'.join(axes)}={n}) x {_parts(spec, 2)} (tensor)",
                where="attention 'ulysses'",
                why="it divides heads where others divide the sequence",
                fix=f"attention='ring', or {name} that {n * _parts(spec, 2)} divides",
            )

    way = [_Way(axes, spec or PartitionSpec()) for spec in (heads, kv, kv)]
    # What has travelled is saved under every remat policy: to make it again would be to send it again.
    whole = [checkpoint_name(_exchange(x, w, True), REDUCED) for x, w in zip((q, k, v), way, strict=True)]
    if segments is not None:
        segments = jax.lax.all_gather(segments, axes, axis=1, tiled=True)[:, _order(segments, axes).argsort()]
    mixed = attend(*whole, causal=causal, segments=segments, chunk=chunk)
    return checkpoint_name(_exchange(mixed, way[0], False), REDUCED)


@dataclasses.dataclass(frozen=True)
class _Way:
    """`axes` divide the sequence; automatic ones divide the heads as `spec` says."""

    axes: tuple[str, ...]
    spec: PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exchange(x: jax.Array, way: _Way, enter: bool) -> jax.Array:
    """From all heads of a part of the sequence to some heads of all of it, in order; or back. Its own transpose."""

    def turn(x: jax.Array) -> jax.Array:
        if enter:
            whole = jax.lax.all_to_all(x, way.axes, split_axis=2, concat_axis=1, tiled=True)
            return whole[:, _order(x, way.axes).argsort()]
        n = jax.lax.axis_size(way.axes)
        x = x[:, zigzag_order(x.shape[1], n)]
        return jax.lax.all_to_all(x, way.axes, split_axis=1, concat_axis=2, tiled=True)

    return opaque(on_parts(turn, way.spec, way.spec, free_axes()))(x)


def _exchange_back(way: _Way, enter: bool, _: tuple[()], gradient: jax.Array) -> tuple[jax.Array]:
    return (_exchange(gradient, way, not enter),)


_exchange.defvjp(lambda x, way, enter: (_exchange(x, way, enter), ()), _exchange_back)


def _order(x: jax.Array, axes: tuple[str, ...]) -> Any:
    n = jax.lax.axis_size(axes)
    return zigzag_order(n * x.shape[1], n)


def _parts(spec: PartitionSpec | None, dim: int) -> int:
    """Devices of the automatic axes that divide a dim."""
    layout = context.current()
    entry = None if spec is None or len(spec) <= dim else spec[dim]
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(layout.mesh.shape[a] for a in names)  # type: ignore[union-attr]


def _device() -> Any:
    """A device of the kind that the trace under way is for."""
    layout = context.current()
    return jax.devices()[0] if layout is None or layout.mesh is None else device_of(layout.mesh)
