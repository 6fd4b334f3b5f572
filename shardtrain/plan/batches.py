"""Batches of this process, onto the devices, in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import DataError
from shardtrain.parallel.groups import group_order

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan


def device_rows(plan: Plan) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, in their order."""
    order = group_order(plan.global_batch, plan.groups)
    if jax.process_count() == 1:
        return order
    slices = plan.batch_sharding.addressable_devices_indices_map((plan.global_batch,)).values()
    spans = sorted({(s[0].start or 0, s[0].stop or plan.global_batch) for s in slices if s is not None})
    return np.concatenate([order[a:b] for a, b in spans])


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
    if jax.process_count() == 1:
        return jax.device_put(rows, plan.batch_sharding)
    return jax.make_array_from_process_local_data(plan.batch_sharding, rows, spec.shape)
