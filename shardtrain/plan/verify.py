"""Did distributing change the model? The same training on one device and on each layout, compared leaf by leaf.

The reference is one device with the same groups (see README, "Groups"): what it computes is what every layout must
compute, but for the order in which sums are rounded. Compared are, over the same batches:

- every gradient leaf of the first step, before any clipping, and their sum over all steps (what plain SGD would have
  moved: Adam hides a gradient that is scaled);
- loss and global gradient norm of every step;
- every parameter and optimizer leaf after the last step.

Of a model with experts those choices of the first step are counted that went to another expert than on one device: a near
tie that rounding decides otherwise is a difference of its own, and no tolerance is meant for it.

Differences are norms of the difference. Gradients are held against the leaf's own norm, with a floor at the rounding
of the global norm: some are zero in theory (a key bias of attention), and their own relative error is noise over noise.
Parameters and optimizer state are held against the global norm. Held by tests/parity/test_verify.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardtrain.errors import ConfigError, ShardTrainError
from shardtrain.mesh import make_mesh
from shardtrain.parallel.precision import dtype_of, wide
from shardtrain.parallel.quantised import check_quant
from shardtrain.plan.candidates import Candidate
from shardtrain.plan.given import batch_spec
from shardtrain.plan.make import plan
from shardtrain.plan.plan import Plan
from shardtrain.tree import flatten, table


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What may differ: `gradients`, relative; `losses` and gradient norms over ten steps (after them ten times as much), and
    `rest` (sums of gradients, parameters, optimizer state), as multiples of it; `eps`: one rounding."""

    gradients: float
    losses: float
    rest: float
    eps: float


BOUNDS = {
    "f64": Bounds(1e-12, 1, 1, float(np.finfo(np.float64).eps)),
    "f32": Bounds(1e-5, 1, 10, float(np.finfo(np.float32).eps)),
    "bf16": Bounds(5e-2, 0.1, 1, float(jnp.finfo(jnp.bfloat16).eps)),
    "int8": Bounds(3e-2, 0.1, 1, float(np.finfo(np.float32).eps)),
    "fp8": Bounds(1e-1, 0.1, 1, float(np.finfo(np.float32).eps)),
}
"""By precision. In 16 bits two orders of a sum differ by as much as a small fault: a bound on sanity alone.

In 8 bits (`quant`) a last bit can move a value to its neighbour, layer after layer: two layouts may come to differ by as
much as both do from float32, 1.3% (int8) and 5% (fp8) of a gradient's norm on a small GPT. In f64 no bit is near enough to
move one, so there the bound is that of f64."""


