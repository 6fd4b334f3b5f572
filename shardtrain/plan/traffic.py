"""What the tensor axis has to carry, from the loss as it was traced for one device.

A matrix product whose weight is divided along the contracted dim leaves a partial sum: its output is reduced
in the forward. One whose weight is divided along another dim leaves the gradient of its other operand as a
partial sum: that is reduced in the backward, once however many weights share the operand. A lookup in a
table divided along its rows is reduced in the forward. Nothing else has to cross (Megatron-LM). Kernels of experts
stand for those of one dense MLP: what they leave and take crosses once per token, not once per choice.

Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053), section 3. Held by tests/unit/plan/test_minimum.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.parallel.attention import KEYS, QUERIES
from shardtrain.parallel.expert import OF_EXPERTS, SENT
from shardtrain.parallel.lookup import LOOKED_UP
from shardtrain.parallel.precision import wide
from shardtrain.parallel.quantised import PRODUCT
from shardtrain.plan.lines import equation_line
from shardtrain.plan.model import FROZEN, VARIABLES
from shardtrain.sharding import context
from shardtrain.tree import flatten


@dataclasses.dataclass(frozen=True)
class Edge:
    """One activation that crosses the axis: `bytes` of it for one group, all runs of a loop together.

    `kind`: output (reduced forward), input (reduced backward), lookup (reduced forward), head (per token,
    scalars of a softmax over a divided vocabulary; `bytes` of one such scalar for all tokens). Queries, and keys (with
    values), of attention, and experts, what goes to them (`path` is empty): what a divided sequence, and an exchange
    of tokens, have to move. `scales`: bytes of a scalar for each of its rows, of an edge at a product that
    can be rounded.
    """

    kind: str
    path: str
    bytes: float
    forward: bool
    scales: float = 0.0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """`edges` over the tensor axes, and over expert."""

    edges: tuple[Edge, ...]

    def total(self, *kinds: str) -> float:
        """Bytes of the edges of these kinds."""
        return sum(e.bytes for e in self.edges if e.kind in kinds)

    def divided(self, stages: int) -> Traffic:
        """What stages carry on the mean: each its part of the layers, one the embedding and one the head."""
        less = lambda e: dataclasses.replace(e, bytes=e.bytes / stages, scales=e.scales / stages)  # noqa: E731
        return Traffic(tuple(less(e) for e in self.edges))


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A value that is a parameter, moved or converted: which of its dims the axis divides.

    `marked`: it went through `st.lookup`. `rounded`: it can be, see `parallel/quantised.py`.
    `tokens`: of kernels of experts, how many they serve together.
    """

    path: str
    divided: frozenset[int] = frozenset()
    vocab: frozenset[int] = frozenset()
    marked: bool = False
    rounded: bool = False
    tokens: int = 0


_SAME = {
    "convert_element_type",
    "copy",
    "optimization_barrier",
    "sharding_constraint",
    "name",
    "pcast",
    "pvary",
}
_MARKED = {QUERIES: "queries", KEYS: "keys", SENT: "experts"}
_MOVING = {*_SAME, "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice"}
_PRODUCTS = ("dot_general", "ragged_dot_general")
_LOOSE = {*_SAME, "reshape", "transpose", "squeeze", "expand_dims", "reduce_precision"}


def traffic(
    loss: Callable[..., Any],
    params: Any,
    model_state: Mapping[str, Any],
    batch: Any,
    divided: Mapping[str, frozenset[int]],
    vocab: Mapping[str, frozenset[int]],
    activations: Mapping[str, Any],
    compute: Any,
) -> Traffic:
    """Trace the loss of one group in the compute dtype and collect what crosses.

    Args:
        loss: see `plan.given.group_loss`.
        divided: path -> dims that the tensor axes divide. vocab: path -> those whose logical axis is vocab.
    """
    params = as_compute(params, compute)
    frozen = as_compute(model_state.get(FROZEN, {}), compute)
    with context.use(context.Layout(mesh=None, activations=activations)):
        closed = jax.make_jaxpr(loss)(
            params, frozen, model_state.get(VARIABLES, {}), jax.random.key(0), batch
        )
    paths = [*flatten(params), *flatten(frozen)]
    walk, count = _Walk(), len(flatten(params))
    values = [
        _Value(_Weight(path, divided.get(path, frozenset()), vocab.get(path, frozenset())), index < count)
        for index, path in enumerate(paths)
    ]
    values += [_Value()] * (len(closed.jaxpr.invars) - len(values))
    walk.run(closed.jaxpr, values, 1)
    return Traffic(tuple(walk.edges))


