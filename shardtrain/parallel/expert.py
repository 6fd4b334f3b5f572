"""Mixture of experts: tokens go to the devices that hold their experts, over the mesh axis `expert`, and come back.

The exchange only says where the products are made: any mesh gives what one device gives.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardtrain.errors import ConfigError
from shardtrain.mesh import device_of
from shardtrain.parallel.fsdp import varying
from shardtrain.parallel.precision import widen
from shardtrain.parallel.region import on_parts
from shardtrain.parallel.remat import EXCHANGED, REDUCED
from shardtrain.parallel.routing import capacity, kept, places
from shardtrain.parallel.sequence import parts, sequence_axes
from shardtrain.sharding import context
from shardtrain.sharding.constrain import enter_block, leave_block, place, spec_of

AXIS = "expert"
SENT = "sent to experts"  # marks what an exchange sends, in traces on shapes (see `plan/traffic.py`)
OF_EXPERTS = "experts of "  # and the kernels, followed by the number of tokens that they serve

Product = Callable[[jax.Array, jax.Array], jax.Array]
"""`(rows [parts, ..., in], kernels [parts, experts, in, *out]) -> [parts, ..., *out]`: each row times the kernel of its
expert. `parts`: of the columns, over tensor."""


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Of rows [parts, n, ...] those of an index; zero beyond the end."""
    return rows.at[:, index].get(mode="fill", fill_value=0)


def _add_up(rows: jax.Array, index: jax.Array) -> jax.Array:
    """[parts, n, ...]: the sum over j of `rows[:, index[:, j]]`, in float32."""
    return widen(_take(rows, index)).sum(2).astype(rows.dtype)


# Each is the other's transpose, so neither direction adds up by scatter.
@jax.custom_vjp
def spread(rows: jax.Array, taken: jax.Array, given: jax.Array) -> jax.Array:
    """`rows[:, taken]`: [parts, n, ...] -> [parts, m, ...], zero where `taken` is n. `given`: [n, k], the places that a
    row has (m: none)."""
    return _take(rows, taken)


@jax.custom_vjp
def collect(rows: jax.Array, taken: jax.Array, given: jax.Array) -> jax.Array:
    """[parts, m, ...] -> [parts, n, ...]: the sum of what `spread` made of each row."""
    return _add_up(rows, given)


spread.defvjp(lambda x, t, g: (_take(x, t), (t, g)), lambda tg, y: (_add_up(y, tg[1]), None, None))
collect.defvjp(lambda x, t, g: (_add_up(x, g), (t, g)), lambda tg, y: (_take(y, tg[0]), None, None))


