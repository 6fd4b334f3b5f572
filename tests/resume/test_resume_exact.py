"""Interrupted anywhere and started again on any mesh: the same losses, every sample once."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st

WIDTH, ROWS, STEPS = 64, 16, 12
MODEL = (
    lambda key: {"w": 0.1 * jnp.ones((WIDTH, WIDTH)), "v": 0.1 * jnp.eye(WIDTH)},
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
)
AXES = st.annotate({"w": ("embed", "mlp"), "v": ("mlp", "embed")})
MESHES = {
    "hybrid": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 2, "tensor": 4},
}


def loss(model, batch):
    """Also says which samples a step saw: sums of powers of two would overflow, so a sum and a sum of squares."""
    each = jnp.square(model(batch["x"]) - batch["y"]).mean(-1)
    ids = batch["id"].astype(jnp.float32)
    return st.Loss(
        each.sum(), jnp.float32(each.size), {"ids": (ids.sum(), 1.0), "squares": ((ids**2).sum(), 1.0)}
    )


def data():
    random = np.random.default_rng(0)
    arrays = {k: random.normal(size=(500, WIDTH)).astype(np.float32) for k in ("x", "y")}
    return st.ArrayLoader({**arrays, "id": np.arange(500, dtype=np.int32)}, ROWS, seed=3)


def fit(mesh, output=None, *, steps=STEPS, groups=None, **options):
    if output is None or not (output / "checkpoints").exists():
        groups = 8  # later starts find it in the checkpoint
    return st.fit(
        MODEL,
        loss,
        optax.adamw(1e-2),
        data(),
        mesh=st.make_mesh(**MESHES[mesh]),
        steps=steps,
        groups=groups,
        annotations=AXES,
        output=output,
        progress=False,
        checkpoint_every=3,
        **options,
    )


@pytest.fixture(scope="module")
def whole():
    return fit("hybrid")


def curve(run, name="loss"):
    return [row[name] for row in run.history]


@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_same_mesh_bit_for_bit(whole, tmp_path, stop):
    """Failed once with the data cursor counted in batches of another size."""
    fit("hybrid", tmp_path, steps=stop)
    run = fit("hybrid", tmp_path)
    assert run.resumed_from == stop
    assert curve(run) == curve(whole)
    assert curve(run, "ids") == curve(whole, "ids") and curve(run, "squares") == curve(whole, "squares")


@pytest.mark.parametrize(("first", "second"), [("hybrid", "fsdp"), ("fsdp", "tensor"), ("tensor", "hybrid")])
def test_another_mesh(whole, tmp_path, first, second):
    """The same rows in the same groups; losses equal to rounding. Failed once with groups from the new mesh."""
    fit(first, tmp_path, steps=5)
    run = fit(second, tmp_path)
    assert run.resumed_from == 5
    np.testing.assert_allclose(curve(run), curve(whole), rtol=1e-5)
    assert curve(run, "ids") == curve(whole, "ids") and curve(run, "squares") == curve(whole, "squares")


def test_interrupted_by_a_hook(whole, tmp_path):
    """An exception in the middle loses nothing that was committed. The fault in mind: the manifest came first."""

    def bomb(step, metrics):
        if step == 7:
            raise KeyError("planted")

    with pytest.raises(KeyError):
        fit("hybrid", tmp_path, hooks=[bomb])
    run = fit("hybrid", tmp_path)
    assert run.resumed_from == 6
    assert curve(run) == curve(whole)


def test_a_finished_run_stays_finished(whole, tmp_path):
    """The fault in mind: a step was trained past the end."""
    fit("hybrid", tmp_path)
    run = fit("hybrid", tmp_path)
    assert run.resumed_from == STEPS and run.step == STEPS and curve(run) == curve(whole)


def test_every_sample_once(whole):
    """One epoch is a permutation: 500 samples, 31 batches of 16 and a bit. Failed once with sampling."""
    loader = data()
    iterator = loader.starting_at(0)
    seen = np.concatenate([next(iterator)["id"] for _ in range(125)])  # 2,000 rows: four epochs
    for epoch in range(4):
        assert sorted(seen[500 * epoch : 500 * (epoch + 1)]) == list(range(500))
    assert list(seen[:500]) != list(seen[500:1000])


@pytest.mark.parametrize("kind", ["dicts", "tuples", "generator"])
def test_any_iterable(kind, tmp_path):
    """Batches of dicts or tuples, from a list or a generator. The fault in mind: the first batch was lost."""
    batches = [{"x": np.full((ROWS, WIDTH), i, np.float32)} for i in range(4)]
    if kind != "dicts":
        batches = [(b["x"],) for b in batches]
    source = (b for b in batches) if kind == "generator" else batches
    field = "x" if kind == "dicts" else "0"
    seen = lambda model, batch: st.Loss(
        jnp.square(model(batch[field])).sum(), jnp.float32(ROWS), {"mean": batch[field].mean()}
    )
    run = st.fit(MODEL, seen, optax.sgd(1e-3), source, mesh=st.make_mesh(data=8), steps=4, progress=False)
    assert curve(run, "mean") == [0, 1, 2, 3]
    assert run.step == 4 and run.path is None


def test_evaluation_is_exact():
    """The held-out loss is the sum over all rows over the sum of weights. The fault in mind: a mean of batch means."""
    held_out = [{"x": np.full((ROWS, WIDTH), i, np.float32)} for i in (1, 5)]
    held_out[1]["x"][4:] = 0
    seen = lambda model, batch: st.Loss(batch["x"].sum(), (batch["x"] > 0).sum())
    model = (lambda key: {"w": jnp.ones((WIDTH, WIDTH))}, lambda p, x: x)
    train = [{"x": np.ones((ROWS, WIDTH), np.float32)}]
    run = st.fit(
        model,
        seen,
        optax.sgd(0.0),
        train,
        mesh=st.make_mesh(data=8),
        steps=2,
        eval_data=held_out,
        progress=False,
    )
    total = sum(b["x"].sum() for b in held_out)
    assert run.evaluations == [
        {"step": 2, "loss": pytest.approx(total / sum((b["x"] > 0).sum() for b in held_out))}
    ]
