"""Programs whose texts hold what reads easily wrong: kernels of one's own, products in pieces, parts of an axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from hand import AG, AR, CP, F8, M24, RS, Row, S, X, define
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec


def kernel(x: jax.Array) -> jax.Array:
    """Twice x, by a kernel whose metadata are printed over several lines; summed over tensor."""

    def double(source: jax.Array, target: jax.Array) -> None:
        target[...] = source[...] * 2

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return lax.psum(
        pl.pallas_call(double, out_shape=like, metadata={"block": "256", "heads": "8"})(jnp.tanh(x)), "tensor"
    )


define("pallas", M24, [S], kernel, Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4), targets=("tpu",))

# [2048, 1024] divided by rows, times [1024, 4096] divided by columns: each device passes its rows on, and multiplies
# what it has meanwhile. The loop passes them on after the last product too, back to where they came from: 8 times.
ROWS = 2048 // 8 * 1024 * 4
P = PartitionSpec
define(
    "windowed_product",
    F8, [(2048, 1024), (1024, 4096)], lambda x, w: jnp.tanh(x) @ w,
    Row(CP, "fsdp", "f32", 8, ROWS, 8 * ROWS),
    auto=(P("fsdp"), P(None, "fsdp"), P(None, "fsdp")), flops=2 * 2048 * 1024 * 4096 // 8,
    options={"xla_gpu_threshold_for_windowed_einsum_mib": "0"}, targets=("gpu",),
)  # fmt: skip

# Rows in two halves over eight devices, each half summed over the four that hold it, [1, 16384]; then both everywhere.
HALF = 16384 * 4
define(
    "part_of_an_axis",
    F8, [(64, 16384)], lambda x: jnp.tanh(x).reshape(2, 32, 16384).sum(1),
    Row(AR, "fsdp", "f32", 1, HALF, 2 * HALF * 3 // 4),
    Row(AG, "fsdp", "f32", 1, 2 * HALF, 2 * HALF * 1 // 2),
    auto=(P("fsdp"), P()), partial=True,
)  # fmt: skip


def oblong(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[8, 40, 24, 16] with a 3 x 5 kernel to 32 features: [8, 40, 20, 32], rows padded by one, columns not."""
    x = jnp.tanh(lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)]))
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


IMAGES = 8 * 40 * 24 * 16 * 4
define(
    "convolution_oblong",
    F8, [(8, 40, 24, 16), (3, 5, 16, 32)], oblong,
    Row(CP, "fsdp", "f32", 1, IMAGES, IMAGES),
    flops=2 * (8 * 20 * 32) * (5 * 16) * (3 * 40 - 2),  # padding is not multiplied
)  # fmt: skip


def contracted(x: jax.Array, w: jax.Array) -> jax.Array:
    """[256, 1024] @ [1024, 512], divided along what is summed, wanted divided by rows: a sum of which a part is kept."""
    return jnp.tanh(jnp.tanh(x) @ w)


SUM = 256 * 512 * 4
define(
    "partitioner_scatters",  # the TPU writes a fusion of an all-reduce and a slice; the CPU makes an all-reduce of it
    F8, [(256, 1024), (1024, 512)], contracted,
    Row(RS, "fsdp", "f32", 1, SUM, SUM * 7 // 8),
    auto=(P(None, "fsdp"), P("fsdp"), P("fsdp")), flops=2 * 256 * 1024 * 512 // 8,
    other={"cpu": (Row(AR, "fsdp", "f32", 1, SUM, 2 * SUM * 7 // 8),)},
)  # fmt: skip
