"""Bad steps leave no trace: skipped in the program, told with their rows, rewound where a guard says so."""

import functools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.checkpoint import faults
from shardtrain.errors import ConfigError, DataError, RunError
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.parallel.precision import widen
from shardtrain.train import guard as guards
from shardtrain.train.state import advance
from shardtrain.train.step import _ratios, gradients
from shardtrain.tree import flatten

ROWS, WIDTH = 8, 64
GPT = GPTConfig(vocab=64, sequence=8, embed=32, layers=2, heads=2, dropout=0.1)
MESHES = {
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tensor": {"fsdp": 2, "tensor": 2},
    "stage": {"stage": 2, "data": 2},
}


class Mlp(nnx.Module):
    def __init__(self, rngs):
        draw = nnx.initializers.normal(0.1)
        self.up = nnx.Linear(WIDTH, 64, rngs=rngs, kernel_init=st.logical(draw, "embed", "mlp"))
        self.down = nnx.Linear(64, WIDTH, rngs=rngs, kernel_init=st.logical(draw, "mlp", "embed"))
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.down(st.constrain(self.drop(nnx.gelu(self.up(x))), "batch", "mlp"))


def mlp_loss(model, batch):
    each = jnp.square(model(batch["x"]) - batch["x"]).sum(-1)
    return st.Loss((each * batch["weights"]).sum(), batch["weights"].sum())


def batch(name, number, bad=False):
    """A pipeline has a language model, the others rows of numbers; a bad one has one weight that is no number."""
    random = np.random.default_rng(number)
    shape = (ROWS, 8) if name == "stage" else (ROWS,)
    weights = np.ones(shape, np.float32)
    if bad:
        weights[tuple(random.integers(shape))] = np.nan
    if name != "stage":
        return {"x": random.normal(size=(ROWS, WIDTH)).astype(np.float32), "weights": weights}
    drawn = random.integers(0, 64, (ROWS, 9)).astype(np.int32)
    return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "weights": weights}


def mesh_of(sizes):
    return st.make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)


def bits(state, *fields):
    """Path -> bytes, of whole fields of a state."""
    leaves = {name: x for name, x in flatten(state).items() if name.startswith(fields)}
    return {name: np.asarray(x).tobytes() for name, x in leaves.items()}


def trained(step, plan, batches):
    state, seen = plan.init(0), []
    for batch in batches:
        state, metrics = step(state, plan.put(batch))
        seen.append(metrics)
    return state, jax.device_get(seen)


def planned(name, guard):
    return st.plan(
        (lambda rngs: build_model(GPT, rngs)) if name == "stage" else Mlp,
        language_model_loss if name == "stage" else mlp_loss,
        optax.adamw(1e-2),
        batch=st.batch_spec(**batch(name, 0)),
        mesh=mesh_of(MESHES[name]),
        groups=8,
        guard=guard,
    )


TRACELESS = (
    "params",
    "model_state",
    "opt_state",
    "key",
    "grad_state/guard/mean",
    "grad_state/guard/variance",
    "grad_state/guard/seen",
)


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", pytest.param("stage", marks=pytest.mark.slow)])
def test_a_skipped_batch_leaves_no_trace(name):
    """NaN at random steps, dropout on: every bit as if the batch had never come. Failed once with keys of the step's
    number, and once with the moments of Adam not put back."""
    plan = planned(name, st.Guard())
    step = plan.compile(donate=False)
    bad = set(np.random.default_rng(len(name)).choice(9, 4, replace=False).tolist())
    state, seen = trained(step, plan, [batch(name, i, i in bad) for i in range(9)])
    clean, _ = trained(step, plan, [batch(name, i) for i in range(9) if i not in bad])
    assert bits(state, *TRACELESS) == bits(clean, *TRACELESS)
    assert [int(m["skipped"]) for m in seen] == [guards.LOSS if i in bad else 0 for i in range(9)]
    assert [float(m["tokens"]) for m in seen] == [
        0.0 if i in bad else batch(name, i)["weights"].sum() for i in range(9)
    ]
    assert int(state) == 9 and state.rows_consumed() == 9 * ROWS
    assert int(state.grad_state["guard"]["skipped"]) == 4
    assert all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves(state.params)))


