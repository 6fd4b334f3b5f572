"""Matrix products in 8 bits: both operands of every product of a block's weights, forward and backward, through qwix.

An operand is rounded to int8 or float8_e4m3fn, scaled by the largest value along the dims that the product sums over: each
row of the activations and each column of the weights has a scale of its own, which leaves the sum. The backward rounds
anew, since its products sum over other dims; nothing rounded is kept for it. Sums are int32, or float32 for fp8.

Scales are those of one device on every layout, so what differs from it is what a rounding that came first decides
otherwise. Where tensor divides the dim of a sum, its scales are the largest of all its devices.

Source: Jacob et al. (arXiv 1712.05877); Micikevicius et al., FP8 formats (arXiv 2209.05433); one format for both directions as
in DeepSeek-V3 (arXiv 2412.19437), section 3.3. Held by tests/parity/test_parity_quantised.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from shardtrain.errors import ConfigError, DependencyError, suggestion
from shardtrain.parallel.fsdp import alike
from shardtrain.parallel.precision import widen
from shardtrain.sharding import context

QUANTS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# qwix has the largest value at 127.5 of int8: half of them round to -128 or -127 as the last bit has it. Here it is 127.
_CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}
PRODUCT = (
    "kernel of a product"  # marks the kernels that are rounded, in traces on shapes (see `plan/traffic.py`)
)
COPIES, SUMS = "copies", "sums"  # what the dim `z` of a product is, see `parallel/stream.py`


def check_quant(name: str | None, sizes: Mapping[str, int], sequence: tuple[str, ...]) -> None:
    """Whether products can be in 8 bits here, on mesh axes of these sizes.

    Raises:
        ConfigError: another name; an axis that divides the sequence. DependencyError: qwix is not installed.
    """
    if name is None:
        return
    if name not in QUANTS:
        raise ConfigError(f"'{name}' is none", where="quant", fix=suggestion(name, QUANTS, "None"))
    if importlib.util.find_spec("qwix") is None:
        raise DependencyError(
            f"'{name}' needs qwix, which is not installed",
            where="quant",
            fix="pip install 'shardtrain[quant]', or no quant",
        )
    if sequence:
        over = " ".join(f"{a}={sizes[a]}" for a in sequence)
        raise ConfigError(
            f"'{name}', and mesh axis {over} divides the sequence",
            where="quant",
            why="the gradient of a weight is scaled by the largest of all tokens of a group; a device sees only its part",
            fix=f"{sequence[0]}=1, with fsdp or tensor in its place, or no quant",
        )


def quantised() -> str | None:
    """What products are rounded to in the trace under way."""
    layout = context.current()
    return None if layout is None or layout.mesh is None else layout.quant


def product(x: jax.Array, kernel: jax.Array, equation: str, parts: str = "") -> jax.Array:
    """`einsum(equation, x, kernel)`, in 8 bits where the Plan says so.

    Args:
        equation: of letters, each of which is in two of the three. parts: what the letter z is: "copies" of `x`, one for
            each device, or partial "sums" in the result; "" where there is none.

    Communicates: where z is divided, all-reduces of the scales along a divided dim: 4 bytes for each row of the product
        with partial sums (of "copies" the gradient of `x`) and each column of its weight.
    """
    layout = context.current()
    if layout is not None and layout.mesh is None:
        layout.products.append(equation)
        kernel = checkpoint_name(kernel, PRODUCT)
    quant = quantised()
    if quant is None:
        return jnp.einsum(equation, x, kernel)
    return _product(*alike(x, kernel), _How(equation, parts, quant))


@dataclasses.dataclass(frozen=True)
class _How:
    equation: str
    parts: str
    quant: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, how: _How) -> jax.Array:
    return _rounded(x, kernel, how.equation, how, how.parts == SUMS)


def _product_backward(how: _How, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    ins, out = how.equation.split("->")
    left, right = ins.split(",")
    of_x = _rounded(gradient, kernel, f"{out},{right}->{left}", how, how.parts == COPIES)
    of_kernel = _rounded(x, gradient, f"{left},{out}->{right}", how, False)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_product.defvjp(lambda x, kernel, how: (_product(x, kernel, how), (x, kernel)), _product_backward)


def _rounded(a: jax.Array, b: jax.Array, equation: str, how: _How, summed: bool) -> jax.Array:
    """The product of what `a` and `b` are rounded to. `summed`: what has a z is one device's part of a sum."""
    import qwix

    ins, out = equation.split("->")
    own = out.replace("z", "") if summed else out

    def rounded(x: jax.Array, letters: str) -> Any:
        axes = [axis for axis, letter in enumerate(letters) if letter in own]
        return qwix.quantize(
            widen(x), QUANTS[how.quant], channelwise_axes=axes, calibration_method=_CALIBRATION[how.quant]
        )

    left, right = ins.split(",")
    return qwix.einsum(equation, rounded(a, left), rounded(b, right)).astype(jnp.result_type(a, b))
