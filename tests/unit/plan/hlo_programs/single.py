"""Collectives one by one, and in loops."""

from __future__ import annotations

import jax.numpy as jnp
from hand import A2A, AG, AR, CP, E8, F8, M24, M222, P8, RS, B, H, Row, S, X, define, ring, scan
from jax import lax

# --- all-reduce: 2(n-1)/n of the payload; the payload is the shard ---------------------------------------------------

define("psum", M24, [S], lambda x: lax.psum(x, "tensor"), Row(AR, "tensor", "f32", 1, X, 2 * X * 3 // 4))

define(
    "psum_first_axis", M24, [S], lambda x: lax.psum(x, "data"), Row(AR, "data", "f32", 1, X, 2 * X * 1 // 2)
)

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
