"""The least bytes that a layout has to send, per device and step, with their derivation.

For a group of n devices, f = (n-1)/n and X bytes of the whole array, a ring sends f*X for an all-gather, a
reduce-scatter or an all-to-all and 2f*X for an all-reduce; no algorithm sends less per device (Patarasuk and
Yuan, Bandwidth optimal all-reduce, 2009). The terms:

weights      a leaf divided over batch axes (fsdp) is gathered in the wire dtype: f*X for every call of the loss,
             and again for its backward where gathered weights are not kept (declared by the model's scan, or by
             our remat of an unrolled one); vectors are small enough to be kept. Rules that hold weights for a
             step gather them once. Rajbhandari et al., ZeRO (arXiv 1910.02054), stage 3: 3f*X in all.
             Over slice_fsdp and fsdp, s slices of w devices: gathered across them first, (s-1)/s * X/w, then within,
             (w-1)/w * X; and reduced in the other order.
gradients    of such a leaf leave each call by a reduce-scatter in the reduce dtype, f*X; those of held or whole
             leaves leave once a step: all-reduce 2f*X, or reduce-scatter f*X where the optimizer's copy is divided.
             Over slice and data an all-reduce of 2f*X with n = slices x data, of which only 2(s-1)/s * X/d
             crosses slices (reduce-scatter within, all-reduce across, all-gather within).
updates      an updated parameter that is whole while its optimizer state is divided: all-gather f*X, as stored.
tables       a leaf that is only looked up in, where the model lets us (st.lookup): all-gather of the token ids and
             an all-to-all of the rows, forward and backward, where that is less than gathering the table; of a part
             of the sequence where tensor divides both the vocabulary and the sequence.
attention    over a divided sequence (context): keys and values reach every device, f*K forward and again for the
             backward, and their gradients come home, f*K; under ulysses an all-to-all of queries, keys and values
             and one of the output, f*(2Q + K)/n forward and as much backward, of Q and K bytes of whole sequences.
             Liu et al. (arXiv 2310.01889); Jacobs et al. (arXiv 2309.14509).
activations  see `plan/traffic.py`: 2f*A for every activation A that crosses tensor; f*A to gather and f*A to
             scatter where the residual stream is divided along the sequence, and f*A more for every input that
             the backward gathers again. Korthikanti et al. (arXiv 2205.05198).
             In 8 bits the scales of such a product too: 2f * 4 bytes for each of its rows (8 in float64). Those of its
             weight's columns are left out: one row of activations has as many values.
experts      tokens go to the devices that hold their experts and come back, and so do both gradients: four all-to-alls
             of f*S*D over expert, for S places of the capacity (whether taken or not), or without drops S = T*k choices,
             if they are spread evenly. Lepikhin et al., GShard (arXiv 2006.16668), section 3.
stages       2 m a bytes over each of the p v - 1 boundaries between p stages of v pieces of the model, for m microbatches
             of a bytes of activations: forward one way, gradients the other; per device 2 m a (p v - 1) / p on average.
             Narayanan et al. (arXiv 2104.04473), section 3.2. Parameters outside the stack are on every stage: their
             gradients are all-reduced over stage too. With v > 1 the pieces of a stack that is divided in the model's
             order change places once a step, and their gradients back. Each stage carries its part of the layers, one
             the embedding and one the head: all of it is counted as the mean over stages. A backward runs its piece
             again (declared: only inputs are kept), of all pieces but the last, whose forward waits for it: so much
             more of weights and of forward activations.

Scalars (loss, norms, counts of tokens) are left out: a few bytes. Source also: Austin et al., How to Scale Your Model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardtrain.parallel.expert import AXIS
from shardtrain.parallel.fsdp import across
from shardtrain.parallel.pipeline import Pipeline
from shardtrain.parallel.precision import wide
from shardtrain.parallel.stages import STAGE
from shardtrain.plan.layout import Leaf, in_stack
from shardtrain.plan.model import FROZEN
from shardtrain.plan.staged import part_functions
from shardtrain.plan.traffic import Traffic, as_compute, divided_dims, traffic
from shardtrain.sharding.rules import spec_axes
from shardtrain.tree import bytes_text, flatten, table

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Term:
    """`bytes` sent per device and step by `op` over `axes`, and why."""

    what: str
    op: str
    axes: tuple[str, ...]
    bytes: float
    formula: str

    @property
    def axis(self) -> str:
        return "+".join(self.axes)


class Minimum(list[Term]):
    """Terms of one layout."""

    @property
    def bytes(self) -> float:
        """Per device and step."""
        return sum(t.bytes for t in self)

    def by_axis(self) -> dict[str, float]:
        """Axis -> bytes."""
        totals: dict[str, float] = {}
        for term in self:
            totals[term.axis] = totals.get(term.axis, 0.0) + term.bytes
        return totals

    def as_json(self) -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(t), "axes": list(t.axes)} for t in self]

    def __str__(self) -> str:
        if not self:
            return "nothing has to be sent"
        rows = [(t.what, t.op, t.axis, bytes_text(t.bytes), t.formula) for t in self]
        rows.append(("all", "", "", bytes_text(self.bytes), ""))
        return table(("minimum", "collective", "axis", "per device", "derivation"), rows)


def minimum(plan: Plan, carried: Traffic | None = None, stream: float | None = None) -> Minimum:
    """The least that the plan's step sends per device, from shapes, dtypes and specs alone.

    `carried`: what crosses tensor and the like for one group; `stream`: bytes of what a stage hands on for one group. Where they
    are not known the loss is traced for them.
    """
    terms: dict[tuple[str, str, tuple[str, ...], str], float] = {}

    def add(what: str, op: str, axes: tuple[str, ...], size: float, formula: str) -> None:
        if axes and size:
            terms[what, op, axes, formula] = terms.get((what, op, axes, formula), 0.0) + size

    carried = traffic_of(plan) if carried is None else carried
    if plan.pipeline is not None:
        carried = carried.divided(plan.pipeline.deal.stages)
    trained = flatten(plan.abstract_state.params)
    calls = plan.microbatches
    for path, leaf in plan.leaves.items():
        _weights(plan, leaf, path in trained, calls, add)
        if path in trained:
            _gradients(plan, leaf, calls, add)
    _activations(plan, carried, calls, add)
    _attention(plan, carried, calls, add)
    _experts(plan, carried, calls, add)
    if plan.pipeline is not None:
        _stages(plan, plan.pipeline, stream_of(plan) if stream is None else stream, calls, add)
    return Minimum([Term(*key[:3], size, key[3]) for key, size in terms.items()])


def _parts(plan: Plan, axes: Any) -> int:
    return math.prod(plan.mesh.shape[a] for a in axes)


def _share(n: int) -> float:
    return (n - 1) / n


def whole_size(plan: Plan, leaf: Leaf) -> float:
    """Elements of a leaf that one device has when it is whole along what is gathered."""
    return math.prod(leaf.shape) / _parts(plan, {*spec_axes(leaf.shard.spec), *leaf.shard.kept_axes})


def stream_of(plan: Plan) -> float:
    """Bytes of what a stage hands on to the next for one group, on every device together."""
    assert plan.pipeline is not None
    rows = plan.global_batch // plan.groups
    parts = part_functions(plan.adapter, plan.pipeline, plan.pipeline.stages, rows, train=True)
    assert parts is not None
    params, given = as_compute(plan.abstract_state.params, plan.compute), plan.abstract_state.model_state
    state = {**given, FROZEN: as_compute(given.get(FROZEN, {}), plan.compute)}
    x = jax.eval_shape(parts.embed, params, state, jax.random.key(0), plan.group_batch)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))


def _stages(plan: Plan, pipe: Pipeline, activation: float, calls: int, add: Any) -> None:
    divided = _parts(plan, (a for a in plan.rules.activations.get("seq", ()) if a in plan.mesh.shape))
    deal = pipe.deal
    sent = 2 * calls * activation / divided * (deal.pieces - 1) / deal.stages
    add("activations to the next stage and back", "collective-permute", (STAGE,), sent, "2m*a*(p*v-1)/p")
    if not deal.equal or deal.chunks == 1:
        return
    moved = sum(q // deal.chunks != q % deal.stages for q in range(deal.pieces)) / deal.pieces
    trained = flatten(plan.abstract_state.params)
    for path, leaf in plan.leaves.items():
        if pipe.owns(path):
            held = path in plan.held_leaves
            size = whole_size(plan, leaf) / (1 if held else _parts(plan, leaf.shard.axes))
            width = (jnp.dtype(plan.compute) if held else leaf.dtype).itemsize
            width += jnp.dtype(wide(leaf)).itemsize * (path in trained)
            add(
                "layers to their stages and back",
                "collective-permute",
                (STAGE,),
                moved * size * width,
                "X moved",
            )


def _run_again(plan: Plan) -> float:
    """The share of a stage's forwards that its backwards run again: of all pieces but the last, whose forward waits for it."""
    return 0.0 if plan.pipeline is None else 1 - 1 / plan.pipeline.deal.pieces


