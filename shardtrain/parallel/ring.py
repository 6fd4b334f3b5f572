"""Attention over a sequence that mesh axes divide, in zig-zag (see `sequence.py`): by a ring, or by a gather.

Each device holds two pieces of the queries and of the keys and values, one early and one late. Under a causal mask its
own pieces need three products; those of another device need two, whichever it is: the late queries see its early keys
in full, and then the early queries (of a later device) or the late ones (of an earlier) see the keys of their own kind.
So no device computes what is masked away, and all have the same work.

The softmax is kept as a running maximum and sum; the backward makes the scores again from the stored logsumexp.
Source: Liu et al. (arXiv 2310.01889); Dao et al., FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.parallel.fsdp import alike, reduce_scatter
from shardtrain.parallel.precision import wide as wide_of
from shardtrain.parallel.region import free_axes, on_parts
from shardtrain.parallel.remat import REDUCED, opaque
from shardtrain.sharding import context
from shardtrain.sharding.constrain import spec_of

CHUNK, FEW = 512, 128  # queries whose scores with one piece of keys exist at a time; so few are not cut
LEAST = -1e30  # a masked score; finite, so that differences of two are not NaN

Pieces = tuple[jax.Array, jax.Array, jax.Array | None]
"""Keys and values [2, batch, kv_heads, piece, head_dim], segments [2, batch, piece] of one device."""


@dataclasses.dataclass(frozen=True)
class _Way:
    """How: `axes` divide the sequence among `n` devices; axes that are automatic outside divide heads."""

    causal: bool
    gathered: bool
    axes: tuple[str, ...]
    n: int
    heads: PartitionSpec
    kv: PartitionSpec

    @property
    def logs(self) -> PartitionSpec:
        """Of the logsumexp [2, batch, kv_heads, group, piece]."""
        heads = self.kv[2] if len(self.kv) > 2 else None
        return PartitionSpec(None, None, heads)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, causal: bool, gathered: bool
) -> jax.Array:
    """See `parallel.attention.attention`; this device's part of queries, keys and values.

    Communicates: over the sequence's axes, f*K forward, and backward f*K again and f*K for the gradients, for K bytes of
    all keys and values of these rows. A ring holds two devices' keys at a time, a gather those of all.
    """
    layout = context.current()
    assert layout is not None and layout.mesh is not None
    heads = spec_of(q, "batch", "seq_block", "heads", "head_dim")
    kv = spec_of(k, "batch", "seq_block", "kv_heads", "head_dim")
    assert heads is not None and kv is not None
    n = jax.lax.axis_size(layout.sequence)
    return _attend(q, k, v, segments, _Way(causal, gathered, layout.sequence, n, heads, kv))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, way: _Way) -> jax.Array:
    return _run(q, k, v, segments, way)[0]


def _run(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, way: _Way
) -> tuple[jax.Array, jax.Array]:
    """Output and logsumexp."""
    ins, outs = (way.heads, way.kv, way.kv, PartitionSpec()), (way.heads, way.logs)
    # Opaque, or a remat policy would save scores.
    return opaque(on_parts(functools.partial(_local_forward, way=way), ins, outs, free_axes()))(
        q, k, v, segments
    )


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, way: _Way
) -> tuple[jax.Array, Any]:
    # Saved under every remat policy: to make them again would be to run the ring again.
    out, logs = checkpoint_name(_run(q, k, v, segments, way), REDUCED)
    return out, (q, k, v, segments, out, logs)


def _backward(way: _Way, residuals: Any, gradient: jax.Array) -> Any:
    q, k, v, segments, out, logs = residuals
    run = on_parts(
        functools.partial(_local_backward, way=way),
        (way.heads, way.kv, way.kv, PartitionSpec(), way.heads, way.logs, way.heads),
        (way.heads, way.kv, way.kv),
        free_axes(),
    )
    return *run(q, k, v, segments, out, logs, gradient), None


_attend.defvjp(_forward, _backward)


# --- on one device ------------------------------------------------------------------------------


def _local_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, way: _Way
) -> tuple[jax.Array, jax.Array]:
    q, k, v = alike(q, k, v)
    q2, keys = _queries(q, k.shape[2]), (_pieces(k), _pieces(v), _segments(segments))
    wide = wide_of(q)
    like = (q2[..., 0].astype(wide) * 0 + LEAST, q2[..., 0].astype(wide) * 0, q2.astype(wide) * 0)

    def meet(total: Any, other: Pieces, pairs: Any) -> Any:
        for a, b, diagonal in pairs:
            mask = _masks(keys[2], other[2], a, b, q2.shape[4], diagonal)
            new = _scores(q2[a], other[0][b], other[1][b], mask, tuple(x[a] for x in total))
            total = tuple(x.at[a].set(y) for x, y in zip(total, new, strict=True))
        return total

    top, total, out = _around(keys, like, meet, way)
    out = _unpiece(out / total[..., None]).reshape(q.shape).astype(q.dtype)
    return out, top + jnp.log(total)


def _local_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    logs: jax.Array,
    gradient: jax.Array,
    way: _Way,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, out, logs, gradient = alike(q, k, v, out, logs, gradient)
    q2, keys = _queries(q, k.shape[2]), (_pieces(k), _pieces(v), _segments(segments))
    d2, wide = _queries(gradient, k.shape[2]), wide_of(q)
    delta = jnp.sum(d2.astype(wide) * _queries(out, k.shape[2]).astype(wide), -1)

    def meet(dq: jax.Array, other: Pieces, pairs: Any) -> tuple[jax.Array, Any]:
        dkv = (other[0].astype(wide) * 0, other[1].astype(wide) * 0)
        for a, b, diagonal in pairs:
            mask = _masks(keys[2], other[2], a, b, q2.shape[4], diagonal)
            more, dk, dv = _gradients(q2[a], other[0][b], other[1][b], mask, logs[a], delta[a], d2[a])
            dq, dkv = dq.at[a].add(more), (dkv[0].at[b].add(dk), dkv[1].at[b].add(dv))
        return dq, dkv

    start = q2.astype(wide) * 0
    dq, (dk, dv) = (_gather_back if way.gathered else _ring_back)(keys, start, meet, way)
    return (
        _unpiece(dq).reshape(q.shape).astype(q.dtype),
        _unpiece(dk[:, :, :, None]).reshape(k.shape).astype(k.dtype),
        _unpiece(dv[:, :, :, None]).reshape(v.shape).astype(v.dtype),
    )


# --- who meets whom -----------------------------------------------------------------------------


def _pairs(way: _Way, other: jax.Array | None) -> list[tuple[Any, Any, bool]]:
    """(queries, keys, diagonal) of the pieces that see each other; `other`: index of the keys' device, None: own."""
    if not way.causal:
        return [(a, b, False) for a in (0, 1) for b in (0, 1)]
    if other is None:
        return [(0, 0, True), (1, 0, False), (1, 1, True)]
    same = jnp.where(other < jax.lax.axis_index(way.axes), 0, 1)
    return [(1, 0, False), (same, same, False)]


