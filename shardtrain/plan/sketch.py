"""A layout's cost from arithmetic alone, once the model has been partitioned on one device and on two of each kind, with two
row counts: a few milliseconds.

What is exact: bytes of state, from specs; bytes sent, from `plan/minimum.py`; whether it divides at all. What is scaled: every
operation's products and memory traffic, and activations, by what one more row added to them. Of tensor, two devices tell
what it divides and what each repeats; of a pipeline, what its stages run again. It orders layouts so that few have to be
partitioned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from shardtrain.mesh import Target
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.presets import PRESETS
from shardtrain.parallel.quantised import check_quant
from shardtrain.parallel.stages import STAGE
from shardtrain.plan import layout as layouts
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants, Cost, Sent, cost, rooflines
from shardtrain.plan.forecast import bubble
from shardtrain.plan.given import check_sequence, group_count
from shardtrain.plan.minimum import Term, minimum, stream_of, traffic_of, whole_size
from shardtrain.plan.model import FROZEN
from shardtrain.plan.paper import Work
from shardtrain.plan.partitioned import Partitioned
from shardtrain.plan.plan import PRECISIONS, Plan
from shardtrain.plan.staged import as_pipeline, at_rest, with_layers
from shardtrain.plan.traffic import Traffic
from shardtrain.sharding.rules import spec_axes
from shardtrain.tree import flatten


@dataclasses.dataclass(frozen=True)
class Sketch:
    """`peak`: bytes, a guess but for `state`. `cost`: None without figures of the chip."""

    state: float
    peak: float
    cost: Cost | None


PROBES: dict[str, tuple[Candidate, tuple[int, int]]] = {
    "": (Candidate.of({}), (2, 3)),
    "ring": (Candidate.of({"context": 2}), (4, 6)),
    "tensor": (Candidate.of({"tensor": 2}), (2, 3)),
    "tensor_sequence": (Candidate.of({"tensor": 2}, rules="fsdp_tensor_sequence"), (2, 3)),
    STAGE: (Candidate.of({STAGE: 2}, microbatches=2), (4, 6)),
}
"""What a sketch scales from: a layout of one device or two, and rows of the global batch, of which each call on a device has two
and three. (Of one row the loss may have a single chunk, which adds nothing up: the second would seem to need that besides.) A ring's
softmax goes through memory, and it multiplies what a causal mask drops."""


def probes_of(candidate: Candidate) -> list[str]:
    """Which of `PROBES` a layout is sketched from."""
    mesh, found = candidate.mesh, [""]
    if mesh.get("context", 1) > 1 and candidate.attention == "ring":
        found.append("ring")
    if mesh.get("tensor", 1) > 1:
        found.append("tensor_sequence" if candidate.rules.endswith("tensor_sequence") else "tensor")
    return [*found, STAGE] if STAGE in mesh else found


class Sketcher:
    """Of one model under one remat policy.

    Args:
        one: its plan on one device of the target's kind with a global batch of one row.
        papers: the same partitioned as `PROBES` says, by their names. One that is not there counts as one device, but for "".
        batch: shapes of the real global batch.
    """

    def __init__(
        self,
        one: Plan,
        papers: Mapping[str, tuple[Partitioned, Partitioned]],
        batch: Any,
        target: Target,
        constants: Constants,
    ):
        self.one, self.batch, self.target, self.constants = one, batch, target, constants
        self.named = {
            **flatten(one.abstract_state.params),
            **flatten(one.abstract_state.model_state.get(FROZEN, {})),
        }
        self.copies = _copies(one)
        self.rates = {
            kind: _Rate.of(kind, *pair, lambda work: rooflines(work, target, constants))
            for kind, pair in papers.items()
        }
        self._carried: dict[Any, Traffic] = {}
        self._stream: float | None = None  # of one row

    def __call__(self, candidate: Candidate) -> Sketch:
        """Raises ShardingError, ConfigError: what `st.plan` would."""
        mesh = self.target.mesh(dcn=None, **candidate.mesh)
        plan = self.arranged(mesh, candidate)
        rows = plan.global_batch // plan.groups
        if plan.pipeline is not None and self._stream is None:
            self._stream = stream_of(plan) / rows
        least = minimum(plan, self._traffic(plan, rows), rows * (self._stream or 0.0))
        sent = [Sent(t.op, t.axes, t.bytes, self._runs(plan, t)) for t in least]
        state = sum(self._state(leaf, mesh) for leaf in plan.leaves.values())
        added = plan.microbatches * _sums(plan)
        busy, saved, made, hosted = self._device(plan, rows)
        weights, gradient = _passing(plan)
        found = cost(
            self.target,
            mesh.shape,
            [Work("f32", 0.0, 2 * (state + added), 1.0)],  # read and written by the update, and by each sum
            sent,
            bubble(plan),
            self.constants,
            "sketched",
            hosted,
            busy,
        )
        return Sketch(state, state + saved + weights + max(made, gradient), found)

    def _device(self, plan: Plan, rows: int) -> tuple[tuple[float, float], float, float, float]:
        """Of one device: seconds of products and of memory in a step; bytes that the rows of one call save, those that they make for a
        moment, and those to the host's memory and back in a step."""
        rates, shape, calls = self.rates, plan.mesh.shape, plan.microbatches
        each = rows / plan.sequence_parts
        one = rates[""].at(each)
        ring = plan.attention == "ring" and shape.get("context", 1) > 1 and "ring" in rates
        found = rates["ring"].at(each) if ring else one
        tensor = shape.get("tensor", 1)
        kind = "tensor_sequence" if plan.sequence_divided else "tensor"
        if tensor > 1 and kind in rates:
            half = rates[kind].at(each)
            # What each of two does beyond its half, each of many does, too.
            whole = np.maximum(0.0, 2 * half - one)
            whole[3:] *= not plan.sequence_divided  # nothing is saved whole
            found = (found - one) / tensor + whole + (half - whole) * 2 / tensor
        elif tensor > 1:
            found = found / tensor
        products, memory, step, saved, made, hosted = found.tolist()
        if plan.pipeline is not None:
            deal, again = plan.pipeline.deal, (4 / 3, 4 / 3)
            if STAGE in rates:
                again = tuple(2 * rates[STAGE].at(each)[:2] / np.maximum(one[:2], 1e-12))
            share = deal.longest * deal.pieces / deal.layers / deal.stages
            products, memory = share * again[0] * products, share * again[1] * memory
            # Inputs of stages are kept, and one stage's own while it runs again.
            saved *= (1 + max(plan.pipeline.schedule.in_flight()) / deal.layers) / deal.stages
        memory = calls * memory + step * tensor / self.target.size
        return (calls * products, memory), saved, made, calls * hosted

    def arranged(self, mesh: AnyMesh, candidate: Candidate) -> Plan:
        """The one-device plan with another layout: everything that follows from shapes and rules, nothing traced."""
        one, rules = self.one, PRESETS[candidate.rules]
        layouts.check_mesh(mesh, rules)
        rows, groups = group_count(self.batch, mesh, rules, candidate.microbatches, None)
        check_sequence(self.batch, mesh, rules)
        check_quant(one.quant, mesh.shape, rules.sequence_axes(mesh))
        calls = groups // math.prod(mesh.shape[a] for a in rules.batch_axes(mesh))
        pipe = as_pipeline(
            one.adapter,
            one.loss_fn,
            candidate.schedule,
            self.named,
            one.abstract_state.model_state,
            mesh,
            rules,
            calls,
        )
        axes: dict[str, Any] = {path: leaf.logical for path, leaf in one.leaves.items()}
        axes, placing = with_layers(pipe, axes, self.named), at_rest(pipe, rules)
        layouts.check_names(self.named, axes, placing, mesh)
        compute = jnp.dtype(PRECISIONS[one.precision])
        wire = jnp.dtype(jnp.float32) if self.target.platform == "cpu" else compute
        leaves = layouts.parameter_leaves(
            self.named,
            axes,
            rules=placing,
            mesh=mesh,
            stacks=one.seen.stacks,
            tables=frozenset(one.seen.lookups),
            dtypes=(compute, wire, jnp.dtype(jnp.float32)),
        )
        lookups = {path: count * rows // groups for path, count in one.seen.lookups.items()}
        return dataclasses.replace(
            one,
            mesh=mesh,
            rules=rules,
            microbatches=calls,
            groups=groups,
            batch=self.batch,
            global_batch=rows,
            leaves=leaves,
            seen=dataclasses.replace(one.seen, lookups=lookups),
            attention=candidate.attention,
            pipeline=pipe,
        )

    def _traffic(self, plan: Plan, rows: int) -> Traffic:
        """Of one row, traced once for each way in which the automatic axes divide parameters; then scaled."""
        free = {a for a in plan.mesh.shape if a not in plan.manual_axes}
        key = plan.rules.name, bool({a for a in free if plan.mesh.shape[a] > 1})
        if key not in self._carried:
            one = dataclasses.replace(plan, batch=self.one.batch, global_batch=1, groups=1)
            self._carried[key] = traffic_of(one)
        edges = self._carried[key].edges
        return Traffic(
            tuple(dataclasses.replace(e, bytes=e.bytes * rows, scales=e.scales * rows) for e in edges)
        )

    def _runs(self, plan: Plan, term: Term) -> float:
        """Collectives of a term, for their latency: of each leaf once a step, or of each layer and microbatch."""
        stacked = [leaf.shape[0] for path, leaf in plan.leaves.items() if layouts.in_stack(path, plan.stacks)]
        held = term.what in ("updates", "weights of the step", "layers to their stages and back")
        if held or (term.what.startswith("gradients") and term.op == "all-reduce"):
            return len(plan.leaves)
        return 2.0 * max(stacked, default=1) * plan.microbatches

    def _state(self, leaf: layouts.Leaf, mesh: AnyMesh) -> float:
        """Parameter, its copies in the optimizer, and its gradient."""
        size = math.prod(leaf.shape)
        parts = lambda spec: math.prod(mesh.shape[a] for a in spec_axes(spec))  # noqa: E731
        held = size * leaf.dtype.itemsize / parts(leaf.spec)
        copies = self.copies.get(leaf.path, 0.0) / parts(leaf.optimizer)
        return held + copies + size * 4 / parts(leaf.gradient)


def _sums(plan: Plan) -> float:
    """Bytes of the gradients that microbatches add up: whole where they are reduced once a step. What stages add up is in what
    two of them showed."""
    if plan.microbatches == 1 or plan.pipeline is not None:
        return 0.0
    held, found = plan.held_leaves, 0.0
    for path, leaf in plan.leaves.items():
        axes = () if path in held else leaf.shard.axes
        found += 4 * whole_size(plan, leaf) / math.prod(plan.mesh.shape[a] for a in axes)
    return found


def _passing(plan: Plan) -> tuple[float, float]:
    """Bytes of weights that are gathered, and of gradients that are not reduced yet: all that are held for a step, and of the others
    the most at once, the weights of a layer or a parameter outside, and the largest gradient of one."""
    held, kept, gradient = plan.held_leaves, 0.0, 0.0
    weights: dict[str, float] = {}
    for path, leaf in plan.leaves.items():
        size = whole_size(plan, leaf)
        wire, back = (size * jnp.dtype(d).itemsize for d in (leaf.shard.wire, leaf.shard.reduce))
        if path in held:
            kept += wire + back
        elif leaf.shard.dim is not None and path not in plan.tables:
            stack = next((s for s in plan.stacks if layouts.in_stack(path, frozenset([s]))), None)
            key, layers = (path, 1) if stack is None else (stack, leaf.shape[0])
            weights[key] = weights.get(key, 0.0) + wire / layers
            gradient = max(gradient, back / layers)
    return kept + max(weights.values(), default=0.0), gradient


@dataclasses.dataclass(frozen=True, eq=False)
class _Rate:
    """What one device does in a call of the loss, by its rows.

    `products`, `memory`: [operations, 2], seconds of each without rows, and for each row. `step`: seconds of memory that a step
    takes whatever its rows: norms of gradients. `kept`: bytes that a row saves, makes, and sends to the host and back.
    """

    products: np.ndarray
    memory: np.ndarray
    step: float
    kept: np.ndarray

    @classmethod
    def of(
        cls,
        kind: str,
        first: Partitioned,
        second: Partitioned,
        timed: Callable[[Sequence[Work]], Iterable[tuple[float, float]]],
    ) -> _Rate:
        """From two rows a device and three; of stages, in each of two calls."""
        calls = 2 if kind == STAGE else 1
        less, more = (np.array([*timed(p.work[1:])]).reshape(-1, 2) / calls for p in (first, second))
        dtypes = [[w.dtype for w in p.work] for p in (first, second)]
        if dtypes[0] != dtypes[1]:  # another program: all by its rows
            less = more * 2 / 3
        row = more - less
        base = np.maximum(0.0, less - 2 * row)
        fixed = np.array([kind != STAGE and not w.flops and not w.looped for w in second.work[1:]])
        fixed &= row[:, 1] == 0
        step = float(base[fixed, 1].sum())
        row, base = row[~fixed], base[~fixed]
        saved, hosted = second.live.saved - first.live.saved, second.hosted - first.hosted
        made = max(0.0, second.temporaries - first.temporaries - saved)
        kept = np.array([saved, made, hosted])
        return cls(np.stack([base[:, 0], row[:, 0]], 1), np.stack([base[:, 1], row[:, 1]], 1), step, kept)

    def at(self, rows: float) -> np.ndarray:
        """Seconds of products, of memory beyond them, of a step's own; bytes saved, made, hosted."""
        products, memory = (each @ np.array([1.0, rows]) for each in (self.products, self.memory))
        return np.array(
            [products.sum(), np.maximum(0.0, memory - products).sum(), self.step, *(rows * self.kept)]
        )


def _copies(plan: Plan) -> Mapping[str, float]:
    """Path of a parameter -> bytes of the optimizer's copies of it, undivided."""
    found: dict[str, float] = {}
    for path, leaf in flatten(plan.abstract_state.opt_state).items():
        owner = next((p for p in plan.leaves if f"/{path}".endswith(f"/{p}")), None)
        if owner is not None and tuple(leaf.shape) == plan.leaves[owner].shape:
            found[owner] = found.get(owner, 0.0) + math.prod(leaf.shape) * leaf.dtype.itemsize
    return found
