"""Small programs with their collectives and FLOPs counted by hand from the shapes of one device's shards.

Every program is a fully manual shard_map over 8 devices, so a compiler has no sharding left to choose. Every input and
output is divided along its first dimension by all mesh axes: the shapes below are those of one device. A row states
what the program asks for; `cpu`, `tpu`, ... replace the rows where that compiler legitimately asks for something else,
with the reason beside it. The two general ones:
- the CPU has no collectives of bf16: it sends f32;
- the TPU multiplies f32 at its default precision, which rounds operands to bf16: it rounds before it sends them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


class Row(NamedTuple):
    """Runs of one collective: payload bytes of one run, and bytes that one device sends in a step."""

    op: str
    axis: str
    dtype: str
    count: int
    bytes: float
    wire: float


@dataclass(frozen=True)
class Program:
    """`body` maps shards to shards; `shapes` are those of the shards; `flops` are of one device and step."""

    mesh: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]
    body: Callable[..., Any]
    rows: tuple[Row, ...]
    dtypes: tuple[Any, ...] = (jnp.float32,)
    flops: float = 0
    other: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    other_flops: dict[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ("cpu", "tpu", "gpu")

    def expected(self, target: str) -> tuple[Row, ...]:
        return self.other.get(target, self.rows)

    def lower(self, mesh: jax.sharding.Mesh) -> Any:
        """The lowered program on a mesh whose axes are those of `self.mesh`."""
        assert dict(mesh.shape) == self.mesh, (mesh.shape, self.mesh)
        spec = PartitionSpec(mesh.axis_names)
        mapped = jax.shard_map(self.body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        divided = jax.sharding.NamedSharding(mesh, spec)
        dtypes = self.dtypes * len(self.shapes) if len(self.dtypes) == 1 else self.dtypes
        given = [
            jax.ShapeDtypeStruct((mesh.size * shape[0], *shape[1:]), dtype, sharding=divided)
            for shape, dtype in zip(self.shapes, dtypes, strict=True)
        ]
        return jax.jit(mapped).lower(*given)


M24 = {"data": 2, "tensor": 4}
M222 = {"data": 2, "fsdp": 2, "tensor": 2}
E8 = {"expert": 8}
P8 = {"pipe": 8}
F8 = {"fsdp": 8}

# The shard that most programs move: [256, 128].
S = (256, 128)
X = 256 * 128 * 4  # its bytes in f32
H = 256 * 128 * 2  # in bf16
B = 256 * 128 * 1  # in int8

AR, AG, RS, A2A, CP = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"

PROGRAMS: dict[str, Program] = {}


def define(name: str, mesh: dict[str, int], shapes: Any, body: Callable[..., Any], *rows: Row, **more: Any) -> None:
    assert name not in PROGRAMS, name
    PROGRAMS[name] = Program(mesh, tuple(shapes), body, rows, **more)


def ring(axis: str, n: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


# --- all-reduce: 2(n-1)/n of the payload; the payload is the shard ---------------------------------------------------

define("psum", M24, [S], lambda x: lax.psum(x, "tensor"), Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4))

define("psum_first_axis", M24, [S], lambda x: lax.psum(x, "data"), Row(AR, "data", "f32", 1, X, 2 * X * 1 // 2))

define(
    "psum_all_axes",  # groups of 2 * 4 = 8
    M24, [S], lambda x: lax.psum(x, ("data", "tensor")),
    Row(AR, "data+tensor", "f32", 1, X, 2 * X * 7 // 8),
)  # fmt: skip

define(
    "psum_outer_axes",  # data and tensor around fsdp: groups of 2 * 2 = 4, with strides 4 and 1
    M222, [S], lambda x: lax.psum(x, ("data", "tensor")),
    Row(AR, "data+tensor", "f32", 1, X, 2 * X * 3 // 4),
)  # fmt: skip

define(
    "psum_bf16",
    M24, [S], lambda x: lax.psum(x, "tensor"),
    Row(AR, "tensor", "bf16", 1, H, 2 * H * 3 // 4),
    dtypes=(jnp.bfloat16,), other={"cpu": (Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4),)},
)  # fmt: skip

define("pmax", M222, [S], lambda x: lax.pmax(x, "fsdp"), Row(AR, "fsdp", "f32", 1, X, 2 * X * 1 // 2))

define(
    "psum_tuple",  # two arrays in one psum: [256, 128] and [512, 128], f32
    M24, [S, (512, 128)], lambda x, y: lax.psum((x, y), "tensor"),
    Row(AR, "tensor", "f32", 1, X + 2 * X, 2 * (3 * X) * 3 // 4),
)  # fmt: skip

define(
    "psum_tuple_mixed",  # [256, 128] in f32 and the same in bf16
    M24, [S, S], lambda x, y: lax.psum((x, y), "tensor"),
    Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4),
    Row(AR, "tensor", "bf16", 1, H, 2 * H * 3 // 4),
    dtypes=(jnp.float32, jnp.bfloat16),
    other={"cpu": (Row(AR, "tensor", "f32", 1, X + X, 2 * (2 * X) * 3 // 4),)},  # f32 both, so one tuple
)  # fmt: skip

define(
    "psum_two_axes_in_turn",  # a tanh between them, so that they stay two
    M222, [S], lambda x: lax.psum(jnp.tanh(lax.psum(x, "fsdp")), "tensor"),
    Row(AR, "fsdp", "f32", 1, X, 2 * X * 1 // 2),
    Row(AR, "tensor", "f32", 1, X, 2 * X * 1 // 2),
)  # fmt: skip

# --- all-gather: (n-1)/n of the result ------------------------------------------------------------------------------

define(
    "all_gather",
    M24, [S], lambda x: lax.all_gather(x, "tensor", tiled=True),
    Row(AG, "tensor", "f32", 1, 4 * X, 4 * X * 3 // 4),
)  # fmt: skip

define(
    "all_gather_int8",
    M222, [S], lambda x: lax.all_gather(x, "fsdp", axis=1, tiled=True),
    Row(AG, "fsdp", "s8", 1, 2 * B, 2 * B * 1 // 2),
    dtypes=(jnp.int8,),
)  # fmt: skip

define(
    "all_gather_two_axes",
    M222, [S], lambda x: lax.all_gather(x, ("fsdp", "tensor"), tiled=True),
    Row(AG, "fsdp+tensor", "f32", 1, 4 * X, 4 * X * 3 // 4),
)  # fmt: skip

define(
    "all_gather_bf16",
    F8, [S], lambda x: lax.all_gather(x, "fsdp", tiled=True),
    Row(AG, "fsdp", "bf16", 1, 8 * H, 8 * H * 7 // 8),
    dtypes=(jnp.bfloat16,), other={"cpu": (Row(AG, "fsdp", "f32", 1, 8 * X, 8 * X * 7 // 8),)},
)  # fmt: skip

# --- reduce-scatter: (n-1)/n of the operand -------------------------------------------------------------------------

define(
    "psum_scatter",
    M24, [S], lambda x: lax.psum_scatter(x, "tensor", tiled=True),
    Row(RS, "tensor", "f32", 1, X, X * 3 // 4),
)  # fmt: skip

define(
    "psum_scatter_bf16",
    M222, [S], lambda x: lax.psum_scatter(x, "data", tiled=True),
    Row(RS, "data", "bf16", 1, H, H * 1 // 2),
    dtypes=(jnp.bfloat16,), other={"cpu": (Row(RS, "data", "f32", 1, X, X * 1 // 2),)},
)  # fmt: skip

# --- all-to-all: (n-1)/n of the operand -----------------------------------------------------------------------------

define(
    "all_to_all",
    E8, [S], lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True),
    Row(A2A, "expert", "f32", 1, X, X * 7 // 8),
)  # fmt: skip

define(
    "all_to_all_bf16_inner",  # splits rows, joins columns
    M24, [S], lambda x: lax.all_to_all(x, "tensor", 0, 1, tiled=True),
    Row(A2A, "tensor", "bf16", 1, H, H * 3 // 4),
    dtypes=(jnp.bfloat16,), other={"cpu": (Row(A2A, "tensor", "f32", 1, X, X * 3 // 4),)},
)  # fmt: skip

# --- permutes: the shard of each device that sends to another one ----------------------------------------------------

define("permute_ring", P8, [S], ring("pipe", 8), Row(CP, "pipe", "f32", 1, X, X))

define(
    "permute_shift",  # no wrap-around: 3 of 4 send
    M24, [S], lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 3)]),
    Row(CP, "tensor", "f32", 1, X, X * 3 // 4),
)  # fmt: skip

define(
    "permute_one",  # 1 of 4 sends, and one keeps its own
    M24, [S], lambda x: lax.ppermute(x, "tensor", [(0, 0), (1, 2)]),
    Row(CP, "tensor", "bf16", 1, H, H * 1 // 4),
    dtypes=(jnp.bfloat16,), other={"cpu": (Row(CP, "tensor", "f32", 1, X, X * 1 // 4),)},
)  # fmt: skip

# --- loops ----------------------------------------------------------------------------------------------------------


def scan(times: int, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=times)[0]


define(
    "scan_psum",
    M24, [S], scan(5, lambda c: lax.psum(jnp.tanh(c), "tensor")),
    Row(AR, "tensor", "f32", 5, X, 5 * (2 * X * 3 // 4)),
)  # fmt: skip

define(
    "nested_scan",  # 3 x 4 rings inside, 3 sums outside
    M24, [S], scan(3, lambda c: lax.psum(scan(4, lambda d: ring("tensor", 4)(jnp.tanh(d)))(c), "data")),
    Row(CP, "tensor", "f32", 3 * 4, X, 3 * 4 * X),
    Row(AR, "data", "f32", 3, X, 3 * (2 * X * 1 // 2)),
)  # fmt: skip

define(
    "nested_scan_thrice",  # 2 x 3 x 5
    M222, [S], scan(2, scan(3, scan(5, lambda c: lax.all_to_all(jnp.tanh(c), "tensor", 0, 0, tiled=True)))),
    Row(A2A, "tensor", "f32", 2 * 3 * 5, X, 2 * 3 * 5 * (X * 1 // 2)),
)  # fmt: skip

define(
    "fori_loop",  # from 2 to below 9
    M222, [S], lambda x: lax.fori_loop(2, 9, lambda i, c: lax.psum(jnp.tanh(c) * i, "fsdp"), x),
    Row(AR, "fsdp", "f32", 7, X, 7 * (2 * X * 1 // 2)),
)  # fmt: skip

define(
    "while_step_two",  # 1, 3, 5, 7, 9: five runs below 11
    M24, [S],
    lambda x: lax.while_loop(
        lambda c: c[0] < 11, lambda c: (c[0] + 2, lax.psum(jnp.tanh(c[1]), "data")), (jnp.int32(1), x)
    )[1],
    Row(AR, "data", "f32", 5, X, 5 * (2 * X * 1 // 2)),
)  # fmt: skip

define(
    "while_downwards",  # 9, 6, 3: three runs above 0
    M24, [S],
    lambda x: lax.while_loop(
        lambda c: c[0] > 0, lambda c: (c[0] - 3, lax.psum(jnp.tanh(c[1]), "tensor")), (jnp.int32(9), x)
    )[1],
    Row(AR, "tensor", "f32", 3, X, 3 * (2 * X * 3 // 4)),
)  # fmt: skip

# Both branches hold one collective of the same size, one along data (n = 2), one along tensor (n = 4). One of them runs,
# and which is not known before: each is counted as if it ran.
define(
    "cond_both",
    M24, [S],
    lambda x: lax.cond(
        lax.psum(x[0, 0], ("data", "tensor")) > 0,
        lambda c: lax.psum(jnp.tanh(c), "data"), lambda c: lax.psum(jnp.cos(c), "tensor"), x,
    ),
    Row(AR, "data+tensor", "f32", 1, 4, 2 * 4 * 7 / 8),
    Row(AR, "data", "f32", 1, X, 2 * X * 1 // 2),
    Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4),
)  # fmt: skip

# --- with products ---------------------------------------------------------------------------------------------------
# Weights w: [256, 1024] a shard. 256 * 1024 * 4 bytes = 1 MiB in f32.
W = 256 * 1024 * 4


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


# Two gathers a layer forward and two backward, or kept from forward to backward: the weights are not the carry, so
# the gathered ones are kept, 2 a layer. Products: two forward, four backward.
define(
    "gathered_layers",
    F8, [(6, 2, 128, 1024), (512, 1024)], jax.grad(layers),
    Row(AG, "fsdp", "bf16", 2 * 6, 1024 * 1024 * 2, 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    Row(RS, "fsdp", "bf16", 2 * 6, 1024 * 1024 * 2, 2 * 6 * (1024 * 1024 * 2 * 7 // 8)),
    dtypes=(jnp.bfloat16,), flops=6 * (2 + 4) * (2 * 512 * 1024 * 1024),
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
