"""A model's parts for a pipeline, and how its layers are dealt out to stages."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import ConfigError
from shardtrain.parallel.fsdp import gather
from shardtrain.parallel.remat import over_layers

STAGE = "stage"  # the mesh axis


@dataclasses.dataclass(frozen=True)
class Stages:
    """A loss function that says of which parts it is made, so that a pipeline can run them on different devices.

    Calling it runs the parts one after the other: it is a plain `loss_fn` on every mesh. On a mesh with a `stage` axis the
    layers of the stack are divided over it, the first stage runs `embed` too and the last one `head`.

    Args:
        embed: `(model, batch[, rngs]) -> x`: what enters the first layer, any pytree of arrays.
        block: `(layer, x[, key[, batch]]) -> x`: one layer, of the shapes that it got. `layer` is one slice of the stack:
            a module where the stack is one, else its parameters. `key` is this layer's own, None without rngs.
        head: `(model, x, batch[, rngs]) -> st.Loss`, or what a loss function may return.
        blocks: path of the stack in the model: parameters with a leading dim of layers.
        keys: `(model, rngs) -> key or None`, split over the layers; default: one of `rngs.dropout`. `embed` and it get
            equal rngs, `head` others.
        begin: `(model) -> None`: what changes in the model's variables before a call, in every part of it. `head` sets those
            of the next step, of all layers; without it a pipeline refuses a model with variables.
        choices: the same parts but for a head that gives, in place of a loss, `st.Loss(0, 0, {"choices": [rows, tokens, ...]})`,
            what routers decide for each token in a call of this loss; or {} of a model without. For `st.verify`.
        remat: what the backward of a layer recomputes (`none`, `dots`, `full`, names), or a function of the model.

    Communicates: on a mesh with p stages, m microbatches per batch shard and v pieces of the model per device, 2 m v a bytes
    over a boundary between stages, for `a` bytes of x of one microbatch; gradients of all but the stack once a step
    by all-reduce over `stage` too.
    """

    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    blocks: str = "blocks"
    keys: Callable[[Any, Any], Any] | None = None
    remat: str | Callable[[Any], str] = "none"
    begin: Callable[[Any], None] | None = None
    choices: Stages | None = None

    def __call__(self, model: Any, batch: Any, rngs: Any = None) -> Any:
        """The loss of one group, layer after layer."""
        if self.begin is not None:
            self.begin(model)
        key, others = self.layer_key(model, rngs), self.head_rngs(rngs)
        x = self.first(model, batch, rngs)
        state, _ = self.stack(model)
        layers = jax.tree.leaves(state)[0].shape[0]
        keys = None if key is None else jax.random.split(key, layers)
        return self.last(model, self.run(model, x, keys, batch), batch, others)

    def first(self, model: Any, batch: Any, rngs: Any) -> Any:
        """What enters the first layer."""
        return _call(self.embed, (model, batch), rngs)

    def last(self, model: Any, x: Any, batch: Any, rngs: Any) -> Any:
        """The loss of what leaves the last layer."""
        return _call(self.head, (model, x, batch), rngs)

    def layer_key(self, model: Any, rngs: Any) -> Any:
        """The key that is split over the layers; leaves `rngs` as they are."""
        if rngs is None:
            return None
        from flax import nnx

        copy = nnx.clone(rngs)
        return jax.random.fold_in(copy.dropout(), 2) if self.keys is None else self.keys(model, copy)

    def head_rngs(self, rngs: Any) -> Any:
        """Others than those of `embed`, however many that one takes: the last stage does not run it."""
        if rngs is None or len(_positional(self.head)) < 4:
            return None
        from flax import nnx

        return nnx.Rngs(jax.random.fold_in(nnx.clone(rngs).dropout(), 1))

    def stack(self, model: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Parameters with their leading dim of layers, and how a slice of them becomes a layer."""
        from flax import nnx

        found = model if isinstance(model, nnx.Module) else model.params
        for name in self.blocks.split("/"):
            if isinstance(found, Mapping):
                found = found[name] if name in found else _absent(self, found, name)
            else:
                found = getattr(found, name) if hasattr(found, name) else _absent(self, vars(found), name)
        if isinstance(found, nnx.Module):
            graph, state = nnx.split(found)
            return state, lambda state: nnx.merge(graph, state)
        return found, lambda layer: layer

    def run(self, model: Any, x: Any, keys: Any, batch: Any, there: jax.Array | None = None) -> Any:
        """`x` through the layers that the model's stack holds here.

        Args:
            keys: one per layer, or None. there: bool per layer; `x` passes by those that are not.
        """
        state, module = self.stack(model)
        wanted = len(_positional(self.block))

        def body(x: Any, layer: Any) -> tuple[Any, None]:
            state, key, here = layer
            y = self.block(*(module(gather(state, self.blocks)), x, key, batch)[: max(2, min(wanted, 4))])
            if here is not None:
                y = jax.tree.map(lambda new, old: jnp.where(here, new, old), y, x)
            return y, None

        policy = self.remat(model) if callable(self.remat) else self.remat
        return over_layers(body, x, (state, keys, there), policy)[0]


def _call(function: Callable[..., Any], args: tuple[Any, ...], rngs: Any) -> Any:
    return function(*args, rngs) if len(_positional(function)) > len(args) else function(*args)


