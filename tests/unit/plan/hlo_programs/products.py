"""Programs with products, on one slice and on two, and on chips whose SparseCore runs collectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from hand import AG, AR, CP, F8, M24, M222, P8, RS, Row, S, X, define, ring, scan
from jax import lax

# --- with products ---------------------------------------------------------------------------------------------------


def megatron(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """[512, 256] @ [256, 1024], then @ [1024, 256], summed over tensor."""
    return lax.psum(jnp.tanh(x @ up) @ down, "tensor")


define(
    "tensor_mlp",
    M24, [(512, 256), (256, 1024), (1024, 256)], megatron,
    Row(AR, "tensor", "f32", 1, 512 * 256 * 4, 2 * (512 * 256 * 4) * 3 // 4),
    flops=2 * 512 * 256 * 1024 + 2 * 512 * 1024 * 256,
)  # fmt: skip


def gathered_loss(w: jax.Array, x: jax.Array) -> jax.Array:
    """Rows of w [64, 512] gathered to [512, 512] along fsdp = 8."""
    return jnp.sum(jnp.sin(x @ lax.all_gather(w, "fsdp", tiled=True)))


define(
    "gradient_of_gather",  # forward x @ w; backward the gradient of w only: [512, 256]' @ [256, 512]
    F8, [(64, 512), (256, 512)], jax.grad(gathered_loss),
    Row(AG, "fsdp", "f32", 1, 512 * 512 * 4, 512 * 512 * 4 * 7 // 8),
    Row(RS, "fsdp", "f32", 1, 512 * 512 * 4, 512 * 512 * 4 * 7 // 8),
    flops=2 * 256 * 512 * 512 + 2 * 512 * 256 * 512,
    other={
        "tpu": (
            Row(AG, "fsdp", "bf16", 1, 512 * 512 * 2, 512 * 512 * 2 * 7 // 8),
            Row(RS, "fsdp", "f32", 1, 512 * 512 * 4, 512 * 512 * 4 * 7 // 8),
        )
    },
)  # fmt: skip


def rematerialized(w: jax.Array, x: jax.Array) -> jax.Array:
    """Four layers of weights [4, 64, 512] (dimension 1 divided by fsdp), gathered once forward and again backward."""

    @jax.checkpoint
    def layer(h: jax.Array, shard: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(h @ lax.all_gather(shard, "fsdp", tiled=True)), None

    return jnp.sum(jnp.sin(lax.scan(layer, x, w)[0]))


# A layer's products: forward, forward again (the gradient of sin needs its argument), gradient of h, gradient of w.
# The first layer's gradient of h is computed too: the loop does not know that nobody wants it.
define(
    "checkpointed_scan",
    F8, [(4, 64, 512), (256, 512)], jax.grad(rematerialized),
    Row(AG, "fsdp", "f32", 4 + 4, 512 * 512 * 4, 8 * (512 * 512 * 4 * 7 // 8)),
    Row(RS, "fsdp", "f32", 4, 512 * 512 * 4, 4 * (512 * 512 * 4 * 7 // 8)),
    flops=4 * 4 * (2 * 256 * 512 * 512),
    other={
        "tpu": (
            Row(AG, "fsdp", "bf16", 4 + 4, 512 * 512 * 2, 8 * (512 * 512 * 2 * 7 // 8)),
            Row(RS, "fsdp", "f32", 4, 512 * 512 * 4, 4 * (512 * 512 * 4 * 7 // 8)),
        )
    },
)  # fmt: skip


def batched(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scores [8, 128, 256] of 8 heads over width 64, keys rotated once before."""
    return jnp.einsum("htd,hsd->hts", q, ring("tensor", 4)(k))


define(
    "batched_product",
    M24, [(8, 128, 64), (8, 256, 64)], batched,
    Row(CP, "tensor", "f32", 1, 8 * 256 * 64 * 4, 8 * 256 * 64 * 4),
    flops=8 * 2 * 128 * 256 * 64,
    other={"tpu": (Row(CP, "tensor", "bf16", 1, 8 * 256 * 64 * 2, 8 * 256 * 64 * 2),)},
)  # fmt: skip


