"""A sequence divided over mesh axes (context), in zig-zag order.

With n devices a sequence is cut into 2n pieces, and device i holds pieces i and 2n-1-i. So under a causal mask every
device has the same work. Source: the load balance of striped and zig-zag ring attention (arXiv 2311.09431).

`plan.put` stores dim 1 of every batch field in this order; the loss sees only the part that its device holds. What
depends on where a token stands asks here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.sharding import context


def zigzag_order(length: int, parts: int) -> np.ndarray:
    """Positions of a sequence in the order in which `parts` devices hold them; `parts` = 1: as they are."""
    if parts == 1:
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * parts, -1)
    order = [piece for i in range(parts) for piece in (i, 2 * parts - 1 - i)]
    return pieces[order].reshape(-1)


def sequence_axes() -> tuple[str, ...]:
    """Mesh axes that divide the sequence in the trace under way; () outside a Plan."""
    layout = context.current()
    return () if layout is None or layout.mesh is None else layout.sequence


def own(whole: jax.Array, dim: int = 0) -> jax.Array:
    """This device's part of an array that has all positions along `dim`; all of it where no axis divides them.

    For what is the same on all devices, such as a table of positions or a dropout mask.
    """
    axes = sequence_axes()
    if not axes:
        return whole
    n, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    piece = whole.shape[dim] // (2 * n)
    starts = (index * piece, (2 * n - 1 - index) * piece)
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(whole, s, piece, dim) for s in starts], dim)


def positions(length: int) -> jax.Array:
    """[length] int32: where the tokens of this device's part stand in their sequence.

    Args:
        length: tokens that this device holds: all of a sequence where no mesh axis divides it.
    """
    return own(jnp.arange(length * parts()))


def parts() -> int:
    """Devices that share one sequence."""
    axes = sequence_axes()
    return jax.lax.axis_size(axes) if axes else 1


def own_part(make: Callable[[tuple[int, ...]], jax.Array], shape: tuple[int, ...], dim: int = 1) -> jax.Array:
    """`make(shape)` of the whole sequence, cut to this device's part: the same values as on one device.

    Args:
        make: shape -> array, for instance a random mask. shape: of this device's part, its sequence at `dim`.
    """
    whole = list(shape)
    if len(shape) > dim:
        whole[dim] *= parts()
        return own(make(tuple(whole)), dim)
    return make(shape)