def as_compute(tree: Any, dtype: Any) -> Any:
    """Shapes of parameters as the loss sees them."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype),
        tree,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """What one variable is. Values that are the same but for a move share their `root`."""

    weight: _Weight | None = None
    grad: bool = False
    root: object = dataclasses.field(default_factory=object)


@dataclasses.dataclass(frozen=True)
class Uses:
    """Of parameters: `looked_up`, those of which every use is `st.lookup`; `scanned`: path -> line of the scan over
    their leading dim; `lines`: path -> line of the first use."""

    looked_up: frozenset[str]
    scanned: Mapping[str, str]
    lines: Mapping[str, str]


def uses(jaxpr: Any, paths: Sequence[str]) -> Uses:
    """How parameters, the first inputs of a traced loss, are used."""
    walk = _Walk()
    values = [_Value(_Weight(path)) for path in paths]
    walk.run(jaxpr, values + [_Value()] * (len(jaxpr.invars) - len(values)), 1)
    looked_up = frozenset(path for path, kinds in walk.uses.items() if kinds == {"lookup"})
    return Uses(looked_up, walk.scanned, walk.lines)


class _Walk:
    def __init__(self) -> None:
        self.edges: list[Edge] = []
        self.uses: dict[str, set[str]] = {}
        self.scanned: dict[str, str] = {}
        self.lines: dict[str, str] = {}
        self._seen: set[object] = set()

    def run(self, jaxpr: Any, inputs: list[_Value], times: int) -> list[_Value]:
        """Follow one jaxpr; returns its outputs."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        value = lambda v: _Value() if hasattr(v, "val") else known.get(v, _Value())  # noqa: E731
        for eqn in jaxpr.eqns:
            name, ins, inner = eqn.primitive.name, [value(v) for v in eqn.invars], _inner(eqn)
            for v in ins if inner is None and name not in _MOVING and name != "scan" else ():
                if v.weight is not None and v.weight.path not in self.lines:
                    self.lines[v.weight.path] = equation_line(eqn)
            if name == "scan":
                outs = self._scan(eqn, ins, times)
            elif inner is not None:
                fill = [_Value()] * (len(inner.invars) - len(ins))
                outs = self.run(inner, (fill + ins)[len(fill) + len(ins) - len(inner.invars) :], times)
            else:
                outs = self._plain(eqn, ins, times)
            known.update(zip(eqn.outvars, outs, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _plain(self, eqn: Any, ins: list[_Value], times: int) -> list[_Value]:
        name, first, rest = eqn.primitive.name, ins[0] if ins else _Value(), ins[1:]
        made = _Value(None, any(v.grad for v in ins), first.root if name in _LOOSE else object())
        if name == "name" and eqn.params["name"] in _MARKED:
            self.edges.append(Edge(_MARKED[eqn.params["name"]], "", times * _bytes(eqn.outvars[0]), True))
        if name in _PRODUCTS:
            self._dot(eqn, ins[:2], times)
        elif name == "gather" and first.weight is not None:
            self._lookup(eqn, first.weight, times)
        elif first.weight is not None:
            made = dataclasses.replace(made, weight=_moved(eqn, first.weight))
            if made.weight is None:
                rest = ins
        for v in rest if name not in _PRODUCTS else []:
            if v.weight is not None:
                self.uses.setdefault(v.weight.path, set()).add(name)
        return [made, *[_Value(None, made.grad) for _ in eqn.outvars[1:]]][: len(eqn.outvars)]

    def _scan(self, eqn: Any, ins: list[_Value], times: int) -> list[_Value]:
        body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
        # Which operands are constants, carries or slices shows in the shapes, on every version of JAX.
        sliced = sum(_shape(a) != _shape(b) for a, b in zip(eqn.invars, body.invars, strict=True))
        carried = sum(_shape(a) == _shape(b) for a, b in zip(eqn.outvars, body.outvars, strict=True))
        first = len(ins) - sliced
        inside = [v if i < first else _Value(_layer(v.weight), v.grad) for i, v in enumerate(ins)]
        for v in ins[first:]:
            if v.weight is not None:
                self.scanned.setdefault(v.weight.path, equation_line(eqn))
        # Once to learn which carries need gradients, then for good.
        after = _Walk().run(body, inside, 0)
        for i in range(carried):
            v = inside[first - carried + i]
            inside[first - carried + i] = _Value(v.weight, v.grad or after[i].grad, v.root)
        outs = self.run(body, inside, times * eqn.params["length"])
        return [_Value(None, v.grad) for v in outs]

    def _dot(self, eqn: Any, ins: list[_Value], times: int) -> None:
        for side in (0, 1):
            weight, other = ins[side].weight, 1 - side
            if weight is None:
                continue
            self.uses.setdefault(weight.path, set()).add("dot")
            shape = eqn.invars[other].aval.shape
            contracted = [set(dims) for dims in _contracted(eqn)]
            rows = math.prod(n for d, n in enumerate(shape) if d not in contracted[other])
            # Of what goes through experts, each token crosses once.
            share = weight.tokens / rows if weight.tokens else 1
            scalar = float(jnp.dtype(wide(eqn.outvars[0].aval)).itemsize)
            scales = scalar * times * rows if weight.rounded else 0.0
            if weight.divided & contracted[side]:
                sent = times * share * _bytes(eqn.outvars[0])
                self.edges.append(Edge("output", weight.path, sent, True, scales))
            elif weight.divided:
                root = ins[other].root
                if ins[other].grad and ins[other].weight is None and root not in self._seen:
                    self._seen.add(root)
                    sent = times * share * _bytes(eqn.invars[other])
                    self.edges.append(Edge("input", weight.path, sent, False, scales))
                if weight.divided & weight.vocab:
                    self.edges.append(Edge("head", weight.path, times * rows * scalar, True))

    def _lookup(self, eqn: Any, weight: _Weight, times: int) -> None:
        self.uses.setdefault(weight.path, set()).add("lookup" if weight.marked else "gather")
        looked = set(eqn.params["dimension_numbers"].start_index_map)
        if weight.divided & looked:
            self.edges.append(Edge("lookup", weight.path, times * _bytes(eqn.outvars[0]), True))


def _inner(eqn: Any) -> Any:
    """The jaxpr that a call, checkpoint or custom rule stands for; a kernel's is of blocks, and not looked into."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = eqn.params.get(key)
        if found is not None and eqn.primitive.name not in ("scan", "pallas_call"):
            return getattr(found, "jaxpr", found)
    if eqn.primitive.name == "cond":
        return getattr(eqn.params["branches"][-1], "jaxpr", None)
    return None


def _layer(weight: _Weight | None) -> _Weight | None:
    """One slice of a stack, as a scan's body sees it."""
    if weight is None:
        return None
    less = lambda dims: frozenset(d - 1 for d in dims)  # noqa: E731
    return dataclasses.replace(weight, divided=less(weight.divided), vocab=less(weight.vocab))


def _moved(eqn: Any, weight: _Weight) -> _Weight | None:
    """The same parameter after an operation that only moves or converts it."""
    name = eqn.primitive.name
    if name == "name" and eqn.params["name"] == LOOKED_UP:
        return dataclasses.replace(weight, marked=True)
    if name == "name" and eqn.params["name"] == PRODUCT:
        return dataclasses.replace(weight, rounded=True)
    if name == "name" and eqn.params["name"].startswith(OF_EXPERTS):
        return dataclasses.replace(weight, tokens=int(eqn.params["name"].removeprefix(OF_EXPERTS)))
    if name in _SAME or name in ("slice", "dynamic_slice"):
        return weight
    new = _positions(eqn)
    if new is None:
        return None
    move = lambda dims: frozenset(new[d] for d in dims if new.get(d) is not None)  # noqa: E731
    return dataclasses.replace(weight, divided=move(weight.divided), vocab=move(weight.vocab))


def _positions(eqn: Any) -> dict[int, int] | None:
    """Of an operation that moves dims: old dim -> new dim."""
    name, before, after = eqn.primitive.name, _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if name == "transpose":
        return {old: new for new, old in enumerate(eqn.params["permutation"])}
    if name == "broadcast_in_dim":
        return dict(enumerate(eqn.params["broadcast_dimensions"]))
    if name == "squeeze":
        kept = [d for d in range(len(before)) if d not in eqn.params["dimensions"]]
        return {old: new for new, old in enumerate(kept)}
    if name == "reshape":
        found = {d: _position(before, after, d) for d in range(len(before))}
        return {old: new for old, new in found.items() if new is not None}
    return None


def _position(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """Where a dim begins after a reshape: the dim with as many elements before it."""
    ahead, total = math.prod(before[:dim]), 1
    for position, size in enumerate(after):
        if total == ahead and size != 1:
            return position
        if total > ahead:
            return position - 1  # it was merged into the dim before
        total *= size
    return len(after) - 1 if after else None


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def _bytes(v: Any) -> float:
    return math.prod(v.aval.shape) * v.aval.dtype.itemsize


def _contracted(eqn: Any) -> Any:
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    return (eqn.params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers)[0]


def divided_dims(spec: PartitionSpec, axes: frozenset[str]) -> frozenset[int]:
    """Dims of a spec that these mesh axes divide."""
    return frozenset(
        d
        for d, entry in enumerate(spec)
        if entry and set((entry,) if isinstance(entry, str) else entry) & axes
    )