def bounds_of(precision: str, quant: str | None) -> Bounds:
    """Of a comparison in this precision, with products in 8 bits or None."""
    bounds = BOUNDS[precision]
    if quant is None or precision == "f64":
        return bounds
    return dataclasses.replace(max(bounds, BOUNDS[quant], key=lambda b: b.gradients), eps=bounds.eps)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One layout against one device. Differences are relative; `first_difference` names the first leaf over its
    tolerance, or says why the layout cannot be. `flips`: of the choices of experts in the first step, by token, layer and
    place, those that the reference did not make; None of a model that makes none."""

    layout: str
    mesh: dict[str, int]
    rules: str
    microbatches: int
    groups: int
    loss: float | None
    grad_norm: float | None
    gradients: float | None
    parameters: float | None
    optimizer: float | None
    flips: int | None
    equal: bool | None
    first_difference: str | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """All layouts. `equal`: every one that can be is, and there is one; `reference`: what they were held against."""

    layouts: tuple[Compared, ...]
    reference: str
    tolerance: float

    @property
    def equal(self) -> bool:
        return any(c.equal for c in self.layouts) and all(c.equal is not False for c in self.layouts)

    def as_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "reference": self.reference,
            "tolerance": self.tolerance,
            "layouts": [dataclasses.asdict(c) for c in self.layouts],
        }

    def __str__(self) -> str:
        number = lambda x: "" if x is None else f"{x:.1e}"  # noqa: E731
        plain = all(c.flips is None for c in self.layouts)
        verdict = {True: "equal", False: "DIFFERS", None: "cannot be"}
        rows = [
            (
                c.layout,
                verdict[c.equal],
                *(number(x) for x in (c.gradients, c.loss, c.grad_norm, c.parameters, c.optimizer)),
                *([] if plain else ["" if c.flips is None else str(c.flips)]),
                c.first_difference or "",
            )
            for c in self.layouts
        ]
        heads = (
            "layout",
            "",
            "gradients",
            "loss",
            "grad norm",
            "parameters",
            "optimizer",
            *([] if plain else ["flips"]),
            "first difference",
        )
        count = sum(c.equal is not None for c in self.layouts)
        same = sum(bool(c.equal) for c in self.layouts)
        return "\n".join(
            [
                f"against {self.reference}",
                table(heads, rows),
                f"{same} of {count} layouts are equal within {self.tolerance:g}",
            ]
        )


def verify(
    model: Any,
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    batches: Sequence[Any],
    *,
    layouts: Iterable[str | Candidate],
    steps: int = 10,
    groups: int = 1,
    seed: int = 0,
    precision: str = "f32",
    quant: str | None = None,
    tolerance: float | None = None,
    devices: Sequence[Any] | None = None,
    say: Callable[[Compared], None] | None = None,
    **options: Any,
) -> Verification:
    """Train on one device and on each layout, and compare leaf by leaf.

    Args:
        model, loss_fn, optimizer: see `st.plan`, as are further options (`annotations`, `trainable`, ...).
        batches: global batches as dicts of arrays; step i takes batch i modulo their number.
        layouts: names such as `data2-fsdp4` or `tensor8+tensor_sequence`; see `plan.candidates`.
        steps: of the comparison.
        groups: at least so many, as in a config; each layout takes the next multiple of its batch shards x microbatches.
        precision, quant: of the comparison, see `st.plan`; "f64" needs JAX's 64 bits.
        tolerance: of gradients; default 1e-12 in f64, 1e-5 in f32, 0.05 in bf16, 0.03 in int8, 0.1 in fp8. Losses and
            norms within it (in bf16 and 8 bits a tenth of it) over 10 steps and ten times that after; parameters and
            optimizer state within it (in f32 ten times it).
        devices: defaults to all; the reference runs on the first.
        say: called with each result as it comes.

    Returns:
        A `Verification`. A layout that the plan refuses (a dim that does not divide) is in it with the reason.

    Raises:
        What `st.plan` raises for the reference.
    """
    here = list(jax.devices() if devices is None else devices)
    dtype_of("precision", precision)
    check_quant(quant, {}, ())
    bounds = bounds_of(precision, quant)
    if tolerance is not None:
        bounds = dataclasses.replace(bounds, gradients=tolerance)
    wanted = [Candidate.parse(c) if isinstance(c, str) else c for c in layouts]
    if not wanted:
        raise ConfigError("no layouts", where="verify", fix="layouts=['data8', ...]")
    spec = batch_spec(**batches[0])
    references: dict[int, _Trained] = {}

    def made(sizes: dict[str, Any], count: int, use: list[Any], **more: Any) -> Plan:
        return plan(
            model,
            loss_fn,
            optax.chain(_record(), optimizer),
            batch=spec,
            mesh=make_mesh(devices=use, **sizes),
            groups=count,
            precision=precision,
            quant=quant,
            **options,
            **more,
        )

    def one(candidate: Candidate) -> Compared:
        start = time.monotonic()
        blank: dict[str, Any] = dict.fromkeys(
            ("loss", "grad_norm", "gradients", "parameters", "optimizer", "flips")
        )
        more = candidate.options
        asked, common = more.pop("microbatches"), (candidate.name, candidate.mesh, candidate.rules)
        try:
            if candidate.devices > len(here):
                raise ConfigError(
                    f"{candidate.devices} devices, there are {len(here)}", where=candidate.name, fix="fewer"
                )
            shards = plan_shards(candidate, here)
            count = -(-groups // (shards * candidate.microbatches)) * shards * candidate.microbatches
            layout = made(candidate.mesh, count, here[: candidate.devices], **more)
            ours = _train(layout, batches, steps, seed)
        except ShardTrainError as error:
            why = str(error).splitlines()[0]
            return Compared(*common, asked, 0, **blank, equal=None, first_difference=why, seconds=0.0)
        if count not in references:
            references[count] = _train(made({"data": 1}, count, here[:1]), batches, steps, seed)
        found = _compare(ours, references[count], bounds)
        return Compared(
            *common, layout.microbatches, count, **found, seconds=round(time.monotonic() - start, 1)
        )

    results = []
    for candidate in wanted:
        results.append(one(candidate))
        if say is not None:
            say(results[-1])
    text = (
        f"one device with the same groups, {steps} steps, {precision}{f', {quant} products' if quant else ''}"
    )
    return Verification(tuple(results), text, bounds.gradients)


def plan_shards(candidate: Candidate, devices: Sequence[Any]) -> int:
    """Parts into which a layout divides the rows of the batch."""
    from shardtrain.parallel.presets import PRESETS

    sizes: dict[str, Any] = candidate.mesh
    mesh = make_mesh(devices=list(devices)[: candidate.devices], **sizes)
    shards = 1
    for axis in PRESETS[candidate.rules].batch_axes(mesh):
        shards *= mesh.shape[axis]
    return shards


@dataclasses.dataclass(frozen=True)
class _Trained:
    gradients: dict[str, np.ndarray]
    total: dict[str, np.ndarray]
    losses: np.ndarray
    norms: np.ndarray
    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    choices: np.ndarray | None = None


def _record() -> optax.GradientTransformation:
    """Keeps the gradients of the last step and the sum of all; passes them on as they are."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p)), params)
        return {"last": zeros, "total": zeros}

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return grads, {"last": grads, "total": jax.tree.map(jnp.add, state["total"], grads)}

    return optax.GradientTransformation(init, update)