def test_statistics_of_a_skipped_batch_are_forgotten():
    """BatchNorm's means come back too. Failed once with the new variables kept."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    plan = st.plan(
        Model,
        lambda model, batch: jnp.square(model(batch["x"]) - 1).mean(),
        optax.adam(1e-2),
        batch=st.batch_spec(x=(ROWS, 4)),
        mesh=mesh_of({"data": 4}),
        guard=st.Guard(),
    )
    step = plan.compile(donate=False)
    rows = [np.random.default_rng(i).normal(size=(ROWS, 4)).astype(np.float32) for i in range(4)]
    rows[2][0, 0] = np.inf
    state, _ = trained(step, plan, [{"x": x} for x in rows])
    clean, _ = trained(step, plan, [{"x": x} for i, x in enumerate(rows) if i != 2])
    assert bits(state, *TRACELESS) == bits(clean, *TRACELESS)
    assert "norm" in "".join(bits(state, "model_state"))


PAIR = (lambda key: {"w": jnp.ones((8,))}, lambda p, x: x * p["w"])


def pair_loss(model, batch):
    """Its gradient has the norm of the first row's; where all is 0, the root has none."""
    return jnp.sqrt(jnp.square(model(batch["x"])).sum(-1)).mean()


@functools.cache
def pair_plan(guard):
    return st.plan(
        PAIR,
        pair_loss,
        optax.sgd(1e-4),
        batch=st.batch_spec(x=(ROWS, 8)),
        mesh=mesh_of({"data": 2}),
        guard=guard,
    )


def scaled(*sizes):
    return [{"x": np.full((ROWS, 8), size, np.float32)} for size in sizes]


def test_reasons_and_memory():
    """A gradient that is none under a finite loss; a spike, not before `window` steps; mean and variance as NumPy has
    them. Failed once with the spike's own norm in the mean, and once without waiting for the window."""
    plan = pair_plan(st.Guard(spike=6, window=4))
    sizes = [1, 100, 1.1, 0.9, 0, 1.2, 1e6, np.inf, 1]
    state, seen = trained(plan.compile(donate=False), plan, scaled(*sizes))
    assert [int(m["skipped"]) for m in seen] == [
        *[0, 0, 0, 0, guards.GRADIENT, 0, guards.SPIKE, guards.LOSS, 0]
    ]
    assert [int(m["skips"]) for m in seen] == [0, 0, 0, 0, 1, 0, 1, 2, 0]
    assert np.isfinite(seen[4]["loss"])
    heights = np.log([float(m["grad_norm"]) for m in seen if not m["skipped"]])
    mean, variance = 0.0, 0.0
    for count, height in enumerate(heights):
        share = 1 / min(count + 1, 4)
        mean, variance = (
            mean + share * (height - mean),
            (1 - share) * (variance + share * (height - mean) ** 2),
        )
    memory = state.grad_state["guard"]
    np.testing.assert_allclose([memory["mean"], memory["variance"]], [mean, variance], rtol=1e-5)
    assert int(memory["seen"]) == 6 and int(memory["skipped"]) == 3


def test_without_a_guard_the_program_is_what_it_was():
    """Equation by equation, the step as it is written down here. Failed once with a guard that was always on."""

    def plain(plan, state, batch):
        parts = plan._parts(train=True)
        grads, scalars, _, names = gradients(
            parts, state.params, state.model_state, state.key, state.step, batch
        )
        weight = jnp.maximum(scalars[1], jnp.finfo(scalars.dtype).tiny)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, jax.tree.map(widen, state.params))
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": scalars[0] / weight,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(jax.tree.map(widen, params)),
            "tokens": scalars[1],
            **_ratios(scalars, names),
        }
        new = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, cursor=advance(state.cursor, ROWS)
        )
        return new, metrics

    def program(function, plan):
        return str(jax.make_jaxpr(function)(plan.abstract_state, plan.batch))

    for guard in (None, st.Guard(on_bad="off")):
        plan = pair_plan(guard)
        assert program(plan.step, plan) == program(functools.partial(plain, plan), plan)
        assert not any(name.startswith("grad_state") for name in flatten(plan.abstract_state))
    guarded = pair_plan(st.Guard())
    assert program(guarded.step, guarded) != program(functools.partial(plain, guarded), guarded)