def _next(x: Any, way: _Way) -> Any:
    """From the device before; the first takes from the last."""
    turn = [(i, (i + 1) % way.n) for i in range(way.n)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, way.axes, turn), x)


def _around(keys: Pieces, total: Any, meet: Callable[..., Any], way: _Way) -> Any:
    """`total = meet(total, keys of a device, pairs)` over all devices, own first. n-1 transfers, each beside a product."""
    index = jax.lax.axis_index(way.axes)
    if way.gathered:
        everyone = _everyone(keys, way)

        def seen(total: Any, step: jax.Array) -> tuple[Any, None]:
            other = (index - step) % way.n
            return meet(total, jax.tree.map(lambda x: x[other], everyone), _pairs(way, other)), None

        return jax.lax.scan(seen, meet(total, keys, _pairs(way, None)), jnp.arange(1, way.n))[0]

    travelling = _next(keys, way)
    total = meet(total, keys, _pairs(way, None))

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        total, here = carry
        coming = _next(here, way)
        return (meet(total, here, _pairs(way, (index - step) % way.n)), coming), None

    (total, travelling), _ = jax.lax.scan(turn, (total, travelling), jnp.arange(1, way.n - 1))
    return meet(total, travelling, _pairs(way, (index - way.n + 1) % way.n))