def _train(made: Plan, batches: Sequence[Any], steps: int, seed: int) -> _Trained:
    step, state = made.compile(), made.init(seed)
    whole = lambda tree: jax.device_get(flatten(tree))  # noqa: E731
    first: dict[str, np.ndarray] = {}
    choices = chosen(made, state, batches[0])
    losses, norms = [], []
    for index in range(steps):
        batch = batches[index % len(batches)]
        rows = jax.tree.map(lambda x: np.asarray(x)[made.rows], batch)
        state, metrics = step(state, made.put(rows))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if index == 0:
            first = whole(state.opt_state[0]["last"])
    return _Trained(
        first,
        whole(state.opt_state[0]["total"]),
        np.array(losses),
        np.array(norms),
        whole(state.params),
        {k: v for k, v in whole(state.opt_state[1:]).items() if np.issubdtype(v.dtype, np.floating)},
        choices,
    )


def chosen(made: Plan, state: Any, batch: Any) -> np.ndarray | None:
    """int [rows, tokens, layers, k]: the experts that each token takes in the step from this state; rows by group."""
    rows = jax.tree.map(lambda x: np.asarray(x)[made.rows], batch)
    found = jax.jit(made.choices)(state, made.put(rows))
    return None if found is None else np.asarray(found)


def flips(ours: np.ndarray | None, reference: np.ndarray | None) -> int | None:
    """How many choices [..., k] are of an expert that is not among the reference's."""
    if ours is None or reference is None:
        return None
    return int((ours[..., :, None] != reference[..., None, :]).all(-1).sum())


def _compare(ours: _Trained, reference: _Trained, bounds: Bounds) -> dict[str, Any]:
    gradients = _leaves(ours.gradients, reference.gradients, bounds)
    total = _leaves(ours.total, reference.total, bounds)
    params = _against_all(ours.params, reference.params)
    optimizer = _against_all(ours.optimizer, reference.optimizer) if reference.optimizer else {}
    relative = lambda a, b: np.abs(a - b) / np.maximum(np.abs(b), 1e-30)  # noqa: E731
    loss, norm = relative(ours.losses, reference.losses), relative(ours.norms, reference.norms)
    tolerance, rest = bounds.gradients, bounds.gradients * bounds.rest
    allowed = tolerance * bounds.losses * np.where(np.arange(len(loss)) < 10, 1, 10)
    checks = [
        *((f"gradient of {k}: {d:.1e}", d, tolerance) for k, d in gradients.items()),
        *((f"loss of step {i + 1}: {d:.1e}", d, allowed[i]) for i, d in enumerate(loss)),
        *((f"gradient norm of step {i + 1}: {d:.1e}", d, allowed[i]) for i, d in enumerate(norm)),
        *((f"sum of gradients of {k}: {d:.1e}", d, rest) for k, d in total.items()),
        *((f"parameter {k}: {d:.1e}", d, rest) for k, d in params.items()),
        *((f"optimizer {k}: {d:.1e}", d, rest) for k, d in optimizer.items()),
    ]
    # Not "greater than": a difference that is no number is one too.
    first = next((text for text, d, limit in checks if not d <= limit), None)
    went = flips(ours.choices, reference.choices)
    if first is not None and went:
        first += f"; {went} choices went to another expert"
    worst = lambda values: float(np.max(list(values), initial=0.0))  # noqa: E731
    return {
        "loss": worst(loss),
        "grad_norm": worst(norm),
        "gradients": worst(gradients.values()),
        "parameters": worst(params.values()),
        "optimizer": worst(optimizer.values()),
        "flips": went,
        "equal": first is None,
        "first_difference": first,
    }


def _norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def _global_norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(_norm(v) ** 2 for v in tree.values())))


def _leaves(
    ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], bounds: Bounds
) -> dict[str, float]:
    """Against each leaf's own norm; the floor allows two roundings of the global norm at this tolerance."""
    floor = 2 * bounds.eps / bounds.gradients * _global_norm(reference)
    return {k: _norm(np.float64(ours[k]) - reference[k]) / max(_norm(reference[k]), floor) for k in reference}


def _against_all(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    total: float = max(_global_norm(reference), 1e-30)
    return {k: _norm(np.float64(ours[k]) - reference[k]) / total for k in reference}