def _positional(function: Callable[..., Any]) -> list[Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [None] * 4
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _absent(stages: Stages, holder: Mapping[str, Any], name: str) -> Any:
    raise ConfigError(
        f"no '{name}' in the model",
        where=f"st.Stages(blocks='{stages.blocks}')",
        why=f"it has {', '.join(sorted(map(str, holder))[:8])}",
        fix="the path of the stack: parameters with a leading dim of layers",
    )


@dataclasses.dataclass(frozen=True)
class Deal:
    """Which layers each of the `stages` x `chunks` pieces of a model has: as equal as can be, longer ones first.

    Where the pieces are equal, a stage keeps its n-th of the stack at rest, in the model's own order. With one chunk
    that is its piece. With more, the pieces change places once a step, and so do their gradients: v K layers sent and
    v K received by each device at most. Where they are not equal the stack is whole on every stage at rest, each takes
    its piece without sending anything, and gradients are all-reduced over `stage`; a step takes as long as the longest piece.
    """

    layers: int
    stages: int
    chunks: int

    @property
    def pieces(self) -> int:
        return self.stages * self.chunks

    @property
    def equal(self) -> bool:
        """Whether every piece has as many layers: the stack can be divided at rest."""
        return self.layers % self.pieces == 0

    @property
    def longest(self) -> int:
        """Layers of the longest piece."""
        return -(-self.layers // self.pieces)

    @property
    def places(self) -> np.ndarray:
        """int32 [stages, chunks, longest]: which layers; -1 where a piece is shorter."""
        counts = [self.layers // self.pieces + (q < self.layers % self.pieces) for q in range(self.pieces)]
        starts = np.cumsum([0, *counts[:-1]])
        table = np.full((self.pieces, self.longest), -1, np.int32)
        for q, (start, count) in enumerate(zip(starts, counts, strict=True)):
            table[q, :count] = start + np.arange(count)
        return table.reshape(self.chunks, self.stages, self.longest).transpose(1, 0, 2)

    @property
    def rounds(self) -> list[list[int]]:
        """Pieces that change places at the same time: one from every stage, one to every stage, per round.

        Piece q is at rest on stage q // chunks and runs on stage q % stages. As many leave each stage as come to it, so
        they fall into rounds (Koenig's theorem on the colours of a bipartite graph's edges).
        """
        left, rounds = set(range(self.pieces)), []
        while left:
            rounds.append(_one_of_each(left, self.stages, self.chunks))
            left -= set(rounds[-1])
        return rounds

    def out(self, leaf: jax.Array) -> jax.Array:
        """[layers at rest, ...] of this stage -> [chunks, longest, ...], its pieces. Inside a manual region."""
        if not self.equal:
            places = jnp.asarray(self.places)[jax.lax.axis_index(STAGE)]
            return leaf[jnp.maximum(places, 0)]
        pieces = leaf.reshape(self.chunks, self.longest, *leaf.shape[1:])
        return pieces if self.chunks == 1 else self._exchange(pieces, back=False)

    def back(self, gradient: jax.Array) -> jax.Array:
        """[chunks, longest, ...] -> [layers at rest, ...]: the way back of a gradient; of unequal pieces a part of a sum."""
        if not self.equal:
            places = jnp.asarray(self.places)[jax.lax.axis_index(STAGE)]
            own = jnp.where((places >= 0).reshape(*places.shape, *[1] * (gradient.ndim - 2)), gradient, 0)
            whole = jnp.zeros_like(gradient, shape=(self.layers, *gradient.shape[2:]))
            return whole.at[jnp.maximum(places, 0)].add(own)
        pieces = gradient if self.chunks == 1 else self._exchange(gradient, back=True)
        return pieces.reshape(-1, *gradient.shape[2:])

    def _exchange(self, pieces: jax.Array, *, back: bool) -> jax.Array:
        stage, result = jax.lax.axis_index(STAGE), jnp.zeros_like(pieces)
        for moved in self.rounds:
            rest = {q // self.chunks: q % self.chunks for q in moved}  # stage -> slot, at rest
            runs = {q % self.stages: q // self.stages for q in moved}  # stage -> slot, where it runs
            pairs = [(q // self.chunks, q % self.stages) for q in moved]
            if back:
                rest, runs, pairs = runs, rest, [(b, a) for a, b in pairs]
            slot = lambda of: jnp.asarray([of[s] for s in range(self.stages)])[stage]  # noqa: E731
            piece = jax.lax.dynamic_index_in_dim(pieces, slot(rest), keepdims=False)
            piece = jax.lax.ppermute(piece, STAGE, pairs)
            result = jax.lax.dynamic_update_index_in_dim(result, piece, slot(runs), 0)
        return result


def _one_of_each(pieces: set[int], stages: int, chunks: int) -> list[int]:
    """Pieces of which one leaves every stage and one comes to every stage (Kuhn's matching)."""
    coming: dict[int, int] = {}  # stage -> the piece that comes to it

    def place(source: int, seen: set[int]) -> bool:
        for q in sorted(pieces):
            to = q % stages
            if q // chunks == source and to not in seen:
                seen.add(to)
                if to not in coming or place(coming[to] // chunks, seen):
                    coming[to] = q
                    return True
        return False

    assert all(place(source, set()) for source in range(stages)), "pieces that do not match"
    return sorted(coming.values())
