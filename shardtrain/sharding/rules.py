"""Rules: what a logical axis becomes on the mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from jax.sharding import PartitionSpec

from shardtrain.errors import ShardingError, suggestion
from shardtrain.mesh.build import AnyMesh

KEPT = (
    "expert",
    "layers",
)  # logical axes whose parts never meet: each device runs its own experts, or layers
ANY = "*"  # in a map of parameters: whichever one dim of the leaf divides
SMALL = 4096  # elements; smaller leaves are not spread by "*", their gather would cost more than they hold

MeshAxes = str | Sequence[str] | None


def _axes(value: MeshAxes) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _freeze(rules: Mapping[str, MeshAxes]) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({name: _axes(value) for name, value in rules.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """Ordered maps from logical axes to mesh axes, as a value.

    Args:
        name: how reports call it.
        params: for the dims of parameters. The key `"*"` spreads a leaf over mesh axes along one of
            its free dims that divides (fsdp); leaves under 4,096 elements stay whole.
        activations: for `constrain`, and `"batch"` for the rows of the batch.
        optimizer: for the optimizer's copies of a parameter; default: as the parameter.
        pick: which dim `"*"` takes: the leading one that divides, or the largest.
        hold: parameters that the batch axes divide are gathered once a step and kept whole until its
            gradients are reduced, not gathered where each layer uses them.

    Mesh axes that the mesh lacks or that have size 1 have no effect, so one set of rules serves
    many meshes.
    """

    name: str
    params: Mapping[str, Any]
    activations: Mapping[str, Any]
    optimizer: Mapping[str, Any] | None = None
    pick: Literal["leading", "largest"] = "leading"
    hold: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", _freeze(self.params))
        object.__setattr__(self, "activations", _freeze(self.activations))
        if self.optimizer is not None:
            object.__setattr__(self, "optimizer", _freeze(self.optimizer))

    def _value(self) -> tuple[Any, ...]:
        optimizer = None if self.optimizer is None else tuple(self.optimizer.items())
        return tuple(self.params.items()), tuple(self.activations.items()), optimizer, self.pick, self.hold

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __repr__(self) -> str:
        return f"Rules({self.name!r})"

    def override(
        self,
        *,
        name: str | None = None,
        params: Mapping[str, MeshAxes] | None = None,
        activations: Mapping[str, MeshAxes] | None = None,
        optimizer: Mapping[str, MeshAxes] | None = None,
        hold: bool | None = None,
        **both: MeshAxes,
    ) -> Rules:
        """New rules with some entries replaced: `rules.override(mlp=None)`, or one map at a time.

        Keyword arguments change parameters (and their optimizer copies) and activations alike.
        """
        new_optimizer = self.optimizer
        if optimizer is not None or self.optimizer is not None:
            new_optimizer = {**(self.optimizer or self.params), **both, **(optimizer or {})}
        return Rules(
            name or f"{self.name}+",
            {**self.params, **both, **(params or {})},
            {**self.activations, **both, **(activations or {})},
            new_optimizer,
            self.pick,
            self.hold if hold is None else hold,
        )

    def mesh_axes(self) -> set[str]:
        """Every mesh axis that some rule uses."""
        maps = [self.params, self.activations, self.optimizer or {}]
        return {axis for rules in maps for axes in rules.values() for axis in axes}

    def batch_axes(self, mesh: AnyMesh) -> tuple[str, ...]:
        """Mesh axes over which the rows of the batch are divided."""
        return tuple(a for a in self.activations.get("batch", ()) if mesh.shape.get(a, 1) > 1)

    def sequence_axes(self, mesh: AnyMesh) -> tuple[str, ...]:
        """Mesh axes over which the sequence is divided inside blocks too (context), by attention written for it."""
        return tuple(a for a in self.activations.get("seq_block", ()) if mesh.shape.get(a, 1) > 1)

    def stage_axes(self, mesh: AnyMesh) -> tuple[str, ...]:
        """Mesh axes over which the layers are divided: a pipeline."""
        return tuple(a for a in self.params.get("layers", ()) if mesh.shape.get(a, 1) > 1)

    def manual_axes(self, mesh: AnyMesh) -> tuple[str, ...]:
        """Mesh axes that the step holds by hand: each device has other tokens or layers, and gradients are reduced over
        them."""
        return (*self.batch_axes(mesh), *self.sequence_axes(mesh), *self.stage_axes(mesh))


def resolve(
    path: str,
    shape: tuple[int, ...],
    logical: Sequence[str | None] | None,
    rules: Mapping[str, tuple[str, ...]],
    mesh: AnyMesh,
    *,
    pick: str = "leading",
    stacked: bool = False,
    table: bool = False,
) -> PartitionSpec:
    """The `PartitionSpec` of one parameter leaf.

    Args:
        path: for messages.
        logical: one logical axis (or None) per dim; None for a leaf without metadata.
        rules: one map of `Rules`.
        stacked: the leading dim is layers that a scan runs over; like dims in `KEPT` it is never spread.
        table: its rows are looked up; it is spread along the last dim that divides.

    Raises:
        ShardingError: wrong number of axes, unknown axis, a dim that does not divide, two dims on
            one mesh axis.
    """
    names = list(logical) if logical is not None else [None] * len(shape)
    where = f"logical axes {tuple(names)} on mesh {mesh_text(mesh)}"
    if len(names) != len(shape):
        raise ShardingError(
            f"{len(names)} logical axes for {len(shape)} dims {shape}",
            where=path,
            why=where,
            fix="one logical axis, or None, per dim",
        )
    dims: list[tuple[str, ...]] = []
    used: dict[str, int] = {}
    for dim, name in enumerate(names):
        if name is not None and name not in rules and pick != "largest":
            raise ShardingError(
                f"dim {dim}: no rule for logical axis '{name}'",
                where=path,
                why=where,
                fix=suggestion(name, rules, f"rules.override({_word(name)}=None)"),
            )
        axes = tuple(a for a in rules.get(name, ()) if mesh.shape.get(a, 1) > 1) if name else ()
        for axis in axes:
            if axis in used:
                raise ShardingError(
                    f"dims {used[axis]} '{names[used[axis]]}' and {dim} '{name}' both claim mesh axis '{axis}'",
                    where=path,
                    why=where,
                    fix=f"rules.override({_word(str(name))}=None)",
                )
            used[axis] = dim
        size = math.prod(mesh.shape[a] for a in axes)
        if shape[dim] % size:
            over = " ".join(f"{a}={mesh.shape[a]}" for a in axes)
            raise ShardingError(
                f"dim {dim} '{name}' = {shape[dim]} is not divisible by {size} (mesh {over})",
                where=path,
                why=where,
                fix=f"{name}={-(-shape[dim] // size) * size}, a smaller {axes[-1]} axis, "
                f"or rules.override({_word(str(name))}=None)",
            )
        dims.append(axes)
    spread = tuple(a for a in rules.get(ANY, ()) if mesh.shape.get(a, 1) > 1 and a not in used)
    if spread and math.prod(shape) >= SMALL:
        count = math.prod(mesh.shape[a] for a in spread)
        skip = {d for d, name in enumerate(names) if name in KEPT} | ({0} if stacked else set())
        free = [d for d in range(len(shape)) if d not in skip and not dims[d] and shape[d] % count == 0]
        if free:
            dim = (
                free[-1]
                if table
                else free[0]
                if pick == "leading"
                else max(free, key=lambda d: (shape[d], -d))
            )
            dims[dim] = spread
    while dims and not dims[-1]:
        dims.pop()
    return PartitionSpec(*[None if not d else d[0] if len(d) == 1 else d for d in dims])


def _word(name: str) -> str:
    return name if name.isidentifier() else f"**{{'{name}': ...}}"


def mesh_text(mesh: AnyMesh) -> str:
    """`data=2 tensor=4`."""
    return " ".join(f"{a}={n}" for a, n in mesh.shape.items())


def spec_axes(spec: PartitionSpec) -> set[str]:
    """Mesh axes that a spec uses."""
    return {a for dim in spec if dim for a in ((dim,) if isinstance(dim, str) else dim)}