def test_a_guard_sends_nothing():
    """The same collectives with one as without: what it judges is there already. Failed once with the norm of the
    parameters that were kept, which had to wait for the verdict."""
    plain, guarded = (planned("fsdp", guard).compile().collectives() for guard in (None, st.Guard(spike=6)))
    assert str(plain) == str(guarded) and "all-reduce" in str(plain)


def fit(output, steps, *, bad=(), guard=None, every=3, batches=None, **options):
    """Rows that are all alike within a batch, whose sizes tell it; batch i (from 0) is NaN where it is in `bad`."""
    data = [{"x": np.full((ROWS, 8), np.nan if i in bad else 1 + 0.1 * i, np.float32)} for i in range(steps)]
    return st.fit(
        PAIR,
        pair_loss,
        optax.adam(1e-2),
        data if batches is None else batches,
        mesh=mesh_of({"data": 2}),
        steps=steps,
        output=output,
        checkpoint_every=every,
        keep=10,
        progress=False,
        guard=guard,
        **options,
    )


@pytest.fixture(scope="module")
def clean():
    """Twelve batches without the fourth."""
    batches = [b for i, b in enumerate(scaled(*[1 + 0.1 * i for i in range(12)])) if i != 7]
    return fit(None, 11, guard=st.Guard(), batches=batches)


def test_skips_in_the_loop(clean, tmp_path, caplog):
    """History says which and why, the log has the rows. The fault in mind: the loop stops at what the guard took care of."""
    run = fit(tmp_path, 12, bad=[7], guard=st.Guard())
    assert bits(run.state, *TRACELESS) == bits(clean.state, *TRACELESS)
    assert [row["step"] for row in run.history if row["skipped"]] == [8]
    assert "step 8: skipped, rows 56 to 63: the loss is nan" in caplog.text


def test_too_many_skips_in_a_row(tmp_path):
    """Two alone pass, three in a row end it, also when one of them came before a new start. Failed once with a count of
    all skips."""
    guard = st.Guard(limit=3)
    with pytest.raises(RunError, match="3 steps in a row") as caught:
        fit(tmp_path, 12, bad=[1, 2, 4, 7, 8, 9], guard=guard, every=4)
    assert "steps 8 to 10" in str(caught.value) and "rows 56 to 79" in str(caught.value)
    with pytest.raises(RunError, match="steps 8 to 10"):
        fit(tmp_path, 12, bad=[7, 8, 9], guard=guard)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "8", "9"]


def test_stop(tmp_path):
    """At the first bad step, which changed nothing. The fault in mind: `stop` skips."""
    with pytest.raises(RunError, match=r"step 8: the loss is nan\n.*rows 56 to 63"):
        fit(tmp_path, 12, bad=[7], guard=st.Guard(on_bad="stop"))


REWIND = st.Guard(on_bad="rewind")


