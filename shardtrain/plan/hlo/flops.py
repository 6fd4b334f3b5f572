"""Floating-point operations of products, from shapes.

Counted: `dot`, `convolution`, the GPU's library calls for both (`__cublas$gemm`, `__cublas$lt$matmul`, `__cudnn$conv...`),
and fused attention: cuDNN's, and on TPUs ours (`parallel/fused.py`), whose scope says whether it is causal. A causal one
counts half of its scores. Not visible in any text: other kernels of one's own (Pallas, Triton).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

import numpy as np

from shardtrain.plan.hlo.text import Instruction, shapes


def product_flops(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """2 x multiplications of one run; 0 for all that is no product."""
    if instruction.op == "dot":
        return _dot(instruction, body, _dims(instruction.rest, "lhs_contracting_dims"))
    if instruction.op == "convolution":
        return _convolution(instruction, body)
    if instruction.op == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        name = target.group(1) if target else ""
        if name.startswith("__cublas"):
            found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.rest)
            dims = [int(d) for d in json.loads(found.group(1))] if found else []
            return _dot(instruction, body, dims)
        if name.startswith("__cudnn$conv"):
            return _convolution(instruction, body)
        if name.startswith("__cudnn$fmha"):
            causal = re.search(r'"mask_type":\s*"\w*CAUSAL\w*"', instruction.rest) is not None
            return _attention(instruction, 5 if "Backward" in name else 2, causal, length=1)
        kernel = re.search(r"\bsplash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
        scope = re.search(r"\b(causal|full)_attention\b", instruction.op_name)
        if name == "tpu_custom_call" and kernel and scope:
            return _attention(instruction, _SPLASH[kernel.group(1)], scope.group(1) == "causal", length=-2)
    return 0.0


_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products over all scores


def _attention(instruction: Instruction, products: int, causal: bool, *, length: int) -> float:
    """2 x products x queries x keys x width; `length`: which dim of the keys is their number."""
    given = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", instruction.rest)
    arrays = shapes(given.group(1)) if given else []
    wide = [dims for kind, dims in arrays if kind in ("bf16", "f16", "f32") and len(dims) > 2]
    if len(wide) < 2:
        return 0.0
    queries, keys = wide[:2]
    return 2.0 * products * math.prod(queries) * keys[length] / (2 if causal else 1)


def _dims(rest: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", rest)
    return [int(d) for d in found.group(1).split(",") if d] if found else []


def _shape(name: str, body: Mapping[str, Instruction]) -> tuple[int, ...]:
    found = shapes(body[name].result) if name in body else []
    return found[0][1] if found else ()


def _dot(instruction: Instruction, body: Mapping[str, Instruction], contracted: list[int]) -> float:
    left, out = _shape(instruction.operands[0], body), shapes(instruction.result)[0][1]
    return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted if d < len(left))


def _convolution(instruction: Instruction, body: Mapping[str, Instruction]) -> float:
    """Each output position sees only the taps that fall inside the input: TPU spells products this way."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None or len(instruction.operands) < 2:
        return 0.0
    left, right, out = (labels.group(i) for i in (1, 2, 3))
    data, kernel = (_shape(name, body) for name in instruction.operands[:2])
    result = shapes(instruction.result)[0][1]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    given = dict(item.split("=", 1) for item in window.group(1).split()) if window else {}
    total = 2.0 * math.prod(result) * kernel[right.index("i")]
    for digit in (c for c in right if c.isdigit()):
        total *= _taps(
            int(digit),
            given,
            kernel=kernel[right.index(digit)],
            data=data[left.index(digit)],
            result=result[out.index(digit)],
        )
    return total


def _taps(digit: int, window: dict[str, str], *, kernel: int, data: int, result: int) -> float:
    """Mean number of kernel positions inside the input, over the output positions of one dim."""

    def number(key: str, otherwise: str) -> str:
        return window[key].split("x")[digit] if key in window else otherwise

    stride, low = int(number("stride", "1")), int(number("pad", "0_0").split("_")[0])
    stretched, spread = int(number("lhs_dilate", "1")), int(number("rhs_dilate", "1"))
    if kernel == 1 and low == 0 and stretched == 1:
        return 1.0
    end, inside = (data - 1) * stretched, 0
    taps = np.arange(kernel) * spread
    for start in range(0, result, 4096):  # bounds the memory of long dims
        at = np.arange(start, min(start + 4096, result))[:, None] * stride - low + taps[None]
        inside += int(((at >= 0) & (at <= end) & (at % stretched == 0)).sum())
    return inside / result if result else 0.0
