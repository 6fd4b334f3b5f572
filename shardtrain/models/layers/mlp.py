"""The block's second half: a plain or a gated MLP, columns divided over tensor."""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.models.layers.dense import normal, zeros
from shardtrain.parallel.stream import column, row
from shardtrain.sharding import constrain


class Mlp(nnx.Module):
    """`gelu(x up + b) down + b`, the tanh approximation as in GPT-2."""

    def __init__(
        self, embed: int, mlp: int, rngs: nnx.Rngs, *, stddev: float = 0.02, out_stddev: float = 0.02
    ):
        self.up_kernel = normal(rngs, stddev, embed=embed, mlp=mlp)
        self.up_bias = zeros(rngs, mlp=mlp)
        self.down_kernel = normal(rngs, out_stddev, mlp=mlp, embed=embed)
        self.down_bias = zeros(rngs, embed=embed)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up = column(x_BTD, self.up_kernel[...], "btd,df->btf", "embed", "mlp")
        up = constrain(up + self.up_bias[...], "batch", "seq_block", "mlp")
        up = jax.nn.gelu(checkpoint_name(up, "mlp_up"))
        return row(up, self.down_kernel[...], "btf,fd->btd", "mlp", "embed") + self.down_bias[...]


class GatedMlp(nnx.Module):
    """SwiGLU: `(silu(x gate) * (x up)) down`. Source: Shazeer (arXiv 2002.05202).

    Gate and up are a dim of their own in one kernel, so that tensor parallelism splits both alike.
    """

    def __init__(
        self, embed: int, mlp: int, rngs: nnx.Rngs, *, stddev: float = 0.02, out_stddev: float = 0.02
    ):
        self.gate_up_kernel = normal(rngs, stddev, embed=embed, _two=2, mlp=mlp)
        self.down_kernel = normal(rngs, out_stddev, mlp=mlp, embed=embed)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        both = column(x_BTD, self.gate_up_kernel[...], "btd,dcf->btcf", "embed", None, "mlp")
        both = checkpoint_name(constrain(both, "batch", "seq_block", None, "mlp"), "mlp_up")
        hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
        return row(hidden, self.down_kernel[...], "btf,fd->btd", "mlp", "embed")