def _ring_back(keys: Pieces, dq: jax.Array, meet: Callable[..., Any], way: _Way) -> Any:
    """Keys travel again, and their gradients travel along one turn behind: n-1 transfers of each, the last one home."""
    index = jax.lax.axis_index(way.axes)
    narrow = functools.partial(jax.tree.map, lambda d, k: d.astype(k.dtype))
    here = _next(keys, way)
    dq, own = meet(dq, keys, _pairs(way, None))
    dq, gradients = meet(dq, here, _pairs(way, (index - 1) % way.n))

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        dq, here, gradients = carry
        here, gradients = _next(here, way), _next(gradients, way)
        dq, more = meet(dq, here, _pairs(way, (index - step) % way.n))
        return (dq, here, narrow(jax.tree.map(jnp.add, gradients, more), gradients)), None

    carry = (dq, here, narrow(gradients, keys[:2]))
    (dq, _, gradients), _ = jax.lax.scan(turn, carry, jnp.arange(2, way.n))
    return dq, jax.tree.map(jnp.add, own, _next(gradients, way))


def _gather_back(keys: Pieces, dq: jax.Array, meet: Callable[..., Any], way: _Way) -> Any:
    """Keys are gathered again; the gradients of all devices' keys are summed where they belong by a reduce-scatter."""
    index, everyone = jax.lax.axis_index(way.axes), _everyone(keys, way)
    dq, own = meet(dq, keys, _pairs(way, None))

    def seen(dq: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        other = (index - step) % way.n
        dq, more = meet(dq, jax.tree.map(lambda x: x[other], everyone), _pairs(way, other))
        return dq, jax.tree.map(lambda d, k: d.astype(k.dtype), more, keys[:2])

    dq, others = jax.lax.scan(seen, dq, jnp.arange(1, way.n))
    order = (index - jnp.arange(way.n)) % way.n  # its own inverse: where each device's gradients are

    def home(mine: jax.Array, rest: jax.Array, like: jax.Array) -> jax.Array:
        stacked = jnp.concatenate([mine[None].astype(like.dtype), rest])[order]
        # Wide rows: of narrow ones the TPU compiler makes an all-reduce.
        rows = stacked.reshape(-1, stacked.shape[-2] * stacked.shape[-1])
        return reduce_scatter(rows, way.axes, 0).reshape(mine.shape)

    return dq, jax.tree.map(home, own, others, keys[:2])


def _everyone(keys: Pieces, way: _Way) -> Pieces:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, way.axes), keys)


# --- one piece of queries and one of keys ---------------------------------------------------------


def _scores(q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, before: Any) -> Any:
    """The running softmax `(maximum, sum, sum of values)` after these keys: [B, N, G, S], [B, N, G, S], [B, N, G, S, H]."""

    def one(xs: Any) -> Any:
        q, mask, (top, total, out) = xs
        scores = _products(q, k, mask)
        new = jnp.maximum(top, scores.max(-1))
        each = _exponentials(scores - new[..., None], mask)
        less = jnp.exp(top - new)
        values = jnp.einsum("bngst,bnth->bngsh", each.astype(v.dtype), v, preferred_element_type=out.dtype)
        return new, total * less + each.sum(-1), out * less[..., None] + values

    return _in_chunks(one, (q, mask, before), q.shape[3])