def test_rewind(clean, tmp_path, caplog):
    """Back to the last commit, and past the batch: every row of metrics once, every bit as without it. Later starts
    from before make the same choice, without going back. Failed once with the record kept in memory alone, and
    once with the old rows of metrics left."""
    run = fit(tmp_path, 12, bad=[7], guard=REWIND)
    assert bits(run.state, *TRACELESS) == bits(clean.state, *TRACELESS)
    assert "step 8: the loss is nan; back to step 6, and past rows 56 to 63" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["skipped"]) for r in rows] == [
        (n, guards.PASSED if n == 8 else 0) for n in range(1, 13)
    ]
    assert [(r["step"], r["skipped"]) for r in run.history] == [(r["step"], r["skipped"]) for r in rows]
    record = json.loads((tmp_path / "passed_over.json").read_text())
    assert record == [{"step": 8, "rows": [56, 63], "why": "the loss is nan", "rewound_to": 6}]
    for step in (6, 9, 12):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    again = fit(tmp_path, 12, bad=[], guard=REWIND)
    assert again.resumed_from == 3
    assert bits(again.state, *TRACELESS) == bits(clean.state, *TRACELESS)
    assert json.loads((tmp_path / "passed_over.json").read_text()) == record
    for step in (9, 12):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    with pytest.raises(ConfigError, match=r"passed_over.json: passes over 1 steps to come, from 8 on"):
        fit(tmp_path, 12)


def test_rewind_before_the_first_commit(clean, tmp_path, monkeypatch):
    """A fault that does not come again, and nothing saved: from the start, past the batch all the same. The fault in
    mind: numbers of steps that count anew after a rewind."""
    monkeypatch.setenv("SHARDTRAIN_INJECT", "nan@step=8")
    run = fit(tmp_path, 12, guard=REWIND, every=None)
    assert bits(run.state, *TRACELESS) == bits(clean.state, *TRACELESS)
    assert json.loads((tmp_path / "passed_over.json").read_text())[0]["rewound_to"] == 0


def test_rewind_while_a_save_fails(clean, tmp_path, monkeypatch, caplog):
    """The save under way is lost, the one before is gone back to. Failed once with the failed save's error as the end."""
    fill = faults.fill_disk

    def late(checkpointer, saves):
        fill(checkpointer, saves)
        full = checkpointer.fault
        checkpointer.fault = lambda: (time.sleep(1), full())  # after the loop has come to step 8

    monkeypatch.setattr(faults, "fill_disk", late)
    monkeypatch.setenv("SHARDTRAIN_INJECT", "disk-full@step=5:saves=1")
    run = fit(tmp_path, 12, bad=[7], guard=REWIND)
    assert "No space left" in caplog.text and "step 8: the loss is nan; back to step 3" in caplog.text
    assert bits(run.state, *TRACELESS) == bits(clean.state, *TRACELESS)


def test_rewind_refuses(tmp_path):
    """No folder, data that cannot be read again, a record that is none. The fault in mind: a generator that goes on from
    where it is, as if nothing had been read."""
    with pytest.raises(ConfigError, match="without a folder"):
        fit(None, 4, guard=REWIND)
    with pytest.raises(DataError, match="a second time from the start"):
        fit(tmp_path, 4, guard=REWIND, batches=iter(scaled(1, np.nan, 1, 1)))
    (tmp_path / "passed_over.json").write_text("{}}")
    with pytest.raises(RunError, match=r"passed_over.json: cannot be read"):
        fit(tmp_path, 4, guard=REWIND)


def test_a_guard_comes_and_goes(tmp_path, caplog):
    """A run that stopped goes on with a guard, and later without, bit for bit. Failed once with its memory among what
    must be equal."""
    fit(tmp_path, 6)
    run = fit(tmp_path, 9, guard=st.Guard())
    assert run.resumed_from == 6 and "grad_state/guard starts anew" in caplog.text
    assert int(run.state.grad_state["guard"]["seen"]) == 3
    last = fit(tmp_path, 12)
    assert last.resumed_from == 9 and "is left behind" in caplog.text
    whole = fit(None, 12)
    assert bits(last.state, "params", "opt_state", "cursor") == bits(
        whole.state, "params", "opt_state", "cursor"
    )


@pytest.mark.parametrize("wrong", [{"on_bad": "ignore"}, {"spike": 0.0}, {"window": 0}, {"limit": 0}])
def test_wrong_arguments(wrong):
    """The fault in mind: a limit of 0, which every step reaches."""
    with pytest.raises(ConfigError, match=f"guard.{next(iter(wrong))}"):
        st.Guard(**wrong)