def expert_mlp(
    x_BTD: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    experts: int,
    factor: float,
) -> tuple[jax.Array, jax.Array]:
    """Sum over a token's experts e of `weight_e * (silu(x gate_e) * (x up_e)) down_e`.

    Under a Plan whose rules divide `expert` each device has E/n experts: the tokens go to them and come back. Outside,
    and where a device has all of them, nothing is sent. Columns may be divided over tensor: partial sums then come
    back, and are summed once per token, not once per choice.

    Args:
        x_BTD: [B, T, D], the residual stream of one group. chosen, weights: [B*T, k], see `route`.
        gate_up: [E/n, D, 2, F]. down: [E/n, F, D].
        experts: E. factor: of the capacity, see `capacity`; choices beyond it are dropped, their weight is lost.
            0: none is dropped.

    Returns:
        [B, T, D], and the number of choices that were dropped, int32.

    Raises:
        ConfigError: products are to be in 8 bits.

    Communicates: over expert, with f = (n-1)/n: an all-to-all of the token vectors to the experts and one back, and both
    again for the gradients: 4f*S*D, for S = E * capacity places or, without drops, the B*T*k choices themselves. Without
    drops also an all-gather of E counts, and on CPU, which has no ragged all-to-all, S = n * B*T * min(k, E/n).
    Over tensor as a dense MLP: f*B*T*D times two forward, times two backward. Where the sequence is divided, what has a
    place under a capacity travels as without drops, since a device may have any part of it; and see `routing.kept`.

    Source: Lepikhin et al., GShard (arXiv 2006.16668); Gale et al., MegaBlocks (arXiv 2211.15841).
    Held by tests/unit/parallel/test_expert.py and tests/comms/test_experts.py.
    """
    layout = context.current()
    if layout is not None and layout.quant is not None:
        raise ConfigError(
            f"'{layout.quant}', and the model has experts",
            where="quant",
            why="an expert takes tokens of all groups of its devices, whose scales would be those of no single group",
            fix="no quant, or a model without experts",
        )
    if layout is not None and layout.mesh is None:
        mark = f"{OF_EXPERTS}{x_BTD.shape[0] * x_BTD.shape[1]}"
        gate_up, down = checkpoint_name(gate_up, mark), checkpoint_name(down, mark)
    spec = spec_of(down, "mlp", None)
    tensor = _Parts(spec[1]) if spec is not None and spec[1] else _Parts(())
    held, embed, _, columns = gate_up.shape
    cut = (tensor.count, columns // tensor.count)
    gate_up = gate_up.reshape(held, embed, 2, *cut).transpose(3, 0, 1, 2, 4)
    down = down.reshape(held, *cut, embed).transpose(1, 0, 2, 3)

    def apply(rows: jax.Array, product: Product) -> jax.Array:
        both = checkpoint_name(product(rows, tensor.divided(gate_up)), "mlp_up")
        return product(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], tensor.divided(down))

    flat, (rows, tokens) = enter_block(x_BTD).reshape(-1, embed), x_BTD.shape[:2]
    most = capacity(rows * tokens * parts(), chosen.shape[1], experts, factor) if factor else 0
    if most and _sequence_is_divided():
        has = kept(chosen.reshape(rows, tokens, -1), experts, most).reshape(chosen.shape)
        y, _ = _exchanged(
            apply, tensor, flat, jnp.where(has, chosen, experts), weights, experts, experts // held, 0
        )
        dropped = (~has).sum(dtype=jnp.int32)
        dropped = jax.lax.psum(dropped, sequence_axes()) if sequence_axes() else dropped
    else:
        y, dropped = _exchanged(apply, tensor, flat, chosen, weights, experts, experts // held, most)
    return leave_block(y.reshape(x_BTD.shape)), dropped


def _sequence_is_divided() -> bool:
    """In the first trace too, which has no mesh."""
    layout = context.current()
    if layout is None:
        return False
    sizes: Any = layout.sizes if layout.mesh is None else layout.mesh.shape
    return any(sizes.get(axis, 1) > 1 for axis in layout.activations.get("seq_block", ()))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts that columns of experts have over automatic mesh axes, as a dim of their own, the first one.

    A sum over it is the sum over the devices, and is taken where we say: after tokens have come back.
    """

    axes: tuple[str, ...] | str

    @property
    def count(self) -> int:
        layout = context.current()
        if not self.axes or layout is None or layout.mesh is None:
            return 1
        return math.prod(
            layout.mesh.shape[a] for a in ((self.axes,) if isinstance(self.axes, str) else self.axes)
        )

    def divided(self, x: jax.Array) -> jax.Array:
        """`x` with its first dim over the axes."""
        if not self.axes:
            return x
        return place(
            x, PartitionSpec(self.axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)), context.current()
        )

    def each(self, x: jax.Array) -> jax.Array:
        """`x` for every part; the gradient is summed over them."""
        return self.divided(jnp.broadcast_to(x, (self.count, *x.shape)))

    def locally(
        self, function: Callable[..., Any], *arguments: jax.Array, whole: tuple[jax.Array, ...] = ()
    ) -> Any:
        """`function` on what one device holds: arguments and results [parts, ...] without that dim, then `whole` ones.

        Best a single collective or product: remat would have a region hand out more than it can name, since what it
        saves of nested regions varies over the axes around them too.
        """
        merged = [x.reshape(-1, *x.shape[2:]) for x in arguments]
        parts = PartitionSpec(self.axes)
        ins = (*[parts] * len(merged), *[PartitionSpec()] * len(whole))
        run = on_parts(function, ins, parts, (self.axes,) if isinstance(self.axes, str) else self.axes)
        return jax.tree.map(lambda y: y.reshape(self.count, -1, *y.shape[1:]), run(*merged, *whole))


def _exchanged(
    apply: Callable[[jax.Array, Product], jax.Array],
    tensor: _Parts,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    experts: int,
    n: int,
    most: int,
) -> tuple[jax.Array, jax.Array]:
    """[T, D] -> [T, D]: `apply` on the rows of the experts that this device, one of n, has. `most`: see `places`."""
    tokens, k = chosen.shape
    assert n == 1 or jax.lax.axis_size(AXIS) == n, "the experts of a device are its part of the expert axis"
    to = places(chosen, experts, most)
    token = to.choice // k  # T where there is no choice
    rows = spread(tensor.each(x), token, to.place)
    layout = context.current()
    if layout is not None and layout.mesh is None:
        rows = checkpoint_name(rows, SENT)
    if most:
        by_expert = rows.reshape(-1, experts, most, rows.shape[-1])
        rows = _with_capacity(apply, tensor, by_expert, n).reshape(rows.shape)
        dropped = jnp.maximum(to.sizes - most, 0).sum()
    else:
        rows = _without_drops(apply, tensor, rows, to.sizes, n, width=tokens * min(k, experts // n))
        dropped = jnp.zeros_like(to.sizes).sum()
    by_place = spread(tensor.each(weights.reshape(-1, 1)), to.choice, to.place.reshape(-1, 1))
    weighted = (widen(rows) * by_place).astype(rows.dtype)
    return collect(weighted, token, to.place).sum(0), dropped


def _with_capacity(
    apply: Callable[[jax.Array, Product], jax.Array], tensor: _Parts, rows: jax.Array, n: int
) -> jax.Array:
    """[parts, experts, places, D] -> the same; every expert has the same number of places."""

    def product(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.einsum("pecd,ped...->pec...", rows, kernels)

    if n == 1:
        return apply(rows, product)
    # [experts, places, D] <-> [experts held, n * places, D]
    there = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=1, tiled=True)
    back = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=1, concat_axis=0, tiled=True)
    rows = checkpoint_name(tensor.locally(there, rows), EXCHANGED)
    return checkpoint_name(tensor.locally(back, apply(rows, product)), EXCHANGED)


def _without_drops(
    apply: Callable[[jax.Array, Product], jax.Array],
    tensor: _Parts,
    rows: jax.Array,
    sizes: jax.Array,
    n: int,
    width: int,
) -> jax.Array:
    """[parts, choices, D] in the order of their experts -> the same. `sizes`: [E]. `width`: the most that one device can
    send another."""
    if n == 1:
        return apply(rows, lambda rows, kernels: _ragged_product(rows, kernels, sizes, tensor))
    height, held = rows.shape[1], sizes.size // n
    every = checkpoint_name(jax.lax.all_gather(sizes, AXIS), REDUCED).reshape(n, n, held)
    sent = every.sum(-1)
    rows = checkpoint_name(_ragged_exchange(rows, sent, width, n * width, tensor), EXCHANGED)
    # They come in the order (sender, expert) and are wanted in the order of the experts.
    mine = every[:, jax.lax.axis_index(AXIS)]
    piece = _piece(mine.reshape(-1), n * width)
    order = jnp.argsort(jnp.where(piece < n * held, piece % held, held), stable=True)
    inverse = jnp.argsort(order)
    rows = spread(rows, order, inverse[:, None])
    rows = apply(rows, lambda rows, kernels: _ragged_product(rows, kernels, mine.sum(0), tensor))
    rows = spread(rows, inverse, order[:, None])
    return checkpoint_name(_ragged_exchange(rows, sent.T, width, height, tensor), EXCHANGED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ragged_product(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, tensor: _Parts) -> jax.Array:
    """[parts, rows, in] in the order of their experts, times [parts, experts, in, *out]."""
    flat = kernels.reshape(*kernels.shape[:3], -1)
    made = tensor.locally(jax.lax.ragged_dot, rows, flat, whole=(sizes,))
    return made.reshape(*rows.shape[:2], *kernels.shape[3:])


def _ragged_product_backward(tensor: _Parts, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    rows, kernels, sizes = saved

    def local(rows: jax.Array, kernels: jax.Array, gradient: jax.Array, sizes: jax.Array) -> Any:
        return jax.vjp(lambda r, k: jax.lax.ragged_dot(r, k, sizes), rows, kernels)[1](gradient)

    flat = kernels.reshape(*kernels.shape[:3], -1), gradient.reshape(*gradient.shape[:2], -1)
    of_rows, of_kernels = tensor.locally(local, rows, *flat, whole=(sizes,))
    return of_rows, of_kernels.reshape(kernels.shape), None


_ragged_product.defvjp(
    lambda rows, kernels, sizes, tensor: (
        _ragged_product(rows, kernels, sizes, tensor),
        (rows, kernels, sizes),
    ),
    _ragged_product_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _ragged_exchange(rows: jax.Array, sent: jax.Array, width: int, height: int, tensor: _Parts) -> jax.Array:
    """Rows for device 0, then for device 1, ... -> rows from device 0, then from device 1, ..., [parts, height, D].

    `sent`: [n, n], the same on every device: how many rows go from one to the other, at most `width`.
    """
    return (_ragged if _has_ragged() else _padded)(rows, sent, width, height, tensor)


_ragged_exchange.defvjp(
    lambda rows, sent, width, height, tensor: (
        _ragged_exchange(rows, sent, width, height, tensor),
        (sent, jnp.zeros((rows.shape[1], 0))),
    ),
    lambda width, height, tensor, saved, g: (
        _ragged_exchange(g, saved[0].T, width, saved[1].shape[0], tensor),
        None,
    ),
)


def _has_ragged() -> bool:
    """Whether the platform that the trace is for has a ragged all-to-all; the CPU has none."""
    layout = context.current()
    device = jax.devices()[0] if layout is None or layout.mesh is None else device_of(layout.mesh)
    return device.platform != "cpu"


def _ragged(rows: jax.Array, sent: jax.Array, width: int, height: int, tensor: _Parts) -> jax.Array:
    me = jax.lax.axis_index(AXIS)
    begin, land = jnp.cumsum(sent, 1) - sent, jnp.cumsum(sent, 0) - sent
    out = jnp.zeros((rows.shape[0], height, rows.shape[2]), rows.dtype)
    out = tensor.divided(varying(out, tuple(jax.typeof(rows).mat.varying)))
    send = functools.partial(jax.lax.ragged_all_to_all, axis_name=AXIS)
    return tensor.locally(send, rows, out, whole=(begin[me], sent[me], land[me], sent[:, me]))


def _padded(rows: jax.Array, sent: jax.Array, width: int, height: int, tensor: _Parts) -> jax.Array:
    """The same rows by an all-to-all of buffers of the largest size there can be."""
    me, step, row = jax.lax.axis_index(AXIS), jnp.arange(width), jnp.arange(height)
    begin, land = jnp.cumsum(sent, 1) - sent, jnp.cumsum(sent, 0) - sent
    index = jnp.where(step < sent[me][:, None], begin[me][:, None] + step, rows.shape[1])
    send = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    buffers = tensor.locally(send, _take(rows, index.reshape(-1)))
    sender = _piece(sent[:, me], height)
    there = sender * width + row - land[jnp.minimum(sender, len(sent) - 1), me]
    return _take(buffers, jnp.where(sender < len(sent), there, buffers.shape[1]))


def _piece(sizes: jax.Array, length: int) -> jax.Array:
    """[length]: which of the pieces of these sizes, one after the other, a position is in; `len(sizes)` after them."""
    return (jnp.cumsum(sizes)[None] <= jnp.arange(length)[:, None]).sum(1)