def _weights(plan: Plan, leaf: Leaf, trained: bool, calls: int, add: Any) -> None:
    shard = leaf.shard
    if shard.dim is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return

    def send(what: str, op: str, size: float, times: str = "") -> None:
        slow, within = across(shard.axes)
        if slow and within:
            w = _parts(plan, within)
            add(what, op, within, _share(w) * size, f"{times}f*X")
            add(f"{what}, across slices", op, slow, _share(_parts(plan, slow)) * size / w, f"{times}f*X/w")
        else:
            add(what, op, shard.axes, _share(_parts(plan, shard.axes)) * size, f"{times}f*X")

    share = _share(_parts(plan, shard.axes))
    size = whole_size(plan, leaf)
    wire, back = size * jnp.dtype(shard.wire).itemsize, size * jnp.dtype(shard.reduce).itemsize
    stacked = in_stack(leaf.path, plan.stacks)
    matrix = len(leaf.shape) - stacked > 1
    if leaf.path in plan.held_leaves:
        send("weights of the step", "all-gather", wire)
        return
    if leaf.path in plan.tables:
        # Rows are whole on every tensor device: only an axis on the columns would divide what moves.
        columns = (
            spec_axes(PartitionSpec(*leaf.shard.spec[-1:])) if len(leaf.shard.spec) == len(leaf.shape) else ()
        )
        stages = 1 if plan.pipeline is None else plan.pipeline.deal.stages  # only the first looks up
        rows, width = plan.tables[leaf.path] / stages, leaf.shape[-1] / _parts(plan, columns)
        moved = share * rows * width * jnp.dtype(shard.wire).itemsize
        if (
            plan.sequence_divided
        ):  # summed over tensor first, each device has its part of the sequence to hand over
            moved /= _parts(plan, spec_axes(PartitionSpec(*leaf.shard.spec[:1])))
        add("table: ids", "all-gather", shard.axes, share * rows * _parts(plan, shard.axes) * 4, "f*n*T*4")
        add(
            "table: rows",
            "all-to-all",
            shard.axes,
            moved * (2 if trained else 1),
            "f*T*D forward and backward",
        )
        return
    times = "" if calls == 1 else f"{calls} x "
    send("weights forward", "all-gather", calls * wire, times)
    again = _run_again(plan)
    if again and plan.pipeline is not None and plan.pipeline.owns(leaf.path):
        add(
            "weights of a piece run again",
            "all-gather",
            shard.axes,
            calls * again * share * wire,
            f"{times}f*X*(p*v-1)/(p*v)",
        )
    if matrix and (stacked or plan.regathers) and trained:
        send("weights backward", "all-gather", calls * wire, times)
    if trained:
        send("gradients", "reduce-scatter", calls * back, times)


