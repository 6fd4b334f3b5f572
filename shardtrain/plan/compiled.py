"""Compiled programs over a plan's shardings, called with flat leaves."""

from __future__ import annotations

import contextlib
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import DataError, MeshError
from shardtrain.mesh import Target, chip_of, device_of
from shardtrain.plan import aot, hlo
from shardtrain.plan.lines import naming_lines, without_callers
from shardtrain.plan.options import compile_with, options_for
from shardtrain.train.state import TrainState
from shardtrain.tree import bytes_text, flatten, table

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan


def use_compilation_cache() -> None:
    """Point JAX's persistent compilation cache at the user's cache folder, unless it is set already."""
    if jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "shardtrain" / "xla"))


@contextlib.contextmanager
def _lines_in_key() -> Iterator[None]:
    """While a program is compiled that is going to be read: without its lines in the key it comes back from the cache with
    those that the code had when it was compiled, and a finding names the wrong one."""
    before = jax.config.jax_compilation_cache_include_metadata_in_key
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def _taker(batch: Any) -> Callable[[Any], Any]:
    """Batch -> its leaves. By name for a flat dict: walking the tree is half of what our call costs on the host."""
    if type(batch) is not dict or not jax.tree_util.all_leaves(batch.values()):
        return jax.tree.leaves
    first, *rest = sorted(batch)
    return operator.itemgetter(first, *rest) if rest else lambda batch: (batch[first],)


def traced(
    plan: Plan,
    function: Callable[[TrainState, Any], tuple[Any, ...]],
    out_shardings: Any,
    *,
    donate: bool,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """A function of `(state, batch)` as a jitted function of their leaves, and its trace over the plan's shardings."""
    state, batch = plan.abstract_state, plan.batch
    count, (batch_leaves, batch_structure) = len(state.leaves), jax.tree.flatten(batch)

    def flat(*leaves: Any) -> tuple[Any, ...]:
        given = TrainState(leaves[:count], state.structure)
        return function(given, jax.tree.unflatten(batch_structure, leaves[count:]))

    fields = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=plan.field_sharding(x.ndim)) for x in batch_leaves
    ]
    made: Any = jax.jit(
        flat,
        in_shardings=tuple(x.sharding for x in (*state.leaves, *fields)),
        out_shardings=out_shardings,
        donate_argnums=tuple(range(count)) if donate else (),
        compiler_options=dict(options) if options else None,
    )
    with naming_lines():
        return made, made.trace(*state.leaves, *fields)


def lower_step(plan: Plan, platform: str) -> Any:
    """The training step of a plan, lowered for `tpu`, `cuda` or `cpu`; its mesh may be of devices that are not here."""
    shardings = tuple(leaf.sharding for leaf in plan.abstract_state.leaves)

    def step(state: TrainState, batch: Any) -> Any:
        new, metrics = plan.step(state, batch)
        return new.leaves, metrics

    outputs = shardings, NamedSharding(plan.mesh, PartitionSpec())
    return traced(plan, step, outputs, donate=True)[1].lower(lowering_platforms=(platform,))


