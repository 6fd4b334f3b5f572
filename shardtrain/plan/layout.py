"""Where every leaf of the state lives, decided and checked before anything is traced on devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import ShardingError
from shardtrain.mesh.build import AnyMesh
from shardtrain.parallel.fsdp import Shard
from shardtrain.parallel.precision import widen
from shardtrain.plan.model import FROZEN
from shardtrain.sharding.rules import ANY, KEPT, SMALL, Rules, mesh_text, resolve, spec_axes
from shardtrain.train.state import TrainState
from shardtrain.tree import bytes_text, flatten, table


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its spec, and that of the optimizer's copies of it."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    logical: tuple[str | None, ...] | None
    spec: PartitionSpec
    optimizer: PartitionSpec
    shard: Shard

    @property
    def gradient(self) -> PartitionSpec:
        """Spec in which a gradient leaves the reduction: the optimizer's, or where that is less divided over the batch
        axes than the parameter (the audit says so), the parameter's own."""
        return self.optimizer if set(self.shard.axes) <= spec_axes(self.optimizer) else self.spec

    def bytes_per_device(self, mesh: AnyMesh) -> int:
        """Of the parameter itself."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize // _parts(self.spec, mesh)


def _parts(spec: PartitionSpec, mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[a] for a in spec_axes(spec))


def check_mesh(mesh: AnyMesh, rules: Rules) -> None:
    """Every mesh axis of more than one device must carry something under the rules."""
    used = rules.mesh_axes()
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise ShardingError(
                f"mesh axis {axis}={size} carries nothing under rules '{rules.name}'",
                where=f"mesh {mesh_text(mesh)}",
                why=f"the rules use {', '.join(sorted(used))}; the {size} devices along it would repeat the same work",
                fix=f"{axis}=1, or rules that use it (rules.fsdp_tensor uses slice, data, fsdp and tensor)",
            )


def parameter_leaves(
    shapes: Mapping[str, Any],
    axes: Mapping[str, tuple[str | None, ...] | None],
    *,
    rules: Rules,
    mesh: AnyMesh,
    stacks: frozenset[str],
    dtypes: tuple[Any, Any, Any],
    tables: frozenset[str] = frozenset(),
) -> dict[str, Leaf]:
    """Path -> `Leaf`, for parameters trained and frozen.

    `stacks`: path prefixes that the model makes whole itself, layer by layer.
    `dtypes`: compute, wire and reduce dtype. `tables`: spread along their columns, whatever the rules pick.
    """
    manual = rules.manual_axes(mesh)
    leaves = {}
    for path, leaf in shapes.items():
        stacked = in_stack(path, stacks)
        options: dict[str, Any] = dict(pick=rules.pick, stacked=stacked, table=path in tables)
        spec = resolve(path, leaf.shape, axes.get(path), rules.params, mesh, **options)
        held = rules.params if rules.optimizer is None else rules.optimizer
        optimizer = resolve(path, leaf.shape, axes.get(path), held, mesh, **options)
        shard = _shard(path, spec, axes.get(path), manual, dtypes)
        leaves[path] = Leaf(path, leaf.shape, leaf.dtype, axes.get(path), spec, optimizer, shard)
    _check_replicated(leaves, rules, mesh)
    return leaves


def check_names(shapes: Mapping[str, Any], axes: Mapping[str, Any], rules: Rules, mesh: AnyMesh) -> None:
    """Logical axes of parameters against the mesh, before the model is traced: their errors say more than those of what
    the model does with them."""
    for path, leaf in shapes.items():
        resolve(path, leaf.shape, axes.get(path), rules.params, mesh, pick=rules.pick)


def exchanges(leaf: Leaf, rows: int, mesh: AnyMesh) -> bool:
    """Whether handing over the rows that one call looks up sends less than gathering the table would."""
    if leaf.shard.dim != len(leaf.shape) - 1:
        return False
    n = math.prod(mesh.shape[a] for a in leaf.shard.axes)
    wire, back = (jnp.dtype(d).itemsize for d in (leaf.shard.wire, leaf.shard.reduce))
    held = math.prod(leaf.shape) / _parts(leaf.shard.spec, mesh)
    return rows * (2 * leaf.shape[-1] * wire + 4 * n) < held * (wire + back)


def in_stack(path: str, stacks: frozenset[str]) -> bool:
    return any(path.startswith(f"{prefix}/") for prefix in stacks)


def _shard(
    path: str,
    spec: PartitionSpec,
    logical: tuple[str | None, ...] | None,
    manual: tuple[str, ...],
    dtypes: tuple[Any, Any, Any],
) -> Shard:
    by_hand = {d: tuple(a for a in _names(dim) if a in manual) for d, dim in enumerate(spec)}
    by_hand = {d: axes for d, axes in by_hand.items() if axes}
    kept = {d: axes for d, axes in by_hand.items() if logical is not None and logical[d] in KEPT}
    gathered = {d: axes for d, axes in by_hand.items() if d not in kept}
    if len(gathered) > 1 or any(len(_names(spec[d])) != len(axes) for d, axes in by_hand.items()):
        raise ShardingError(
            f"{spec} mixes the axes {manual} with others on one dim, or gathers along two dims",
            where=path,
            fix="give the batch axes (fsdp) one dim of their own",
        )
    dim, axes = next(iter(gathered.items()), (None, ()))
    automatic = PartitionSpec(*[None if d in by_hand else entry for d, entry in enumerate(spec)])
    return Shard(dim, axes, automatic, *dtypes, kept=tuple(kept.items()))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_replicated(leaves: Mapping[str, Leaf], rules: Rules, mesh: AnyMesh) -> None:
    wanted = {a for axes in rules.params.values() for a in axes if mesh.shape.get(a, 1) > 1}
    used = {a for leaf in leaves.values() for a in spec_axes(leaf.spec)}
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    for axis in sorted(wanted - used):
        if total < SMALL and axis in rules.manual_axes(mesh):
            continue  # a model too small to be worth spreading
        biggest = max(leaves.values(), key=lambda leaf: math.prod(leaf.shape))
        raise ShardingError(
            f"mesh axis {axis}={mesh.shape[axis]} shards no parameter under rules '{rules.name}'",
            where=f"mesh {mesh_text(mesh)}",
            why=f"the largest, {biggest.path} {biggest.shape}, has logical axes {biggest.logical}",
            fix="logical axes: st.logical in the model or st.annotate by path; or rules.infer over fsdp",
        )
    spread = [a for a in rules.params.get(ANY, ()) if mesh.shape.get(a, 1) > 1]
    for leaf in leaves.values():
        size = math.prod(leaf.shape)
        if size < max(SMALL, total // 100) or spec_axes(leaf.spec):
            continue
        if not wanted or (leaf.logical is not None and not spread):
            continue  # its logical axes say so
        axis = (spread or sorted(wanted))[0]
        raise ShardingError(
            f"{bytes_text(size * 4)} would be replicated on all {mesh.size} devices although {mesh_text(mesh)} is there",
            where=leaf.path,
            why=f"shape {leaf.shape}, logical axes {leaf.logical}: no free dim divides by {axis}={mesh.shape[axis]}",
            fix=f"a dim that {mesh.shape[axis]} divides, or logical axes for it (st.annotate)",
        )


def optimizer_specs(abstract: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Specs for a tree of optimizer state: copies of a parameter as the rules say, the rest whole."""

    def spec(path: str, leaf: Any) -> PartitionSpec:
        parts = path.split("/")
        for start in range(len(parts)):
            found = leaves.get("/".join(parts[start:]))
            if found is not None:
                # Factored or scalar statistics of a parameter are small: whole.
                return found.optimizer if found.shape == tuple(leaf.shape) else PartitionSpec()
        return PartitionSpec()

    names = flatten(abstract)
    return jax.tree.unflatten(jax.tree.structure(abstract), [spec(p, leaf) for p, leaf in names.items()])