def _gradients(plan: Plan, leaf: Leaf, calls: int, add: Any) -> None:
    shard = leaf.shard
    size = whole_size(plan, leaf) * jnp.dtype(shard.reduce).itemsize
    inside = () if shard.dim is None or leaf.path in plan.held_leaves else shard.axes
    apart = {*inside, *shard.kept_axes}
    rest = [
        a for a in plan.mesh.shape if a in plan.manual_axes and a not in apart
    ]  # in the mesh's order, as reports have it
    size /= _parts(plan, inside)
    scattered = tuple(a for a in rest if a in spec_axes(leaf.optimizer))
    if scattered:
        share = _share(_parts(plan, scattered))
        add("gradients", "reduce-scatter", scattered, share * size, "f*X")
        size /= _parts(plan, scattered)
        whole = tuple(a for a in scattered if a not in spec_axes(leaf.spec))
        if whole:
            stored = math.prod(leaf.shape) / _parts(plan, spec_axes(leaf.spec)) * leaf.dtype.itemsize
            add("updates", "all-gather", whole, _share(_parts(plan, whole)) * stored, "f*X")
        rest = [a for a in rest if a not in scattered]
    slow, within = across(tuple(rest))
    if slow and within:
        n = _parts(plan, within)
        add("gradients within a slice", "all-reduce", within, 2 * _share(n) * size, "2f*X")
        size, rest = size / n, list(slow)
    if rest:
        share = _share(_parts(plan, rest))
        add("gradients", "all-reduce", tuple(rest), 2 * share * size, "2f*X")


