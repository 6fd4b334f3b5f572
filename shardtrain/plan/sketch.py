"""A layout's cost from arithmetic alone, once the model has been partitioned on one device with two row counts: a few
milliseconds.

What is exact: bytes of state, from specs; bytes sent, from `plan/minimum.py`; whether it divides at all. What is scaled from what
one more row added: products, memory traffic and activations. It orders layouts so that few have to be partitioned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from shardtrain.mesh import Target
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.presets import PRESETS
from shardtrain.parallel.quantised import check_quant
from shardtrain.plan import layout as layouts
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.cost import Constants, Cost, Sent, cost, waits_for_memory
from shardtrain.plan.forecast import bubble
from shardtrain.plan.given import check_sequence, group_count
from shardtrain.plan.minimum import Term, minimum, traffic_of
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


class Sketcher:
    """Of one model under one remat policy.

    Args:
        one: its plan on one device of the target's kind with a global batch of one row.
        papers: the same with some rows, and with one more, partitioned.
        batch: shapes of the real global batch.
        ring: papers as these, of two devices that divide the sequence in a ring: its softmax goes through memory, and it
            multiplies what a causal mask drops. Without them a ring counts as attention of one device.
        inputs_alone: the policy saves nothing but inputs of layers, here or on the host. Under tensor it saves as much again:
            what attention sums over devices.
    """

    def __init__(
        self,
        one: Plan,
        papers: tuple[Partitioned, Partitioned],
        batch: Any,
        target: Target,
        constants: Constants,
        ring: tuple[Partitioned, Partitioned] | None = None,
        inputs_alone: bool = False,
    ):
        self.one, self.batch, self.target, self.constants = one, batch, target, constants
        self.named = {
            **flatten(one.abstract_state.params),
            **flatten(one.abstract_state.model_state.get(FROZEN, {})),
        }
        self.copies = _copies(one)
        first, second = papers
        self.saved = second.live.saved - first.live.saved
        self.hosted = second.hosted - first.hosted
        self.summed = self.saved + self.hosted / 2 if inputs_alone else 0.0
        self.made = max(0.0, second.temporaries - first.temporaries - self.saved)
        waits = lambda w: waits_for_memory(w, target, constants)  # noqa: E731
        self.row = self.row_in_ring = _difference(second.work, first.work, waits)
        if ring is not None:
            each = _difference(ring[1].work, ring[0].work, waits)
            self.row_in_ring = [dataclasses.replace(w, times=2 * w.times) for w in each]
        self._carried: dict[Any, Traffic] = {}

    def __call__(self, candidate: Candidate) -> Sketch:
        """Raises ShardingError, ConfigError: what `st.plan` would."""
        mesh = self.target.mesh(dcn=None, **candidate.mesh)
        plan = self.arranged(mesh, candidate)
        rows = plan.global_batch // plan.groups
        sent = [
            Sent(t.op, t.axes, t.bytes, self._runs(plan, t)) for t in minimum(plan, self._traffic(plan, rows))
        ]
        parts = self.target.size
        stages = 1 if plan.pipeline is None else plan.pipeline.deal.stages
        again = 1.0 if stages == 1 else 4 / 3  # a stage's backward runs its forward again
        state = sum(self._state(leaf, mesh) for leaf in plan.leaves.values())
        share = plan.global_batch * again / parts
        in_ring = candidate.attention == "ring" and mesh.shape.get("context", 1) > 1
        row = self.row_in_ring if in_ring else self.row
        work = [dataclasses.replace(w, times=w.times * share) for w in row]
        work.append(Work("f32", 0.0, 2 * state, 1.0))  # read and written by the update
        found = cost(
            self.target,
            mesh.shape,
            work,
            sent,
            bubble(plan),
            self.constants,
            "sketched",
            self.hosted * plan.global_batch / parts,
        )
        return Sketch(state, state + self._activations(plan, rows, stages), found)

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

    def _activations(self, plan: Plan, rows: int, stages: int) -> float:
        """What one device keeps and makes for its rows; under a pipeline the inputs in flight."""
        tensor = plan.mesh.shape.get("tensor", 1)
        parts = plan.sequence_parts * (tensor if plan.sequence_divided else 1)
        saved = (self.saved + (self.summed if tensor > 1 else 0.0)) * rows / parts / stages
        if (
            stages > 1 and plan.pipeline is not None
        ):  # inputs of stages are kept, and one stage's own while it runs again
            saved *= 1 + max(plan.pipeline.schedule.in_flight()) / plan.pipeline.deal.layers
        return saved + self.made * rows / plan.sequence_parts / tensor


def _difference(more: Sequence[Work], less: Sequence[Work], waits: Callable[[Work], bool]) -> list[Work]:
    """What one has over another, by dtype and by what operations wait for: FLOPs and bytes of all runs together. Memory that an
    operation waits for is not hidden by the products of another."""
    found: dict[tuple[str, bool], list[float]] = {}
    for sign, group in ((1.0, more), (-1.0, less)):
        for w in group:
            flops, moved = found.setdefault((w.dtype, waits(w)), [0.0, 0.0])
            found[w.dtype, waits(w)] = [flops + sign * w.times * w.flops, moved + sign * w.times * w.bytes]
    return [Work(dtype, max(0.0, f), max(0.0, b), 1.0) for (dtype, _), (f, b) in found.items()]


def _copies(plan: Plan) -> Mapping[str, float]:
    """Path of a parameter -> bytes of the optimizer's copies of it, undivided."""
    found: dict[str, float] = {}
    for path, leaf in flatten(plan.abstract_state.opt_state).items():
        owner = next((p for p in plan.leaves if f"/{path}".endswith(f"/{p}")), None)
        if owner is not None and tuple(leaf.shape) == plan.leaves[owner].shape:
            found[owner] = found.get(owner, 0.0) + math.prod(leaf.shape) * leaf.dtype.itemsize
    return found
