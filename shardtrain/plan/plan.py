"""The Plan: abstract state, its shardings, the batch sharding, and the pure step."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.mesh import Target
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.pipeline import Pipeline
from shardtrain.parallel.precision import PRECISIONS, widen
from shardtrain.plan import aot, batches
from shardtrain.plan import layout as layouts
from shardtrain.plan.compiled import Compiled, EvalStep, Step, use_compilation_cache
from shardtrain.plan.given import (
    Seen,
    group_loss,
)
from shardtrain.plan.model import FROZEN, VARIABLES, Model, initial
from shardtrain.plan.staged import part_functions
from shardtrain.sharding import Rules, context
from shardtrain.sharding.rules import mesh_text
from shardtrain.train.guard import Guard, memory
from shardtrain.train.parts import StepParts, field_spec
from shardtrain.train.state import TrainState, cursor_words
from shardtrain.train.step import choices, evaluate_step, gradients, train_step
from shardtrain.tree import flatten

log = logging.getLogger("shardtrain")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """See `plan`. Trainer, checkpoints and reports ask this object where arrays live.

    `abstract_state`: a `TrainState` of `ShapeDtypeStruct` with shardings. `batch`: global shapes.
    `leaves`: path of a parameter -> shape, logical axes, spec. `seen`: what the first trace told.
    `groups`, `microbatches`, `quant`: see `plan`. `kept`: dtype of parameters at rest, None: the model's. `pipeline`: where the
    mesh has stages. `guard`: None looks at no step. `again`: the same plan on another mesh.
    """

    adapter: Model
    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    mesh: AnyMesh
    rules: Rules
    microbatches: int
    groups: int
    precision: str
    quant: str | None
    kept: Any
    batch: Any
    global_batch: int
    leaves: Mapping[str, layouts.Leaf]
    seen: Seen
    learning_rate: Any
    attention: str
    pipeline: Pipeline | None
    guard: Guard | None
    abstract_state: TrainState
    again: Callable[[Any], Plan]

    # --- what it means for bytes ------------------------------------------------------------------

    @property
    def compute(self) -> Any:
        """Dtype of parameters and activations inside the loss."""
        return PRECISIONS[self.precision]

    @property
    def group_batch(self) -> Any:
        """Shapes that one call of the loss sees."""
        rows = self.global_batch // self.groups
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((rows, *s.shape[1:]), s.dtype), self.batch)

    @property
    def group_loss(self) -> Callable[..., Any]:
        """The loss of one group as a pure function, see `plan.given`."""
        return group_loss(self.adapter, self.loss_fn, self.global_batch // self.groups, train=True)

    @property
    def regathers(self) -> bool:
        """Whether a remat of ours around the loss has gathered weights gathered again for the backward.

        It would override the model's own. A scan that gathers layer by layer needs one or the other: else it would
        keep every layer's weights.
        """
        sharded = any(leaf.shard.dim is not None for leaf in self.leaves.values())
        return sharded and not (self.held or self.seen.own_remat)

    @property
    def stacks(self) -> frozenset[str]:
        """Path prefixes that the model makes whole itself, layer by layer."""
        return self.seen.stacks

    @property
    def held(self) -> bool:
        """Whether weights are gathered once for the whole step, see `Rules.hold`."""
        return self.rules.hold and any(leaf.shard.dim is not None for leaf in self.leaves.values())

    @property
    def held_leaves(self) -> frozenset[str]:
        """Parameters that are gathered once for the whole step and reduced once after it.

        All of them under `Rules.hold`. With microbatches also those outside the model's own stacks: they are whole
        during every call anyway, and gathering them again for each would send them again.
        """
        sharded = {path for path, leaf in self.leaves.items() if leaf.shard.dim is not None}
        if self.rules.hold:
            return frozenset(sharded)
        if self.microbatches == 1 or self.regathers:
            return frozenset()
        return frozenset(p for p in sharded if not layouts.in_stack(p, self.stacks) and p not in self.tables)

    @property
    def tables(self) -> Mapping[str, int]:
        """Path of a table whose rows are exchanged (`st.lookup`) -> rows looked up per device and step."""
        if self.held:
            return {}
        return {
            path: rows * self.microbatches // self.sequence_parts
            for path, rows in self.seen.lookups.items()
            if self.leaves[path].shard.dim is not None
            and layouts.exchanges(self.leaves[path], rows // self.sequence_parts, self.mesh)
        }

    def is_vector(self, path: str) -> bool:
        """Whether a parameter, or each layer of it, has at most one dim that counts."""
        return len(self.leaves[path].shape) - layouts.in_stack(path, self.stacks) < 2

    @property
    def sequence_divided(self) -> bool:
        """Whether the residual stream is divided along the sequence between blocks."""
        axes = self.rules.activations.get("seq", ())
        return any(self.mesh.shape.get(a, 1) > 1 and a not in self.manual_axes for a in axes)

    # --- state -----------------------------------------------------------------------------------

    def init(self, seed: int = 0) -> TrainState:
        """The state at step 0, every leaf created where it lives; no device or host holds all of it.

        The random bits are those of the bare model at this seed, on every mesh.
        """
        structure = self.abstract_state.structure

        def create(key: jax.Array) -> tuple[Any, ...]:
            params, model_state = initial(self.adapter, key, self.kept)
            state = TrainState.of(
                step=jnp.int32(0),
                params=params,
                model_state=model_state,
                opt_state=self.optimizer.init(jax.tree.map(widen, params)),
                grad_state=memory(self.guard),
                key=jax.random.key_data(jax.random.fold_in(key, 1)),
                cursor=jnp.asarray(cursor_words(0)),
            )
            assert state.structure == structure, "init and the abstract state differ"
            return tuple(state.leaves)

        shardings = tuple(leaf.sharding for leaf in self.abstract_state.leaves)
        return TrainState(jax.jit(create, out_shardings=shardings)(jax.random.key(seed)), structure)

    def model(self, state: TrainState) -> Any:
        """The user's model with the trained parameters, for evaluation: an `nnx.Module`, or a bound
        function for linen modules and pairs. Inside `plan.jit` too."""
        return self.adapter.bind(state.params, state.model_state, None, False)

    # --- batches ---------------------------------------------------------------------------------

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over the batch axes: of a field without a sequence."""
        return NamedSharding(self.mesh, PartitionSpec(self._batch_axes or None))

    def field_sharding(self, ndim: int) -> NamedSharding:
        """Of a batch field: rows over the batch axes, dim 1 over those that divide the sequence."""
        return NamedSharding(self.mesh, field_spec(ndim, self._batch_axes, self.sequence_axes))

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return self.rules.batch_axes(self.mesh)

    @property
    def sequence_axes(self) -> tuple[str, ...]:
        """Mesh axes that divide the sequence inside blocks too (context)."""
        return self.rules.sequence_axes(self.mesh)

    @property
    def sequence_parts(self) -> int:
        """Devices among which one row's sequence is divided."""
        return math.prod(self.mesh.shape[a] for a in self.sequence_axes)

    @property
    def manual_axes(self) -> tuple[str, ...]:
        """Mesh axes that the step holds by hand; gradients are sums over them."""
        return self.rules.manual_axes(self.mesh)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the global batch that this process supplies, ascending."""
        return np.sort(batches.device_rows(self))

    def put(self, batch: Any) -> Any:
        """This process's rows (in the order of `plan.rows`) onto the devices, grouped.

        Raises:
            DataError: fields, shapes or dtypes other than the plan's.
        """
        return batches.put(self, batch, self._put_order)

    @property
    def _put_order(self) -> np.ndarray:
        cached = self.__dict__.get("_order")
        if cached is None:
            held = batches.device_rows(self)
            cached = np.searchsorted(np.sort(held), held)
            object.__setattr__(self, "_order", cached)
        return cached

    @property
    def late_leaves(self) -> frozenset[str]:
        """Parameters that the model makes whole where it uses them (`parallel.fsdp.meet`). A pipeline gathers before its ticks:
        in a branch that only some stages take nothing can be gathered."""
        if self.pipeline is not None:
            return frozenset()
        others = {p for p in self.seen.met if p in self.leaves} - self.held_leaves - self.tables.keys()
        return frozenset(p for p in others if self.leaves[p].shard.dim is not None)

    # --- programs --------------------------------------------------------------------------------

    def _parts(self, *, train: bool, loss_fn: Callable[..., Any] | None = None) -> StepParts:
        manual = frozenset(self.manual_axes)
        if manual:  # axes of one device too: a region that is manual over every axis is the simplest
            manual |= {a for a, n in self.mesh.shape.items() if n == 1}
        held = {path: self.leaves[path].shard for path in self.held_leaves}
        shards = {p: leaf.shard.whole() if p in held else leaf.shard for p, leaf in self.leaves.items()}
        loss_fn, rows = loss_fn or self.loss_fn, self.global_batch // self.groups
        return StepParts(
            mesh=self.mesh,
            layout=context.Layout(
                self.mesh,
                self.rules.activations,
                manual,
                shards,
                frozenset(self.tables),
                sequence=self.sequence_axes,
                attention=self.attention,
                quant=self.quant,
                late=self.late_leaves,
            ),
            batch_axes=self._batch_axes,
            sequence_axes=self.sequence_axes,
            shards=shards,
            held=held,
            reduced={path: leaf.gradient for path, leaf in self.leaves.items()},
            stacks=self.stacks,
            groups=self.groups,
            loss=group_loss(self.adapter, loss_fn, rows, train=train),
            merges=self.adapter.merges,
            regather=train and self.regathers,
            pipeline=self.pipeline,
            functions=part_functions(self.adapter, self.pipeline, loss_fn, rows, train=train),
        )

    def _rate(self, opt_state: Any, step: jax.Array) -> Any:
        if self.learning_rate is not None:
            return self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        try:
            return optax.tree_utils.tree_get(opt_state, "learning_rate")
        except KeyError:
            return None

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """The pure step, to be traced: what `compile` compiles."""
        return train_step(self._parts(train=True), self.optimizer, self._rate, state, batch, self.guard)

    def gradients(self, state: TrainState, batch: Any) -> tuple[Any, jax.Array]:
        """Gradients of the loss of one global batch, before any clipping, and the loss; to be traced."""
        grads, scalars, _, _ = gradients(
            self._parts(train=True), state.params, state.model_state, state.key, state.step, batch
        )
        return jax.tree.map(lambda g: g / scalars[1], grads), scalars[0] / scalars[1]

    def choices(self, state: TrainState, batch: Any) -> jax.Array | None:
        """int32 [rows, tokens, ...]: what routers decide for each token in this step, rows by group; to be traced. None of a
        model without them, and of a loss that does not say (`Stages.choices`)."""
        of_loss = getattr(self.loss_fn, "choices", None)
        if of_loss is None:
            return None
        parts, given = self._parts(train=True, loss_fn=of_loss), self.abstract_state.model_state
        rest = given.get(FROZEN, {}), given.get(VARIABLES, {}), jax.random.key(0), self.group_batch
        told = jax.eval_shape(parts.loss, self.abstract_state.params, *rest)[0].metrics
        return batches.natural(self, choices(parts, state, batch)) if told else None

    def compile(
        self,
        *,
        donate: bool = True,
        target: Target | str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Step:
        """The compiled training step: `state, metrics = step(state, plan.put(batch))`.

        Args:
            donate: reuse the memory of the old state for the new one.
            target: hardware that need not be here, such as `"v5e:2x4"`: the step is compiled by its compiler in
                another process and can be read (memory, collectives, audit), not called. The mesh keeps its
                axis sizes, whatever devices the plan was made on.
            options: XLA compiler options, over those that `plan.options` starts from.

        Uses JAX's persistent compilation cache (`JAX_COMPILATION_CACHE_DIR`, else the user's cache folder); for
        a target, a cache of our own by content.

        Raises:
            ConfigError: the target's compiler is not installed.
            MeshError: the target has another number of devices than the mesh.
            CompileError: it does not fit the target, or its compiler failed.
        """
        if target is None:
            use_compilation_cache()
            return Step(self, self.step, donate=donate, options=options)
        target = Target(target)
        there = self.on(aot.mesh_for(target, self.mesh.shape))
        return Step(there, there.step, donate=donate, target=target, options=options)

    def on(self, mesh: AnyMesh) -> Plan:
        """The same plan on another mesh: same model, loss, optimizer, rules, groups where they divide."""
        return self if mesh == self.mesh else self.again(mesh)

    def compile_eval(self, loss_fn: Callable[..., Any] | None = None) -> EvalStep:
        """Sums of loss and weight over one batch, without dropout: `evaluate(state, plan.put(batch))`."""
        use_compilation_cache()
        return EvalStep(
            self, lambda state, batch: evaluate_step(self._parts(train=False, loss_fn=loss_fn), state, batch)
        )

    def jit(
        self,
        function: Callable[..., Any],
        *,
        donate: bool = False,
        target: Target | str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compile any function of `(state, batch)` over the same shardings: generation, distillation, RL.

        Inside, arrays are global; `plan.model(state)` is the model, and `st.constrain` works. Returned
        `TrainState`s keep the plan's shardings. `donate`, `target` and `options` as in `compile`; a function of one
        plan that is compiled for a target must not close over arrays on the devices that are here.
        """
        use_compilation_cache()
        there = self if target is None else self.on(aot.mesh_for(Target(target), self.mesh.shape))
        layout = context.Layout(there.mesh, self.rules.activations)

        def run(state: TrainState, batch: Any) -> Any:
            with context.use(layout):
                return function(state, batches.natural(there, batch))

        return Compiled(
            there, run, donate=donate, target=None if target is None else Target(target), options=options
        )

    # --- reports ---------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """Of the model, trained and frozen."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of the state on one device."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in self.abstract_state.leaves
        )

    def describe(self) -> dict[str, Any]:
        """What a checkpoint or a report keeps of the plan, as JSON."""
        import flax

        tree = flatten(self.abstract_state)
        return {
            "mesh": dict(self.mesh.shape),
            "rules": self.rules.name,
            "groups": self.groups,
            "microbatches": self.microbatches,
            "global_batch": self.global_batch,
            "precision": self.precision,
            **({"quant": self.quant} if self.quant else {}),
            "parameters": self.parameter_count,
            "state_bytes_per_device": self.state_bytes,
            "versions": {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
            "tree": {
                path: {
                    "shape": list(leaf.shape),
                    "dtype": str(leaf.dtype),
                    "spec": layouts.spec_text(leaf.sharding.spec),
                }
                for path, leaf in tree.items()
            },
        }

    def __str__(self) -> str:
        return layouts.report(self.leaves, self.mesh, self.rules, self.state_bytes)

    def __repr__(self) -> str:
        return (
            f"Plan({self.parameter_count:,} parameters, mesh {mesh_text(self.mesh)}, rules {self.rules.name})"
        )