def pipeline(w: jax.Array, x: jax.Array) -> jax.Array:
    """Eight turns: a product [128, 512] @ [512, 512], then on to the next stage."""
    return scan(8, lambda h: lax.ppermute(jnp.tanh(h @ w), "pipe", [(i, i + 1) for i in range(7)]))(x)


define(
    "pipeline",
    P8, [(512, 512), (128, 512)], pipeline,
    Row(CP, "pipe", "f32", 8, 128 * 512 * 4, 8 * (128 * 512 * 4 * 7 // 8)),
    flops=8 * 2 * 128 * 512 * 512,
)  # fmt: skip


def hierarchical(x: jax.Array) -> jax.Array:
    """Scatter along tensor, sum along data, gather along tensor; tanh keeps the three apart."""
    part = jnp.tanh(lax.psum_scatter(x, "tensor", tiled=True))
    return lax.all_gather(jnp.tanh(lax.psum(part, "data")), "tensor", tiled=True)


define(
    "hierarchical",
    M24, [S], hierarchical,
    Row(RS, "tensor", "f32", 1, X, X * 3 // 4),
    Row(AR, "data", "f32", 1, X // 4, 2 * (X // 4) * 1 // 2),
    Row(AG, "tensor", "f32", 1, X, X * 3 // 4),
)  # fmt: skip


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[4, 32, 32, 16] with a 3 x 3 kernel to 32 features, without padding: [4, 30, 30, 32]; summed over fsdp."""
    kernel = lax.psum(kernel, "fsdp")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


# The TPU cuts the 30 columns into 8 strips of 4, two columns too many, and sums the kernel in f32 (an f32 operand and an
# f32 reduction) although it writes the sum in bf16.
define(
    "convolution",
    M222, [(4, 32, 32, 16), (3, 3, 16, 32)], convolved,
    Row(AR, "fsdp", "f32", 1, 3 * 3 * 16 * 32 * 4, 2 * (3 * 3 * 16 * 32 * 4) * 1 // 2),
    flops=2 * (4 * 30 * 30 * 32) * (3 * 3 * 16),
    other_flops={"tpu": 2 * (4 * 30 * 32 * 32) * (3 * 3 * 16)},
)  # fmt: skip


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    """Six layers of two weights each, [6, 2, 128, 1024] in bf16, gathered to [1024, 1024] one by one."""

    def layer(h: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        up = lax.all_gather(pair[0], "fsdp", tiled=True)
        down = lax.all_gather(pair[1], "fsdp", tiled=True)
        return jnp.tanh(jnp.tanh(h @ up) @ down), None

    return jnp.sum(jnp.tanh(lax.scan(layer, x, w)[0]).astype(jnp.float32))


# Without remat the gathered weights are kept for the backward loop: two gathers a layer. Products: two forward, four
# backward.
define(
    "gathered_layers",
    F8, [(6, 2, 128, 1024), (512, 1024)], jax.grad(layers),
    Row(AG, "fsdp", "bf16", 2 * 6, 1024 * 1024 * 2, 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    Row(RS, "fsdp", "bf16", 2 * 6, 1024 * 1024 * 2, 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    dtypes=(jnp.bfloat16,), flops=6 * (2 + 4) * (2 * 512 * 1024 * 1024),
    other={
        "cpu": (
            Row(AG, "fsdp", "f32", 2 * 6, 1024 * 1024 * 4, 2 * 6 * (1024 * 1024 * 4 * 7 // 8)),
            Row(RS, "fsdp", "f32", 2 * 6, 1024 * 1024 * 4, 2 * 6 * (1024 * 1024 * 4 * 7 // 8)),
        ),
        # The GPU's combiners send the two of a layer together: half the runs of twice the bytes.
        "gpu": (
            Row(AG, "fsdp", "bf16", 6, 2 * 1024 * 1024 * 2, 6 * (2 * 1024 * 1024 * 2 * 7 // 8)),
            Row(RS, "fsdp", "bf16", 6, 2 * 1024 * 1024 * 2, 6 * (2 * 1024 * 1024 * 2 * 7 // 8)),
        ),
    },
)  # fmt: skip


def microbatched(w: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient above, added up over three microbatches [3, 512, 1024]: loops of 6 in a loop of 3."""
    return lax.scan(lambda total, part: (total + jax.grad(layers)(w, part), None), jnp.zeros_like(w), x)[0]


define(
    "microbatched_layers",
    F8, [(6, 2, 128, 1024), (3, 512, 1024)], microbatched,
    Row(AG, "fsdp", "bf16", 3 * 2 * 6, 1024 * 1024 * 2, 3 * 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    Row(RS, "fsdp", "bf16", 3 * 2 * 6, 1024 * 1024 * 2, 3 * 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    dtypes=(jnp.bfloat16,), flops=3 * 6 * (2 + 4) * (2 * 512 * 1024 * 1024),
    other={
        "cpu": (
            Row(AG, "fsdp", "f32", 3 * 2 * 6, 1024 * 1024 * 4, 3 * 2 * 6 * (1024 * 1024 * 4 * 7 // 8)),
            Row(RS, "fsdp", "f32", 3 * 2 * 6, 1024 * 1024 * 4, 3 * 2 * 6 * (1024 * 1024 * 4 * 7 // 8)),
        ),
        "gpu": (
            Row(AG, "fsdp", "bf16", 3 * 6, 2 * 1024 * 1024 * 2, 3 * 6 * (2 * 1024 * 1024 * 2 * 7 // 8)),
            Row(RS, "fsdp", "bf16", 3 * 6, 2 * 1024 * 1024 * 2, 3 * 6 * (2 * 1024 * 1024 * 2 * 7 // 8)),
        ),
    },
)  # fmt: skip

# --- two slices, and chips whose SparseCore runs collectives -----------------------------------------------------------

define(
    "slices_psum",
    M24, [S], lambda x: lax.psum(x, "data"),
    Row(AR, "data", "f32", 1, X, 2 * X * 1 // 2),
    targets=("slices",),
)  # fmt: skip

define(
    "slices_both",
    M24, [(512, 256), (256, 1024), (1024, 256)], lambda x, up, down: lax.psum(jnp.tanh(megatron(x, up, down)), "data"),
    Row(AR, "tensor", "f32", 1, 512 * 256 * 4, 2 * (512 * 256 * 4) * 3 // 4),
    Row(AR, "data", "f32", 1, 512 * 256 * 4, 2 * (512 * 256 * 4) * 1 // 2),
    flops=2 * 512 * 256 * 1024 + 2 * 512 * 1024 * 256, targets=("slices",),
)  # fmt: skip

BIG = 2048 * 1024 * 4
define(
    "sparsecore_scan",
    M24, [(2048, 1024)], scan(5, lambda c: lax.psum(jnp.tanh(c), "tensor")),
    Row(AR, "tensor", "f32", 5, BIG, 5 * (2 * BIG * 3 // 4)),
    targets=("tpu7x",),
)  # fmt: skip


def sparsecore(w: jax.Array, x: jax.Array) -> jax.Array:
    """[1024, 2048] @ [2048, 2048], the second gathered from [256, 2048] along tensor, while x is summed along data."""
    return jnp.tanh(x @ lax.all_gather(w, "tensor", tiled=True)) + lax.psum(jnp.tanh(x), "data")


define(
    "sparsecore_overlap",
    M24, [(512, 2048), (1024, 2048)], sparsecore,
    Row(AG, "tensor", "bf16", 1, 2048 * 2048 * 2, 2048 * 2048 * 2 * 3 // 4),
    Row(AR, "data", "bf16", 1, 1024 * 2048 * 2, 2 * (1024 * 2048 * 2) * 1 // 2),
    dtypes=(jnp.bfloat16,), flops=2 * 1024 * 2048 * 2048, targets=("tpu7x",),
)  # fmt: skip


def sparsecore_layers(x: jax.Array) -> jax.Array:
    """Two sums of one shape in each of five layers: one channel, and each started and ended by itself."""
    return scan(5, lambda c: jnp.cos(lax.psum(jnp.tanh(lax.psum(jnp.sin(c), "tensor")), "tensor")))(x)


define(
    "sparsecore_twice",
    M24, [(2048, 1024)], sparsecore_layers,
    Row(AR, "tensor", "f32", 5, BIG, 5 * (2 * BIG * 3 // 4)), Row(AR, "tensor", "f32", 5, BIG, 5 * (2 * BIG * 3 // 4)),
    targets=("tpu7x",),
)  # fmt: skip