class Compiled:
    """A function of `(state, batch)`, compiled. The state may be donated; its shardings are kept.

    `target`: what it was compiled for; None: the devices of the plan's mesh, on which it can be called.
    `changed`: leaves of the state that it returns in another shape or dtype.
    `trains`: whether it is the plan's own training step, for which a minimum of bytes is known.
    """

    trains = False

    def __init__(
        self,
        plan: Plan,
        function: Callable[..., Any],
        *,
        donate: bool,
        target: Target | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.plan, self.target, self.donated = plan, target, donate
        self._structure = plan.abstract_state.structure
        self._batch_count = len(jax.tree.leaves(plan.batch))
        self._take = _taker(plan.batch)
        shardings = tuple(leaf.sharding for leaf in plan.abstract_state.leaves)
        self._out: Any = None
        self.changed: tuple[str, ...] = ()
        self._program: hlo.Program | None = None

        def outputs(state: TrainState, batch: Any) -> tuple[Any, ...]:
            return self._outputs(function(state, batch))

        def jitted(wanted: Mapping[str, Any] | None) -> tuple[Any, Any]:
            return traced(plan, outputs, self._out_shardings(shardings), donate=donate, options=wanted)

        def here(wanted: Mapping[str, Any]) -> tuple[Any, Any, Any]:
            made, trace = jitted(wanted)
            lowered = trace.lower()
            without_callers(lowered.compiler_ir("stablehlo"), __file__)
            with _lines_in_key():
                return made, lowered, lowered.compile()

        self._jitted: Any
        self.executable: Any
        if target is None:
            platform = "cuda" if self.platform == "gpu" else self.platform
            found = chip_of(device_of(plan.mesh))
            chip = found.name if found else ""
            wanted = options_for(platform, options, chip=chip)
            self._jitted, self.lowered, self.executable = compile_with(here, wanted, platform, chip)
            return
        self.lowered = jitted(None)[1].lower(lowering_platforms=(target.platform,))
        module = without_callers(self.lowered.compiler_ir("stablehlo"), __file__)
        self.executable = aot.compile_for(module, target, plan.mesh.shape, options)
        self._jitted = self._absent

    def _absent(self, *_: Any) -> Any:
        raise MeshError(
            "compiled to be read, not run",
            where=f"target {self.target}",
            fix="plan.compile() on a mesh of devices that are here",
        )

    def _out_shardings(self, state: tuple[Any, ...]) -> Any:
        """Shardings of the outputs, where they are known before tracing."""
        return None

    def _outputs(self, result: Any) -> Any:
        """What the compiled function returns; plain tuples, which JAX builds without Python."""
        result = jax.tree.map(self._keep, result, is_leaf=lambda x: isinstance(x, TrainState))
        out, self._out = jax.tree.flatten(result)
        return tuple(out)

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, TrainState):
            return value
        self._compare(value.leaves)
        pinned = [
            jax.lax.with_sharding_constraint(x, leaf.sharding)
            for x, leaf in zip(value.leaves, self.plan.abstract_state.leaves, strict=True)
        ]
        return TrainState(tuple(pinned), value.structure)

    def _compare(self, leaves: Any) -> None:
        old = flatten(self.plan.abstract_state)
        pairs = zip(old.items(), leaves, strict=True)
        self.changed = tuple(p for (p, a), b in pairs if (a.shape, a.dtype) != (b.shape, b.dtype))

    def _flat(self, state: TrainState, batch: Any) -> Any:
        try:
            leaves = self._take(batch)
        except (KeyError, TypeError):
            leaves = ()
        if len(leaves) != self._batch_count:
            raise DataError(
                f"{len(jax.tree.leaves(batch))} arrays, the plan's batch has {self._batch_count}: "
                f"{', '.join(flatten(self.plan.batch))}",
                where="batch",
                fix="step(state, plan.put(batch))",
            )
        return self._jitted(*state.leaves, *leaves)

    def __call__(self, state: TrainState, batch: Any) -> Any:
        return jax.tree.unflatten(self._out, self._flat(state, batch))

    def memory(self) -> Memory:
        """Bytes per device of the compiled program."""
        if self.target is not None:
            return Memory(self.executable.memory)
        analysis = self.executable.memory_analysis()
        names = [*_FIELDS.values(), "host_temp_size_in_bytes"]
        names += ["peak_memory_in_bytes", "total_allocation_bytes"] if self.platform == "tpu" else []
        return Memory({name: getattr(analysis, name, 0) for name in names})

    def program(self) -> hlo.Program:
        """The compiled program, read: collectives, FLOPs, loops, source lines."""
        if self._program is None:
            self._program = hlo.read(self.hlo(), self.plan.mesh)
        return self._program

    def collectives(self) -> hlo.Collectives:
        """Every collective of the compiled program, by mesh axis."""
        return self.program().collectives

    def hlo(self) -> str:
        """The optimized HLO text."""
        return self.executable.as_text() or ""

    @property
    def source(self) -> str:
        """Whose program the numbers were counted in."""
        if self.target is not None:
            return self.executable.source
        return f"counted in the program compiled by jaxlib {jax.lib.__version__} for {self.platform}"

    @property
    def platform(self) -> str:
        """`cpu`, `tpu` or `gpu`: whose compiler made the program."""
        return device_of(self.plan.mesh).platform

    def compiler_said(self) -> str:
        """What the compiler printed while it compiled for a target; empty for the devices that are here."""
        return self.executable.stderr if self.target is not None else ""

    def source_of(self, path: str) -> str:
        """`file.py:123`, where the model first uses a parameter."""
        return self.plan.seen.lines.get(path, "")

    def source_of_operation(self, op_name: str) -> str:
        """`file.py:123` of an operation by its name in the program."""
        program = self.program()
        named = (
            i for body in program.computations.values() for i in body if op_name and i.op_name == op_name
        )
        return next((i.source for i in named if i.source), "")


class Step(Compiled):
    """The training step. Never waits for the device; the metrics are device values."""

    trains = True

    def _out_shardings(self, state: tuple[Any, ...]) -> Any:
        return state, NamedSharding(self.plan.mesh, PartitionSpec())

    def _outputs(self, result: tuple[TrainState, dict[str, jax.Array]]) -> Any:
        state, metrics = result
        assert state.structure == self._structure, "the step changes the structure of the state"
        self._compare(state.leaves)
        return state.leaves, metrics

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        leaves, metrics = self._flat(state, batch)
        return TrainState(leaves, self._structure), metrics


class EvalStep(Compiled):
    """`evaluate(state, batch) -> {"loss_sum", "loss_weight", ...}` on devices."""

    def __init__(self, plan: Plan, function: Callable[..., Any]):
        super().__init__(plan, function, donate=False)


_FIELDS = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
}


class Memory(dict[str, int]):
    """Bytes per device: `arguments`, `outputs`, `aliased` (donated), `temporaries`, `peak`; `host`: temporaries in the host's.

    Peak is what the compiler says on TPU; elsewhere arguments + outputs - aliased + temporaries. Of a program with values in the
    host's memory the TPU compiler says the peak of either memory, whichever is larger: there it is what the device allocates.
    """

    def __init__(self, sizes: Mapping[str, int]):
        parts = {name: int(sizes[field]) for name, field in _FIELDS.items()}
        total = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
        host = int(sizes.get("host_temp_size_in_bytes", 0))
        said = int(sizes.get("total_allocation_bytes" if host else "peak_memory_in_bytes", 0))
        super().__init__(**parts, peak=said or total, **({"host": host} if host else {}))

    def __str__(self) -> str:
        return table(("memory", "per device"), [(k, bytes_text(v)) for k, v in self.items()])
