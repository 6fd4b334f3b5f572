"""Batches of this process, onto the devices, in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import DataError
from shardtrain.parallel.groups import group_order
from shardtrain.parallel.sequence import zigzag_order

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan


def device_rows(plan: Plan) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, in their order."""
    order = group_order(plan.global_batch, plan.groups)
    if jax.process_count() == 1:
        return order
    return np.concatenate([order[a:b] for a, b in row_spans(plan)])


def natural(plan: Plan, batch: Any) -> Any:
    """Global arrays with their sequences in order again, for functions that see them whole (`plan.jit`)."""
    if plan.sequence_parts == 1:
        return batch
    back = lambda x: x[:, zigzag_order(x.shape[1], plan.sequence_parts).argsort()]  # noqa: E731
    return jax.tree.map(lambda x: back(x) if x.ndim > 1 else x, batch)


def row_spans(plan: Plan) -> list[tuple[int, int]]:
    """Of the rows as devices hold them: from, to, for each part that is on this process's devices."""
    slices = plan.batch_sharding.addressable_devices_indices_map((plan.global_batch,)).values()
    return sorted({(s[0].start or 0, s[0].stop or plan.global_batch) for s in slices if s is not None})


def put(plan: Plan, batch: Any, order: np.ndarray) -> Any:
    """See `Plan.put`. `order`: position in `batch` of each row that the devices hold."""
    structure: Any = jax.tree.structure(plan.batch)
    found: Any = jax.tree.structure(batch)
    expected, leaves = jax.tree.leaves(plan.batch), jax.tree.leaves(batch)
    if found != structure:
        raise DataError(
            f"the batch is {found}, the plan has {structure}",
            where="plan.put",
            fix="the fields of batch_spec",
        )
    placed = [_leaf(plan, x, spec, order) for x, spec in zip(leaves, expected, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _leaf(plan: Plan, value: Any, spec: Any, order: np.ndarray) -> jax.Array:
    rows = np.asarray(value)
    if rows.shape != (len(order), *spec.shape[1:]):
        raise DataError(
            f"shape {rows.shape}, the plan has {(len(order), *spec.shape[1:])} for this process",
            where="plan.put",
            fix="the shapes of batch_spec; drop or pad an incomplete last batch",
        )
    if jnp.issubdtype(rows.dtype, jnp.floating) != jnp.issubdtype(spec.dtype, jnp.floating):
        raise DataError(
            f"dtype {rows.dtype}, the plan has {spec.dtype}",
            where="plan.put",
            fix="the dtypes of batch_spec",
        )
    rows = rows[order].astype(spec.dtype, copy=False)
    if plan.sequence_parts > 1 and rows.ndim > 1:
        rows = rows[:, zigzag_order(rows.shape[1], plan.sequence_parts)]
    sharding = plan.field_sharding(rows.ndim)
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    # Other processes may hold other parts of the same sequences: each device takes its own from ours.
    spans = row_spans(plan)
    starts = dict(zip([a for a, _ in spans], np.cumsum([0, *[b - a for a, b in spans]]), strict=False))

    def part(index: Any) -> np.ndarray:
        begin, end = index[0].start or 0, index[0].stop or spec.shape[0]
        return rows[(slice(starts[begin], starts[begin] + end - begin), *index[1:])]

    return jax.make_array_from_callback(spec.shape, sharding, part)