def _gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Any, logs: jax.Array, delta: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of queries, keys and values, for one pair of pieces."""
    wide, scale = logs.dtype, q.shape[-1] ** -0.5

    def one(xs: Any) -> Any:
        q, mask, logs, delta, dout = xs
        each = _exponentials(_products(q, k, mask) - logs[..., None], mask)
        dv = jnp.einsum("bngst,bngsh->bnth", each.astype(q.dtype), dout, preferred_element_type=wide)
        deach = jnp.einsum("bngsh,bnth->bngst", dout, v, preferred_element_type=wide)
        dscores = (each * (deach - delta[..., None]) * scale).astype(q.dtype)
        dq = jnp.einsum("bngst,bnth->bngsh", dscores, k, preferred_element_type=wide)
        dk = jnp.einsum("bngst,bngsh->bnth", dscores, q, preferred_element_type=wide)
        return dq, (dk, dv)

    size = _chunk(q.shape[3])
    if size == q.shape[3]:
        dq, (dk, dv) = one((q, mask, logs, delta, dout))
        return dq, dk, dv

    def add(total: Any, xs: Any) -> Any:
        dq, more = one(xs)
        return jax.tree.map(jnp.add, total, more), dq

    zeros = (k.astype(wide) * 0, v.astype(wide) * 0)
    (dk, dv), dq = jax.lax.scan(add, zeros, _cut((q, mask, logs, delta, dout), size))
    return _joined(dq), dk, dv


def _products(q: jax.Array, k: jax.Array, mask: Any) -> jax.Array:
    scores = jnp.einsum("bngsh,bnth->bngst", q, k, preferred_element_type=wide_of(q)) * q.shape[-1] ** -0.5
    return scores if mask is None else jnp.where(mask, scores, LEAST)


def _exponentials(x: jax.Array, mask: Any) -> jax.Array:
    # Masked ones are zero even where a row has nothing else.
    return jnp.exp(x) if mask is None else jnp.where(mask, jnp.exp(x), 0)


def _masks(own: Any, other: Any, a: Any, b: Any, size: int, diagonal: bool) -> Any:
    """[B or 1, 1, 1, S, T]: which keys a query sees; None for all."""
    mask = jnp.tril(jnp.ones((size, size), bool))[None, None, None] if diagonal else None
    if own is None:
        return mask
    same = own[a][:, None, None, :, None] == other[b][:, None, None, None, :]
    return same if mask is None else mask & same


# --- shapes -------------------------------------------------------------------------------------


def _queries(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, heads, H] -> [2, B, kv_heads, group, T/2, H]."""
    batch, length, heads, width = q.shape
    split = q.reshape(batch, 2, length // 2, kv_heads, heads // kv_heads, width)
    return split.transpose(1, 0, 3, 4, 2, 5)


def _pieces(k: jax.Array) -> jax.Array:
    """[B, T, kv_heads, H] -> [2, B, kv_heads, T/2, H]."""
    batch, length, heads, width = k.shape
    return k.reshape(batch, 2, length // 2, heads, width).transpose(1, 0, 3, 2, 4)


def _segments(segments: jax.Array | None) -> jax.Array | None:
    if segments is None:
        return None
    return segments.reshape(segments.shape[0], 2, -1).transpose(1, 0, 2)


def _unpiece(x: jax.Array) -> jax.Array:
    """[2, B, kv_heads, group, S, H] -> [B, 2, S, kv_heads, group, H]."""
    return x.transpose(1, 0, 4, 2, 3, 5)


def _in_chunks(one: Callable[[Any], Any], xs: Any, length: int) -> Any:
    """`one` on some of the queries at a time."""
    size = _chunk(length)
    return one(xs) if size == length else _joined(jax.lax.map(one, _cut(xs, size)))


def _chunk(length: int) -> int:
    """A loop even where two chunks would do: without one, compilers keep the scores of several products at once."""
    if length <= FEW:
        return length
    return next(d for d in range(min(CHUNK, length // 2), 0, -1) if length % d == 0)


def _cut(xs: Any, size: int) -> Any:
    """Chunks of dim 3 in front; a mask's queries are there too."""

    def cut(x: jax.Array) -> jax.Array:
        split = x.reshape(*x.shape[:3], x.shape[3] // size, size, *x.shape[4:])
        return jnp.moveaxis(split, 3, 0)

    return jax.tree.map(cut, xs)


def _joined(xs: Any) -> Any:
    def join(x: jax.Array) -> jax.Array:
        back = jnp.moveaxis(x, 0, 3)
        return back.reshape(*back.shape[:3], -1, *back.shape[5:])

    return jax.tree.map(join, xs)
