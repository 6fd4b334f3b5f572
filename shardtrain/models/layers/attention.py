"""Causal self-attention, with grouped keys and values, rotary positions and a cache for generation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.mesh import chip_of, device_of
from shardtrain.models.layers.dense import normal, zeros
from shardtrain.models.layers.rotary import rotate
from shardtrain.parallel.remat import REDUCED
from shardtrain.sharding import constrain, context
from shardtrain.sharding.constrain import enter_block, leave_block, spec_of

CHUNK = 1024  # queries at a time where no fused kernel keeps the scores out of memory

Cache = dict[str, jax.Array]
"""`k`, `v`: [batch, length, kv_heads, head_dim] of one layer."""


class SelfAttention(nnx.Module):
    """Causal self-attention. One kernel makes a group's queries, its key and its value side by side:

        [embed, kv_heads, queries per group + 2, head_dim]

    Tensor parallelism divides `kv_heads`, so groups stay whole, nothing is exchanged to take q, k and v
    apart, and the gradient of the input is reduced once, not once for q and once for k and v.

    Args:
        embed, heads, kv_heads, head_dim: sizes; `kv_heads` divides `heads` (equal: plain multi-head).
        bias: whether projections have biases.
        theta: base of the rotary positions, or None for none.
        out_stddev: of the output projection's initial values.

    Source of grouped queries: Ainslie et al. (arXiv 2305.13245).
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        *,
        bias: bool,
        theta: float | None,
        stddev: float = 0.02,
        out_stddev: float = 0.02,
    ):
        self.theta = theta
        self.kv_shape = (kv_heads, head_dim)
        groups = dict(kv_heads=kv_heads, _group=heads // kv_heads + 2, head_dim=head_dim)
        self.qkv_kernel = normal(rngs, stddev, embed=embed, **groups)
        self.qkv_bias = zeros(rngs, **groups) if bias else None
        self.out_kernel = normal(rngs, out_stddev, heads=heads, head_dim=head_dim, embed=embed)
        self.out_bias = zeros(rngs, embed=embed) if bias else None

    def __call__(
        self, x_BTD: jax.Array, *, cache: Cache | None = None, position: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        q, k, v = self._project(enter_block(x_BTD))
        if self.theta is not None:
            positions = position + jnp.arange(x_BTD.shape[1])
            q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        if cache is None:
            mixed = causal_attention(q, k, v)
        else:
            start = (0, position, 0, 0)
            cache = {
                "k": jax.lax.dynamic_update_slice(cache["k"], k.astype(cache["k"].dtype), start),
                "v": jax.lax.dynamic_update_slice(cache["v"], v.astype(cache["v"].dtype), start),
            }
            # The prompt sees only itself: what the cache holds beyond it is empty.
            start_of_text = isinstance(position, int) and position == 0
            mixed = causal_attention(q, k, v) if start_of_text else _attend_cache(q, cache, position)
        mixed = constrain(mixed, "batch", "seq_block", "heads", "head_dim")
        y = jnp.einsum("bthk,hkd->btd", mixed, self.out_kernel[...])
        y = checkpoint_name(leave_block(y), REDUCED)
        return (y if self.out_bias is None else y + self.out_bias[...]), cache

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, heads, head_dim]; k, v [B, T, kv_heads, head_dim]."""
        qkv = jnp.einsum("btd,dngh->btngh", x_BTD, self.qkv_kernel[...])
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        qkv = checkpoint_name(constrain(qkv, "batch", "seq_block", "kv_heads", None, "head_dim"), "qkv")
        q = qkv[:, :, :, :-2].reshape(*x_BTD.shape[:2], -1, qkv.shape[-1])
        return constrain(q, "batch", "seq_block", "heads", "head_dim"), qkv[:, :, :, -2], qkv[:, :, :, -1]

    def empty_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        """Zeros for `length` positions."""
        return {name: jnp.zeros((batch, length, *self.kv_shape), dtype) for name in ("k", "v")}


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v with a causal mask; scores and softmax in float32.

    Args:
        q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim].
        chunk: queries at a time where no fused kernel is at hand; bounds the scores in memory.

    On NVIDIA GPUs with 16-bit values this is cuDNN's flash attention.
    """
    length = q.shape[1]
    if has_flash(_device(), q):
        return _flash(q, k, v)
    if length <= chunk:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    # Scores exist for one chunk of queries at a time, in the backward too, where they are made again.
    @jax.checkpoint
    def one(start: jax.Array, q_chunk: jax.Array) -> jax.Array:
        mask = (start + jnp.arange(chunk))[:, None] >= jnp.arange(length)[None]
        return jax.nn.dot_product_attention(q_chunk, k, v, mask=mask[None, None])

    chunks = -(-length // chunk)
    padded = jnp.pad(q, [(0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)])
    q_chunks = jnp.moveaxis(padded.reshape(q.shape[0], chunks, chunk, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda xs: one(*xs), (jnp.arange(chunks) * chunk, q_chunks))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention, on each device's own rows and heads: nothing is left to the partitioner."""
    kernel = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    q_spec, kv_spec = (
        spec_of(x, "batch", "seq_block", h, "head_dim") for x, h in ((q, "heads"), (k, "kv_heads"))
    )
    layout = context.current()
    if q_spec is None or layout is None or layout.mesh is None:
        return kernel(q, k, v)
    free = {a for a in layout.mesh.shape if a not in layout.manual}
    return jax.shard_map(
        kernel,
        mesh=None if layout.manual else layout.mesh,
        in_specs=(q_spec, kv_spec, kv_spec),
        out_specs=q_spec,
        axis_names=free,
        check_vma=False,
    )(q, k, v)


def has_flash(device: Any, q: jax.Array) -> bool:
    """Whether cuDNN's attention takes `q` on this device: NVIDIA from Ampere on, 16 bits, heads to 128 wide."""
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD says "gfx942", others nothing
    if not capability and device.platform == "gpu":  # stands for a chip that is not here
        capability = getattr(chip_of(device), "capability", "")
    modern = capability.replace(".", "", 1).isdigit() and float(capability) >= 8
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    return modern and narrow and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _device() -> Any:
    """A device of the kind that the trace under way is for."""
    layout = context.current()
    return jax.devices()[0] if layout is None or layout.mesh is None else device_of(layout.mesh)


def _attend_cache(q: jax.Array, cache: Cache, position: jax.Array | int) -> jax.Array:
    length = cache["k"].shape[1]
    mask = (position + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(length)[None]
    k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
