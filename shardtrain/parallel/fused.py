"""Attention in one kernel, whose scores never reach memory: cuDNN's on NVIDIA GPUs, JAX's splash attention on TPUs.

On each device's own rows and heads: nothing is left to the partitioner. Programs that are read and not run have an opaque
call in its place, which says its FLOPs (`on_paper`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from shardtrain.mesh import chip_of
from shardtrain.parallel.fsdp import alike
from shardtrain.parallel.region import free_axes, on_parts
from shardtrain.sharding import context
from shardtrain.sharding.constrain import spec_of

PRODUCTS = {
    "cudnn": (2, 5),
    "splash": (2, 7),
}  # over all scores, forward and backward: splash makes them twice
LANES, BLOCK = 128, 512  # of a TPU; queries and keys at a time
CAUSAL, FULL = "causal_attention", "full_attention"  # scopes: a compiled kernel does not say which it is

_on_paper: contextvars.ContextVar[bool] = contextvars.ContextVar("on_paper", default=False)


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """What is traced inside is read, and not compiled."""
    token = _on_paper.set(True)
    try:
        yield
    finally:
        _on_paper.reset(token)


def kernel_for(device: Any, q: jax.Array, k: jax.Array, segments: Any = None) -> str | None:
    """`cudnn`, `splash`, or None: which kernel takes `q` [batch, seq, heads, head_dim] on this device.

    cudnn: NVIDIA from Ampere on, 16 bits, heads of a multiple of 8 to 128 wide, no segments. splash: TPU, bf16, sequences
    of a multiple of 128, heads of a multiple of 64.
    """
    if device.platform == "tpu":
        whole = q.shape[1] == k.shape[1] and q.shape[1] % LANES == 0 and q.shape[-1] % 64 == 0
        return "splash" if whole and q.dtype == jnp.bfloat16 else None
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD says "gfx942", others nothing
    if not capability and device.platform == "gpu":  # stands for a chip that is not here
        capability = getattr(chip_of(device), "capability", "")
    modern = capability.replace(".", "", 1).isdigit() and float(capability) >= 8
    narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = narrow and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if modern and fits and segments is None else None


def attend(
    kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, causal: bool
) -> jax.Array:
    """`attention.attend` by one of the kernels."""
    q_spec, kv_spec = (
        spec_of(x, "batch", "seq_block", h, "head_dim") for x, h in ((q, "heads"), (k, "kv_heads"))
    )
    layout = context.current()
    specs = None if q_spec is None else (q_spec, kv_spec)
    # cuDNN's kernel can be lowered for devices alone.
    absent = layout is not None and isinstance(layout.mesh, AbstractMesh) and kernel == "cudnn"
    if _on_paper.get() or absent:
        return _fused(q, k, v, segments, _Kernel(kernel, causal, on_paper=True), specs)
    if kernel == "splash":
        return _fused(q, k, v, segments, _Kernel(kernel, causal), specs)
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    return _on_parts(run, specs, "qkv", "q")(q, k, v)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Forward and backward of one device's rows and heads. `interpret`: in plain JAX, anywhere."""

    name: str
    causal: bool
    on_paper: bool = False
    interpret: bool = False

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> Any:
        """[B, T, H, D], and log-sum-exp of the scores [B, H, T]."""
        if self.on_paper:
            sums = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
            return self._call(PRODUCTS[self.name][0], (q, sums), q, k, v)
        kernel, ids = self._splash(q, segments, save_residuals=True)
        out, (sums,) = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(
            *_by_head(q, k, v), ids
        )
        return out.transpose(0, 2, 1, 3), sums

    def backward(self, q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array) -> Any:
        """Gradients of q, k and v. `more`: segments, what the forward gave, and its gradient."""
        *segments, out, sums, gradient = more
        if self.on_paper:
            return self._call(PRODUCTS[self.name][1], (q, k, v), q, k, v, out, sums, gradient)
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

        kernel, ids = self._splash(q, tuple(segments))
        given = {n: kernel.kwargs[n] for n in _GIVEN}

        def one(*arrays: Any) -> Any:
            q, k, v, out, sums, gradient, ids = arrays
            kept = (q, k, v, ids, None, out, sums, kernel.dq_mask_info, kernel.dkv_mask_info)
            # Private: what `jax.grad` of the kernel calls. Its own rule does not know the axes that its results vary over.
            return kernels._splash_attention_bwd(res=kept, do=gradient, **given)[3:6]

        heads = _by_head(q, k, v)
        turned = (out.transpose(0, 2, 1, 3), sums, gradient.transpose(0, 2, 1, 3))
        found = jax.vmap(one, in_axes=(*[0] * 6, None if ids is None else 0))(*heads, *turned, ids)
        dq, dk, dv = (x.transpose(0, 2, 1, 3) for x in found)
        return (dq.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype), dk, dv

    def _splash(self, q: jax.Array, segments: tuple[jax.Array, ...], **options: Any) -> Any:
        # Here: they take a third of a second to import, and belong to TPUs.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        length, block = q.shape[1], next(b for b in (BLOCK, 384, 256, LANES) if q.shape[1] % b == 0)
        mask: Any = (masks.CausalMask if self.causal else masks.FullMask)((length, length))
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=kernels.BlockSizes(**dict.fromkeys(_BLOCKS, block)),  # type: ignore[arg-type]
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
            **options,
        )
        return kernel, kernels.SegmentIds(*segments, *segments) if segments else None

    def _call(self, products: int, results: Any, *arrays: jax.Array) -> Any:
        """An opaque call that says its FLOPs: so many products over all scores, half of them where they are causal."""
        (batch, length, heads, width), keys = arrays[0].shape, arrays[1].shape[1]
        flops = 2 * products * batch * heads * length * keys * width // (2 if self.causal else 1)
        made = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        return tuple(jax.ffi.ffi_call(f"attention_{products}_products", made)(*arrays, flops=np.int64(flops)))


_BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "block_q_dkv",
    "block_kv_dkv",
    "block_kv_dkv_compute",
    "block_q_dq",
    "block_kv_dq",
)
_GIVEN = (  # of `_splash_attention_bwd`
    "save_residuals",
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
    "attn_logits_soft_cap",
    "interpret",
)


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    return tuple(x.transpose(0, 2, 1, 3) for x in (scaled, k, v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, kernel: _Kernel, specs: Any
) -> jax.Array:
    return _forward(q, k, v, segments, kernel, specs)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, kernel: _Kernel, specs: Any
) -> Any:
    arrays = (q, k, v) if segments is None else (q, k, v, segments)
    with jax.named_scope(CAUSAL if kernel.causal else FULL):
        found = _on_parts(kernel.forward, specs, "qkvr"[: len(arrays)], "qs")(*arrays)
    out, sums = alike(*found, *arrays)[:2]
    return out, (arrays, out, sums)


def _backward(kernel: _Kernel, specs: Any, kept: Any, gradient: jax.Array) -> Any:
    arrays, out, sums = kept
    takes = "qkvr"[: len(arrays)] + "qsq"
    with jax.named_scope(CAUSAL if kernel.causal else FULL):
        found = _on_parts(kernel.backward, specs, takes, "qkv")(*arrays, out, sums, gradient)
    return (*alike(*found, *arrays)[:3], None)


_fused.defvjp(_forward, _backward)


def _on_parts(function: Callable[..., Any], specs: Any, takes: str, gives: str) -> Callable[..., Any]:
    """On each device's own part: q, k, v; s: [batch, heads, seq], r: [batch, seq] of all heads."""
    layout = context.current()
    if specs is None or layout is None or layout.mesh is None:
        return function
    q, kv = specs
    part = lambda *dims: PartitionSpec(*(q[d] if len(q) > d else None for d in dims))  # noqa: E731
    of = {"q": q, "k": kv, "v": kv, "s": part(0, 2, 1), "r": part(0, 1)}
    ins = tuple(of[name] for name in takes)
    outs = of[gives] if len(gives) == 1 else tuple(of[name] for name in gives)
    return on_parts(function, ins, outs, free_axes(), check_vma=False)
