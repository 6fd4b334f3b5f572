"""Train on a layout and on one device with the same groups; compare leaf by leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import shardtrain as st
from shardtrain.tree import flatten

LAYOUTS: dict[str, tuple[dict[str, int], str, int]] = {
    # name: (mesh sizes, rules, microbatches); eight groups each
    "data8": ({"data": 8}, "data", 1),
    "zero1": ({"data": 8}, "zero1", 1),
    "fsdp8": ({"fsdp": 8}, "fsdp", 1),
    "fsdp4-micro2": ({"data": 1, "fsdp": 4, "tensor": 2}, "fsdp_tensor", 2),
    "tensor8": ({"tensor": 8}, "tensor", 8),
    "tensor4-fsdp2": ({"fsdp": 2, "tensor": 4}, "fsdp_tensor", 4),
    "hybrid": ({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor", 2),
    "hsdp": ({"data": 2, "fsdp": 4}, "fsdp", 1),
    "zero1-tensor": ({"data": 4, "tensor": 2}, "zero1_tensor", 2),
    "context8": ({"context": 8}, "fsdp_tensor", 8),
    "context4-data2": ({"data": 2, "context": 4}, "zero1", 4),
    "context2-hybrid": ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_tensor", 4),
    "context2-sequence": ({"fsdp": 2, "context": 2, "tensor": 2}, "fsdp_tensor_sequence", 4),
    "slices-context": ({"slice": 2, "context": 2, "tensor": 2}, "fsdp_tensor", 4),
    "slices-fsdp": ({"slice_fsdp": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor", 2),
    "slices-both": ({"slice": 2, "slice_fsdp": 2, "fsdp": 2}, "fsdp_tensor", 2),
    "slices": ({"slice": 2, "data": 2, "tensor": 2}, "tensor", 2),
}
EXPERT_LAYOUTS: dict[str, tuple[dict[str, int], str, int]] = {
    "expert8": ({"expert": 8}, "fsdp_tensor", 1),
    "data-expert": ({"data": 2, "expert": 4}, "fsdp_tensor", 1),
    "fsdp-expert": ({"fsdp": 2, "expert": 4}, "fsdp_tensor", 1),
    "expert-tensor-fsdp": ({"fsdp": 2, "expert": 2, "tensor": 2}, "fsdp_tensor", 2),
    "expert-sequence": ({"expert": 4, "tensor": 2}, "fsdp_tensor_sequence", 2),
    "expert-context": ({"expert": 4, "context": 2}, "fsdp_tensor", 2),
}
GROUPS = 8


@dataclasses.dataclass
class Trained:
    gradients: dict[str, np.ndarray]
    losses: list[float]
    norms: list[float]
    params: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    metrics: dict[str, float]


def train(
    model: Any,
    loss: Callable[..., Any],
    batches: list[dict[str, np.ndarray]],
    layout: str | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 5,
    **options: Any,
) -> Trained:
    """First-step gradients, then `steps` steps. `layout=None` is one device with the same groups."""
    plan = planned(model, loss, batches[0], layout, optimizer, **options)
    state = plan.init(0)
    gradients = jax.device_get(flatten(jax.jit(plan.gradients)(state, plan.put(batches[0]))[0]))
    step = plan.compile()
    losses, norms = [], []
    for index in range(steps):
        state, metrics = step(state, plan.put(batches[index % len(batches)]))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return Trained(
        gradients,
        losses,
        norms,
        jax.device_get(flatten(state.params)),
        jax.device_get(flatten(state.model_state)),
        {k: float(v) for k, v in metrics.items()},
    )


def planned(
    model: Any,
    loss: Callable[..., Any],
    batch: dict[str, np.ndarray],
    layout: str | None,
    optimizer: optax.GradientTransformation | None = None,
    **options: Any,
) -> st.Plan:
    """On a layout, or with None on one device, of `GROUPS` groups."""
    sizes, rules, micro = {**LAYOUTS, **EXPERT_LAYOUTS}[layout] if layout else ({"data": 1}, "fsdp_tensor", 1)
    return st.plan(
        model,
        loss,
        optimizer or optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3)),
        batch=st.batch_spec(**batch),
        mesh=st.make_mesh(devices=None if layout else jax.devices()[:1], **sizes),
        microbatches=micro,
        groups=GROUPS,
        **{"rules": rules, **options},
    )


def global_norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(np.float64(v)).sum() for v in tree.values())))


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, str]:
    """The worst leaf: norm of its difference over the global norm."""
    assert a.keys() == b.keys()
    norm = global_norm(b)
    return max((float(np.linalg.norm(np.float64(a[k]) - np.float64(b[k]))) / norm, k) for k in b)


def leaf_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, str]:
    """The worst leaf relative to its own norm.

    Floor: a leaf whose gradient is zero in theory (a key bias, a bias before BatchNorm) is rounding of the
    whole. At a tolerance of 1e-5 the floor allows it two float32 roundings of the global norm.
    """
    floor = 2 * np.finfo(np.float32).eps / 1e-5 * global_norm(b)
    return max(
        (
            float(np.linalg.norm(np.float64(a[k]) - np.float64(b[k])))
            / max(float(np.linalg.norm(b[k])), floor),
            k,
        )
        for k in b
    )


def assert_equal(a: Trained, b: Trained, *, tolerance: float = 1e-5, parameters: float = 1e-4) -> None:
    """The tolerances that the README states."""
    worst, leaf = leaf_difference(a.gradients, b.gradients)
    assert worst < tolerance, f"gradient of {leaf} differs by {worst:.2e}"
    np.testing.assert_allclose(a.losses, b.losses, rtol=tolerance)
    np.testing.assert_allclose(a.norms, b.norms, rtol=tolerance)
    worst, leaf = difference(a.params, b.params)
    assert worst < parameters, f"parameter {leaf} differs by {worst:.2e}"
