"""The README's job on the README's layouts equals one device: its model with dropout, its text, its optimizer.

Fifty steps, eight groups. Adam divides by the gradient's own size, so an element whose gradient is zero in theory
(a key bias under softmax) turns its rounding into whole steps: such elements are counted and listed, and compared
with the others only as part of the global norm.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest
from compare import difference, global_norm, leaf_difference

import shardtrain as st
from shardtrain.config.build import build_text, optimizer
from shardtrain.config.build import learning_rate as schedule
from shardtrain.data import TokenLoader
from shardtrain.models import build_model, language_model_loss
from shardtrain.tree import flatten

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, PARAMETERS_AT = 50, 20
LAYOUTS: dict[str, tuple[dict[str, int], str, int]] = {
    "data=8": ({"data": 8}, "fsdp_tensor", 1),
    "fsdp=8": ({"fsdp": 8}, "fsdp_tensor", 1),
    "tensor=4 fsdp=2": ({"fsdp": 2, "tensor": 4}, "fsdp_tensor", 1),
    "zero1 data=8": ({"data": 8}, "zero1", 1),
    "microbatches=4": ({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor", 4),
}


@dataclasses.dataclass
class Trained:
    """`moved`: elements whose gradient exceeded 1e-6 of the RMS of the whole gradient at every step so far."""

    gradients: dict[str, np.ndarray]
    losses: list[float]
    norms: list[float]
    params: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]


def config() -> Any:
    file = pathlib.Path(__file__).parents[2] / "configs" / "gpt.py"
    spec = importlib.util.spec_from_file_location("gpt", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.tiny()
    return dataclasses.replace(made, model=dataclasses.replace(made.model, dropout=0.1))


@functools.cache
def batches() -> tuple[Any, list[Any]]:
    made = config()
    loader = TokenLoader(
        build_text(made), sequence=made.data.sequence, global_batch=made.global_batch, seed=made.seed
    )
    rows = iter(loader)
    return loader.batch_spec, [next(rows) for _ in range(STEPS)]


@functools.cache
def trained(layout: str | None, groups: int, sgd: bool = False) -> Trained:
    made = config()
    sizes, rules, micro = LAYOUTS[layout] if layout else ({"data": 1}, "fsdp_tensor", 1)
    spec, rows = batches()
    plan = st.plan(
        lambda rngs: build_model(made.model, rngs),
        language_model_loss,
        optax.sgd(0.1) if sgd else optimizer(made, schedule(made)),
        batch=spec,
        mesh=st.make_mesh(devices=None if layout else jax.devices()[:1], **sizes),
        rules=rules,
        microbatches=micro,
        groups=groups,
    )
    state, step = plan.init(made.seed), plan.compile()
    gradients = jax.jit(plan.gradients)
    first: dict[str, np.ndarray] = {}
    params: dict[str, np.ndarray] = {}
    moved: dict[str, np.ndarray] = {}
    losses, norms = [], []
    for index in range(PARAMETERS_AT if sgd else STEPS):
        batch = plan.put(rows[index])
        if index == 0 or (layout is None and not sgd and index < PARAMETERS_AT):
            found = jax.device_get(flatten(gradients(state, batch)[0]))
            first = first or found
            level = 1e-6 * global_norm(found) / np.sqrt(sum(g.size for g in found.values()))
            moved = {p: (np.abs(g) > level) & moved.get(p, True) for p, g in found.items()}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if index + 1 == PARAMETERS_AT:
            params = jax.device_get(flatten(state.params))
    return Trained(first, losses, norms, params, moved)


def groups_of(layout: str) -> int:
    sizes, _, micro = LAYOUTS[layout]
    return max(8, sizes.get("data", 1) * sizes.get("fsdp", 1) * micro)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_readmes_layouts(layout, capsys):
    """Gradients, losses and norms within 1e-5 (1e-4 over fifty steps), parameters within 1e-4; prints what it finds.
    `test_planted_faults.py` plants the faults that it is for."""
    groups = groups_of(layout)
    ours, reference = trained(layout, groups), trained(None, groups)
    gradient = leaf_difference(ours.gradients, reference.gradients)
    relative = lambda a, b: np.abs(np.array(a) / np.array(b) - 1)
    loss, norm = relative(ours.losses, reference.losses), relative(ours.norms, reference.norms)
    whole = difference(ours.params, reference.params)
    leaves, still = [], {}
    for path, there in reference.params.items():
        mask = reference.moved[path]
        if not mask.all():
            still[path] = int((~mask).sum())
        apart = np.linalg.norm(np.float64(ours.params[path] - there)[mask])
        leaves.append((float(apart / max(np.linalg.norm(there), 1e-30)), path))
    with capsys.disabled():
        print(
            f"\n{layout}: gradient {gradient[0]:.1e} ({gradient[1]}); loss {loss[:10].max():.1e} over 10, "
            f"{loss.max():.1e} over {STEPS}; norm {norm[:10].max():.1e}, {norm.max():.1e}; parameters after "
            f"{PARAMETERS_AT}: {whole[0]:.1e} of all ({whole[1]}), {max(leaves)[0]:.1e} of the leaf ({max(leaves)[1]})"
            f"; without a gradient: {still}"
        )
    assert gradient[0] < 1e-5, gradient
    assert loss[:10].max() < 1e-5 and loss.max() < 1e-4
    assert norm[:10].max() < 1e-5 and norm.max() < 1e-4
    assert whole[0] < 1e-4, whole
    assert max(leaves)[0] < 1e-4, sorted(leaves)[-5:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sgd(layout):
    """Twenty steps: SGD shows the scale of gradients, which Adam hides."""
    groups = groups_of(layout)
    worst = difference(trained(layout, groups, True).params, trained(None, groups, True).params)
    assert worst[0] < 1e-5, worst
