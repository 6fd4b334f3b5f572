"""All groups of a batch shard through a pipeline: what stands in for one group after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.parallel import pipeline
from shardtrain.parallel.groups import Loss
from shardtrain.parallel.pipeline import Pipeline, Work
from shardtrain.parallel.precision import wide, widen
from shardtrain.tree import flatten


@dataclasses.dataclass(frozen=True)
class PartFunctions:
    """The loss of one group in parts, as pure functions; `params` and `frozen` as the loss sees them.

    `embed(params, state, key, rows) -> x`. `layers(params, state, key, rows, x, places) -> x`, where the stack
    holds the layers of one piece, and `places` says which these are. `head(params, state, key, rows, x) -> (Loss, new
    variables)`. `state`: frozen parameters and variables, as the model's.
    """

    embed: Callable[..., Any]
    layers: Callable[..., Any]
    head: Callable[..., tuple[Loss, Any]]


def pipelined(
    pipe: Pipeline,
    functions: PartFunctions,
    params: Any,
    frozen: Any,
    variables: Any,
    *,
    whole: Callable[[Any], Any],
    rng: Callable[[jax.Array], jax.Array],
    rows: Any,
    told: Callable[[Loss, jax.Array], Any],
    last: Callable[[str], bool],
    axes: tuple[str, ...],
    train: bool,
    masked: bool,
) -> tuple[Any, tuple[jax.Array, Any]]:
    """Gradients of all groups of this batch shard, what is told of their losses, and the variables that they leave.

    Args:
        params, frozen: this stage's, as they arrive in the manual region, held leaves gathered.
        whole: makes a tree of parameters what the loss sees. rng: microbatch -> its group's key.
        rows: leaves [microbatches, rows, ...]. told: `(loss, microbatch) -> arrays`, which are added up.
        last: whether of the variable at a path the last microbatch's counts, not the sum.
        masked: all stages run everything, see `parallel/pipeline.py`.

    Returns:
        `(gradients, (told, variables))`, float32 or wider. All are this stage's part of a sum over `stage`; gradients of a
        stack that is divided over `stage` are whole. None in place of the gradients without `train`.
    """
    shared, stack = _parted(pipe, params)
    fixed, fixed_stack = _parted(pipe, frozen)
    places = jnp.asarray(pipe.deal.places)[jax.lax.axis_index(pipeline.STAGE)]
    one = lambda tree: jax.tree.map(lambda a: a[0], tree)  # noqa: E731
    row = lambda i: jax.tree.map(lambda x: x[i], rows)  # noqa: E731

    def model(shared: Any, stack: Any, c: jax.Array | None = None) -> tuple[Any, Any]:
        """Parameters and state as the loss sees them, with the layers of one piece in place of the stack; variables have
        all layers."""
        mine = one(fixed_stack) if c is None else jax.tree.map(lambda a: a[c], fixed_stack)
        state = {"frozen": whole(_joined(frozen, fixed, mine)), "variables": variables}
        return whole(_joined(params, shared, stack)), state

    def embed(shared: Any, i: jax.Array) -> Any:
        return functions.embed(*model(shared, one(stack)), rng(i), row(i))

    def piece(own: Any, c: jax.Array, i: jax.Array, x: Any) -> Any:
        return functions.layers(*model(shared, own, c), rng(i), row(i), x, places[c])

    def head(shared: Any, i: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        loss, new = functions.head(*model(shared, one(stack)), rng(i), row(i), x)
        count = jax.tree.leaves(rows)[0].shape[0]
        kept = [
            jnp.where(i == count - 1, v, 0) if last(path) else widen(v) for path, v in flatten(new).items()
        ]
        total = jnp.asarray(loss.sum)
        return total.astype(wide(total)), (told(loss, i), jax.tree.unflatten(jax.tree.structure(new), kept))

    work = Work(embed, piece, head)
    d_shared, d_stack, total = pipeline.run(
        pipe.ticks(train), work, shared, stack, axes, train=train, masked=masked
    )
    if not train:
        return None, total
    back = {path: pipe.deal.back(g) for path, g in d_stack.items()}
    return _joined(params, d_shared, back), total


def _parted(pipe: Pipeline, tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Path -> leaf, of what is on all stages and of this stage's pieces of the stack."""
    flat = flatten(tree)
    shared = {p: leaf for p, leaf in flat.items() if not pipe.owns(p)}
    return shared, {p: pipe.deal.out(leaf) for p, leaf in flat.items() if pipe.owns(p)}


def _joined(like: Any, shared: dict[str, Any], stack: dict[str, Any]) -> Any:
    """A tree again, shaped as `like`."""
    both = {**shared, **stack}
    return jax.tree.unflatten(jax.tree.structure(like), [both[path] for path in flatten(like)])
