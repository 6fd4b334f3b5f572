"""The block's second half as a mixture of experts: a router, gated MLPs of which each token takes a few, shared ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.models.layers.dense import normal
from shardtrain.models.layers.mlp import GatedMlp
from shardtrain.parallel.expert import expert_mlp
from shardtrain.parallel.fsdp import alike
from shardtrain.parallel.precision import wide, widen
from shardtrain.parallel.remat import REDUCED
from shardtrain.parallel.routing import balance_loss, load, route, router_z_loss, scores_of
from shardtrain.sharding import constrain


class RouterBias(nnx.Variable):
    """[E], added to the scores for the selection. Not trained by gradients, see `balanced_bias`."""


class RouterLoad(nnx.Variable):
    """[E], how often a group chose each expert in the last step, the mean over groups."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What one layer tells of one group, float32. `load`: [E], choices of each expert; `dropped`: of them, over capacity.
    `chosen`: int32 [B, T, k], the experts of each token."""

    balance: jax.Array
    router_z: jax.Array
    load: jax.Array
    dropped: jax.Array
    chosen: jax.Array | None

    @staticmethod
    def of_none(layers: int, experts: int, like: jax.Array) -> Routed:
        """Of a stack before its first layer: zeros, with a leading dim of layers and without the choices."""
        zeros = lambda *shape: alike(jnp.zeros((layers, *shape), wide(like)), like)[0]  # noqa: E731
        return Routed(zeros(), zeros(), zeros(experts), zeros(), None)

    def with_choices(self, shape: tuple[int, ...], like: jax.Array) -> Routed:
        """With room for the choices [B, T, k] of each layer, which have no gradient: for a forward alone."""
        room = alike(jnp.zeros((self.balance.size, *shape), jnp.int32), like)[0]
        return dataclasses.replace(self, chosen=room)

    def after(self, before: Routed) -> Routed:
        """What the layers before told, and this one at the end: after all layers it stands in their order."""
        mine = self if before.chosen is not None else dataclasses.replace(self, chosen=None)
        return jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), before, mine)


class ExpertMlp(nnx.Module):
    """`scale * sum of weight_e * mlp_e(x)` over the chosen experts, plus `shared(x)`.

    Router logits, scores and weights are float32.

    Args:
        embed, mlp: sizes of one expert; `shared`: columns of the MLP that every token takes, 0 for none.
        experts, chosen: how many there are, how many a token takes.
        score, renormalise: see `parallel.routing.route`. scale: of the routed part.
        capacity: factor, see `parallel.routing.capacity`; 0: no choice is dropped.
        biased: the selection is balanced by a bias.
    """

    def __init__(
        self,
        embed: int,
        mlp: int,
        rngs: nnx.Rngs,
        *,
        experts: int,
        chosen: int,
        shared: int,
        score: str,
        renormalise: bool,
        scale: float,
        capacity: float,
        biased: bool,
        out_stddev: float,
    ):
        self.experts, self.chosen, self.score, self.renormalise = experts, chosen, score, renormalise
        self.scale, self.capacity = scale, capacity
        self.router_kernel = normal(rngs, 0.02, embed=embed, _experts=experts)
        self.gate_up_kernel = normal(rngs, 0.02, expert=experts, embed=embed, _two=2, mlp=mlp)
        self.down_kernel = normal(rngs, out_stddev, expert=experts, mlp=mlp, embed=embed)
        self.shared = GatedMlp(embed, shared, rngs, out_stddev=out_stddev) if shared else None
        # The same in every group, and the mean of whole numbers: exact in any order of adding up.
        self.bias = RouterBias(jnp.zeros(experts), merge="last") if biased else None
        self.load = RouterLoad(jnp.zeros(experts), merge="mean") if biased else None

    def __call__(self, x_BTD: jax.Array, *, drop: bool = True) -> tuple[jax.Array, Routed]:
        """`drop`: whether the capacity counts."""
        logits = jnp.einsum(
            "btd,de->bte",
            widen(x_BTD),
            widen(self.router_kernel[...]),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits = constrain(logits, "batch", "seq_block", None).reshape(-1, self.experts)
        bias = None if self.bias is None else self.bias[...]
        chosen, weights = route(
            logits, self.chosen, score=self.score, bias=bias, renormalise=self.renormalise
        )
        y, dropped = expert_mlp(
            x_BTD,
            chosen,
            weights * self.scale,
            self.gate_up_kernel[...],
            self.down_kernel[...],
            experts=self.experts,
            factor=self.capacity if drop else 0.0,
        )
        y = checkpoint_name(y, REDUCED)
        told = Routed(
            balance_loss(scores_of(logits, self.score), chosen),
            router_z_loss(logits),
            load(chosen, self.experts).astype(logits.dtype),
            dropped.astype(logits.dtype),
            chosen.reshape(*x_BTD.shape[:2], self.chosen),
        )
        return (y if self.shared is None else y + self.shared(x_BTD)), told


def balanced_bias(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """The bias after a step of this load: up by `rate` where an expert had less than the mean, down where it had more.

    Args:
        bias, load: [..., E].

    Source: Wang et al. (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