def abstract_state(
    params: Any,
    model_state: Any,
    optimizer: Any,
    leaves: Mapping[str, Leaf],
    mesh: AnyMesh,
    grad_state: Any,
) -> TrainState:
    """Shapes and shardings of everything that a run keeps; allocates nothing."""
    whole = PartitionSpec()
    by_path = lambda tree: jax.tree.unflatten(  # noqa: E731
        jax.tree.structure(tree), [leaves[p].spec if p in leaves else whole for p in flatten(tree)]
    )
    opt_state = jax.eval_shape(lambda p: optimizer.init(jax.tree.map(widen, p)), params)
    specs = TrainState.of(
        step=whole,
        params=by_path(params),
        model_state={
            k: by_path(v) if k == FROZEN else jax.tree.map(lambda _: whole, v) for k, v in model_state.items()
        },
        opt_state=optimizer_specs(opt_state, leaves),
        grad_state=jax.tree.map(lambda _: whole, grad_state),
        key=whole,
        cursor=whole,
    )
    shapes = TrainState.of(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        grad_state=grad_state,
        key=jax.ShapeDtypeStruct(jax.random.key_data(jax.random.key(0)).shape, jnp.uint32),
        cursor=jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    return with_sharding(shapes, specs, mesh)


def with_sharding(abstract: Any, specs: Any, mesh: AnyMesh) -> Any:
    """The abstract tree with a `NamedSharding` on every leaf."""
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        abstract,
        specs,
    )


def report(leaves: Mapping[str, Leaf], mesh: AnyMesh, rules: Rules, state_bytes: int) -> str:
    """A table: path, shape, logical axes, spec, bytes per device."""
    rows = [
        (
            leaf.path,
            "x".join(map(str, leaf.shape)) or "scalar",
            "-" if leaf.logical is None else " ".join(str(a) if a else "." for a in leaf.logical),
            spec_text(leaf.spec),
            bytes_text(leaf.bytes_per_device(mesh)),
        )
        for leaf in leaves.values()
    ]
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    return "\n".join(
        [
            f"mesh {mesh_text(mesh)} ({mesh.size} devices), rules {rules.name}",
            table(("parameter", "shape", "logical axes", "spec", "per device"), rows),
            f"{count:,} parameters; state {bytes_text(state_bytes)} per device",
        ]
    )


def placement(leaves: Mapping[str, Leaf], mesh: AnyMesh) -> tuple[dict[str, Any], ...]:
    """The same as values: where each parameter lives, its gradient, and the optimizer's copies of it."""
    return tuple(
        {
            "path": leaf.path,
            "shape": list(leaf.shape),
            "dtype": str(jnp.dtype(leaf.dtype)),
            "logical": None if leaf.logical is None else list(leaf.logical),
            "spec": spec_text(leaf.spec),
            "gradient": spec_text(leaf.gradient),
            "optimizer": spec_text(leaf.optimizer),
            "bytes": leaf.bytes_per_device(mesh),
        }
        for leaf in leaves.values()
    )


def spec_text(spec: PartitionSpec) -> str:
    """`P(None, 'fsdp')` without the noise: `. fsdp`."""
    return " ".join("+".join(_names(dim)) or "." for dim in spec) or "whole"
