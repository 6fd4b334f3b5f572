"""From a step on disk to a state on the plan's mesh."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from shardtrain.checkpoint import folder, intact, manifest
from shardtrain.errors import CheckpointError, first_line

log = logging.getLogger("shardtrain")
GUARD = ("grad_state", "guard")  # the one part of a state that may come and go


class Plan(Protocol):
    """What a checkpoint needs of a plan."""

    @property
    def abstract_state(self) -> Any:
        """The state as ShapeDtypeStructs with shardings."""

    def init(self, seed: int) -> Any:
        """A new state, sharded."""

    def describe(self) -> dict[str, Any]:
        """Mesh, rules, groups, ... as JSON."""


def restore(
    path: str | os.PathLike[str],
    plan: Plan,
    step: int | None = None,
    *,
    parts: Collection[str] | None = None,
    seed: int = 0,
) -> Any:
    """Read a state straight into the plan's shardings, on whatever mesh it was written; bit for bit.

    Reads only: safe while another process writes checkpoints in the folder.

    Args:
        path: the folder of the checkpoints.
        plan: its `abstract_state` gives every leaf's shape, dtype and sharding.
        step: which; by default the newest that is intact: damaged ones are passed over, with a line each.
        parts: fields of the state to read, such as `("params",)`; the others are those of
            `plan.init(seed)`. All by default.

    Returns:
        The state. On several processes, all call this together.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model or optimizer.
    """
    place = folder.local(path)
    return read_state(place, plan, choose(place, step), parts, seed)[0]


def read_state(
    path: Path, plan: Plan, step: int, parts: Collection[str] | None, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The state and the manifest of a step that `choose` gave."""
    content = manifest.read(path, step)
    leaves = manifest.paths(plan.abstract_state)
    fields = {p[0] for p in leaves} | {name.split("/")[0] for name in content["tree"]}
    chosen = fields if parts is None else set(parts)
    new, gone = _guard(content, leaves) if GUARD[0] in chosen else (set(), set())
    for what, names in (("starts anew", new), ("is left behind", gone)):
        if names:
            log.warning("checkpoint %s/%d: %s %s", path, step, "/".join(GUARD), what)
    if unknown := sorted(chosen - fields):
        raise CheckpointError(f"unknown parts {unknown}", where="parts", fix=f"choose among {sorted(fields)}")
    tree = {name: x for name, x in content["tree"].items() if tuple(name.split("/")) not in gone}
    same = {p: x for p, x in leaves.items() if p not in new}
    manifest.check_tree(path, {**content, "tree": tree}, same, chosen)

    from shardtrain.checkpoint import arrays

    wanted = {p: x for p, x in same.items() if p[0] in chosen}
    fresh = [] if chosen >= fields and not new else jax.tree.leaves(plan.init(seed))
    for index, p in enumerate(leaves):
        if fresh and p in wanted:
            fresh[index] = None  # free the memory before the stored values come
    try:
        tree = arrays.load(
            folder.step_folder(path, step) / folder.ARRAYS, wanted, partial=bool(fresh or gone)
        )
    except Exception as error:  # whatever Orbax and TensorStore raise over damaged files
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # too large for this mesh; the files may be sound
        raise manifest.damaged(path, step, f"its arrays cannot be read: {first_line(error)}") from error
    for p, x in wanted.items():
        leaf = arrays.at(tree, p)
        assert (leaf.shape, leaf.dtype) == (x.shape, x.dtype), f"{p}: read {leaf.aval}, asked for {x}"
        assert leaf.sharding.is_equivalent_to(x.sharding, x.ndim), f"{p}: {leaf.sharding}, not {x.sharding}"
    values = [arrays.at(tree, p) if p in wanted else fresh[i] for i, p in enumerate(leaves)]
    return jax.tree.unflatten(jax.tree.structure(plan.abstract_state), values), content


def _guard(
    content: Mapping[str, Any], leaves: Mapping[manifest.LeafPath, Any]
) -> tuple[set[manifest.LeafPath], set[manifest.LeafPath]]:
    """Leaves of the guard that the checkpoint does not have, and those that the plan does not: a guard may come and go
    between two starts, as nothing that is trained depends on what it remembers."""
    stored = {tuple(name.split("/")) for name in content["tree"]}
    ours = lambda paths: {p for p in paths if p[:2] == GUARD}  # noqa: E731
    return ours(leaves.keys() - stored), ours(stored - leaves.keys())


def choose(path: Path, step: int | None) -> int:
    """The step to read, every byte of it checked; the same on every process.

    Raises:
        CheckpointError: `step` is not there or damaged; there is none, or none that is intact.
    """
    if step is None:
        step, damaged = intact.newest(path)
        for other, why in damaged.items():
            log.error("checkpoint %s/%d is damaged and passed over: %s", path, other, why)
        if step is None:
            raise CheckpointError(
                "no checkpoint here",
                where=str(path),
                fix="check the folder, or train first (restore_or_init)",
            )
        return step
    found = folder.steps(path)
    if not folder.step_folder(path, step).is_dir():
        listed = ", ".join(map(str, found)) or "none"
        raise CheckpointError(
            f"no step {step} here", where=str(path), why=f"steps: {listed}", fix="choose one of them"
        )
    intact.require(path, step)
    return step
