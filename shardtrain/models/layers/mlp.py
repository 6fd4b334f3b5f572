"""The block's second half: a plain or a gated MLP, columns divided over tensor."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.models.layers.dense import normal, zeros
from shardtrain.parallel.remat import REDUCED
from shardtrain.sharding import constrain
from shardtrain.sharding.constrain import enter_block, leave_block


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
        x_BTD = enter_block(x_BTD)
        up = constrain(x_BTD @ self.up_kernel[...] + self.up_bias[...], "batch", "seq_block", "mlp")
        up = jax.nn.gelu(checkpoint_name(up, "mlp_up"))
        y = leave_block(up @ self.down_kernel[...])
        return checkpoint_name(y, REDUCED) + self.down_bias[...]


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
        x_BTD = enter_block(x_BTD)
        both = jnp.einsum("btd,dcf->btcf", x_BTD, self.gate_up_kernel[...])
        both = checkpoint_name(constrain(both, "batch", "seq_block", None, "mlp"), "mlp_up")
        hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
        y = leave_block(hidden @ self.down_kernel[...])
        return checkpoint_name(y, REDUCED)