def traffic_of(plan: Plan) -> Traffic:
    """What crosses tensor and the like for one group of a plan; traces its loss."""
    tensor = frozenset(a for a in plan.mesh.shape if a not in plan.manual_axes)
    names = {path: leaf.logical or () for path, leaf in plan.leaves.items()}
    return traffic(
        plan.group_loss,
        plan.abstract_state.params,
        plan.abstract_state.model_state,
        plan.group_batch,
        {path: divided_dims(leaf.spec, tensor) for path, leaf in plan.leaves.items()},
        {path: frozenset(d for d, n in enumerate(axes) if n == "vocab") for path, axes in names.items()},
        plan.rules.activations,
        plan.compute,
    )


def _activations(plan: Plan, carried: Traffic, calls: int, add: Any) -> None:
    axes = tuple(a for a in plan.mesh.shape if a not in plan.manual_axes and plan.mesh.shape[a] > 1)
    if not axes or not carried.edges:
        return
    share = _share(_parts(plan, axes)) / plan.sequence_parts  # each device has its part of the sequence
    outputs = calls * carried.total("output", "lookup")
    if again := _run_again(plan):
        inside = [e for e in carried.edges if plan.pipeline is not None and plan.pipeline.owns(e.path)]
        outs = calls * again * sum(e.bytes for e in inside if e.kind == "output")
        ins = calls * again * sum(e.bytes for e in inside if e.kind == "input")
        if plan.sequence_divided:
            add("activations of a piece run again", "reduce-scatter", axes, share * outs, "f*A per output")
            add("activations of a piece run again", "all-gather", axes, share * ins, "f*A per input")
        else:
            add("activations of a piece run again", "all-reduce", axes, 2 * share * outs, "2f*A per output")
    inputs = calls * carried.total("input")
    if plan.sequence_divided:
        add("activations forward", "reduce-scatter", axes, share * outputs, "f*A per output")
        add("activations forward", "all-gather", axes, share * inputs, "f*A per input")
        add("activations backward", "all-gather", axes, share * outputs, "f*A per output")
        add("activations backward", "reduce-scatter", axes, share * inputs, "f*A per input")
        again = calls * sum(
            e.bytes for e in carried.edges if e.kind == "input" and in_stack(e.path, plan.stacks)
        )
        add(
            "activations again",
            "all-gather",
            axes,
            share * again,
            "f*A per input gathered again for its weight",
        )
    else:
        add("activations forward", "all-reduce", axes, 2 * share * outputs, "2f*A per output")
        add("activations backward", "all-reduce", axes, 2 * share * inputs, "2f*A per input")
    if plan.quant is not None:
        scales = calls * sum(e.scales * (1 + _run_again(plan) * e.forward) for e in carried.edges)
        add("scales of rounded products", "all-reduce", axes, 2 * share * scales, "2f * a scalar a row")
    scalars = calls * carried.total("head")
    add("softmax of the head", "all-reduce", axes, 3 * 2 * share * scalars, "2f * 3 scalars a token")


def _attention(plan: Plan, carried: Traffic, calls: int, add: Any) -> None:
    axes, n = plan.sequence_axes, plan.sequence_parts
    if n == 1:
        return
    free = {a for a in plan.mesh.shape if a not in plan.manual_axes}
    divided = lambda name: _parts(plan, free & set(plan.rules.activations.get(name, ())))  # noqa: E731
    queries = calls * _share(n) * carried.total("queries") / divided("heads")
    keys = calls * _share(n) * carried.total("keys") / divided("kv_heads")
    if plan.attention == "ulysses":
        moved = (2 * queries + keys) / n
        add("attention forward", "all-to-all", axes, moved, "f*(2Q + K)/n")
        add("attention backward", "all-to-all", axes, moved, "f*(2Q + K)/n")
        return
    ring = plan.attention == "ring"
    there, home = ("collective-permute",) * 2 if ring else ("all-gather", "reduce-scatter")
    add("keys forward", there, axes, keys, "f*K")
    add("keys backward", there, axes, keys, "f*K")
    add("gradients of keys", home, axes, keys, "f*K")


def _experts(plan: Plan, carried: Traffic, calls: int, add: Any) -> None:
    held = {
        axis
        for leaf in plan.leaves.values()
        for name, axes in zip(leaf.logical or (), leaf.spec, strict=False)
        for axis in (axes if isinstance(axes, tuple) else (axes,))
        if name == "expert" and axis == AXIS
    }
    if held:
        sent = _share(plan.mesh.shape[AXIS]) * calls * carried.total("experts")
        add("tokens to experts and back", "all-to-all", (AXIS,), 4 * sent, "4f*S*D")
        again = 2 * _run_again(plan) * sent
        add("tokens to experts of a piece run again", "all-to-all", (AXIS,), again, "2f*S*D*(p*v-1)/(p*v)")
