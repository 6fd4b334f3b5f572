"""A run on eight devices, gone on with on 8, 4, 2 and 1: the state bit for bit, the samples in their order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st

WIDTH, ROWS, GROUPS = 32, 16, 8
MODEL = (
    lambda key: {"layers": {"w": jax.random.normal(key, (4, WIDTH, WIDTH)) / 8}, "out": jnp.eye(WIDTH)},
    lambda p, x: (
        jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"]), None), x, p["layers"])[0] @ p["out"]
    ),
)


def head(model, x, batch):
    each = jnp.square(x @ model.params["out"] - batch["y"]).mean(-1)
    ids = batch["id"].astype(jnp.float32)
    return st.Loss(
        each.sum(), jnp.float32(each.size), {"ids": (ids.sum(), 1.0), "squares": ((ids**2).sum(), 1.0)}
    )


LOSS = st.Stages(
    embed=lambda model, batch: batch["x"],
    block=lambda layer, x: jnp.tanh(x @ layer["w"]),
    head=head,
    blocks="layers",
)
LAYOUTS = {
    "fsdp": [{"fsdp": 8}, {"fsdp": 4}, {"fsdp": 2}, {"data": 1}],
    "tensor": [{"data": 2, "tensor": 4}, {"tensor": 4}, {"tensor": 2}, {"data": 1}],
    "stage": [{"stage": 4, "data": 2}, {"stage": 4}, {"stage": 2}, {"data": 1}],
    "slice": [{"slice": 2, "fsdp": 4}, {"slice": 2, "data": 2}, {"fsdp": 2}, {"slice": 2}],
}


def data():
    random = np.random.default_rng(0)
    arrays = {k: random.normal(size=(100, WIDTH)).astype(np.float32) for k in ("x", "y")}
    return st.ArrayLoader({**arrays, "id": np.arange(100, dtype=np.int32)}, ROWS, seed=3)


def plan_on(sizes):
    count = int(np.prod(list(sizes.values())))
    return st.plan(
        MODEL,
        LOSS,
        optax.adamw(1e-2),
        batch=data().batch_spec,
        mesh=st.make_mesh(devices=jax.devices()[:count], **sizes),
        groups=GROUPS,
        annotations=st.annotate({"layers/w": ("layers", "embed", "mlp"), "out": ("mlp", "embed")}),
    )


def steps(plan, state, count):
    """The state after `count` steps, and the samples that each saw."""
    step, seen = plan.compile(), []
    batches = data().starting_at(state.rows_consumed())
    for _ in range(count):
        state, metrics = step(state, plan.put(next(batches)))
        seen.append((float(metrics["ids"]), float(metrics["squares"]), float(metrics["loss"])))
    return state, seen


@pytest.fixture(scope="module")
def reference():
    plan = plan_on({"data": 1})
    return steps(plan, plan.init(0), 5)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_and_fewer(layout, tmp_path, reference):
    """The faults in mind: a leaf saved as bfloat16, and a cursor left at 0."""
    first, *others = LAYOUTS[layout]
    plan = plan_on(first)
    with st.Checkpointer(tmp_path) as checkpointer:
        state, seen = steps(plan, checkpointer.restore_or_init(plan), 3)
        checkpointer.save(state, force=True)
        checkpointer.wait()
        held = [np.asarray(leaf).copy() for leaf in state.leaves]
        for sizes in (first, *others):
            smaller = plan_on(sizes)
            state = checkpointer.restore(smaller)
            here = [np.asarray(leaf) for leaf in state.leaves]
            assert [a.tobytes() for a in here] == [b.tobytes() for b in held]
            assert [a.dtype for a in here] == [b.dtype for b in held] and smaller.groups == GROUPS
    _, more = steps(smaller, state, 2)
    np.testing.assert_allclose([*seen, *more], reference, rtol=2e-5)
    assert [row[:2] for row in [*seen, *more]] == [row[:2] for row in reference]
