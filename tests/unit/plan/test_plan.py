"""The Plan: allocates nothing, refuses before compiling, keeps its promises about state, rows and calls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import shardtrain as st
from shardtrain.tree import flatten


class Mlp(nnx.Module):
    def __init__(self, d, f, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(d, f, rngs=rngs, kernel_init=st.logical(init, "embed", "mlp"))
        self.down = nnx.Linear(f, d, rngs=rngs, kernel_init=st.logical(init, "mlp", "embed"))

    def __call__(self, x):
        return self.down(st.constrain(nnx.gelu(self.up(x)), "batch", "mlp"))


def loss(model, batch):
    return jnp.square(model(batch["x"])).mean()


def make(mesh=None, *, model=None, loss_fn=loss, rows=32, width=64, **options):
    model = model or (lambda rngs: Mlp(width, 256, rngs))
    options = {"rules": "fsdp_tensor", **options}
    return st.plan(
        model,
        loss_fn,
        optax.adam(1e-3),
        batch=st.batch_spec(x=(rows, 64)),
        mesh=mesh or st.make_mesh(fsdp=8),
        **options,
    )


def test_allocates_nothing():
    """The fault in mind: an eager `model()` in as_model."""
    before = {id(x) for x in jax.live_arrays()}
    plan = make()
    assert not [x.shape for x in jax.live_arrays() if id(x) not in before]
    assert "up/kernel" in str(plan) and plan.state_bytes < 3 * 4 * plan.parameter_count / 7


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        (
            st.ShardingError,
            lambda: make(st.make_mesh(fsdp=8), rules="data"),
            ["fsdp=8", "carries nothing", "fsdp=1"],
        ),
        (st.ShardingError, lambda: make(st.make_mesh(data=2, expert=4)), ["expert=4"]),
        (st.ConfigError, lambda: make(rules="fsdq"), ["fsdq", "fsdp"]),
        (
            st.ShardingError,
            lambda: make(st.make_mesh(tensor=8), model=lambda r: Mlp(64, 250, r)),
            ["/kernel", "250", "tensor=8", "mlp=256"],
        ),
        (
            st.ShardingError,
            lambda: make(st.make_mesh(tensor=8), model=lambda r: nnx.Linear(64, 64, rngs=r)),
            ["tensor=8", "shards no parameter", "kernel", "annotate"],
        ),
        (
            st.ShardingError,
            lambda: make(model=lambda r: Two(r)),
            ["odd/kernel", "replicated", "fsdp=8"],
        ),
        (
            st.ShardingError,
            lambda: make(annotations={"up/kernal": ("embed", "mlp")}),
            ["up/kernal", "matches no parameter", "up/kernel"],
        ),
        (
            st.ShardingError,
            lambda: make(annotations={".*/up/kernel": ("embed",)}),
            ["up/kernel", "1 logical", "2 dims"],
        ),
        (
            st.ShardingError,
            lambda: make(st.make_mesh(tensor=8), annotations={"up/kernel": ("mlp", "heads")}),
            ["both claim", "tensor", "up/kernel"],
        ),
        (
            st.ShardingError,
            lambda: make(annotations={"up/kernel": ("embd", "mlp")}),
            ["embd", "'embed'", "up/kernel"],
        ),
        (st.ConfigError, lambda: make(rows=36), ["36 rows", "8 groups", "40 rows"]),
        (st.ConfigError, lambda: make(groups=12), ["12 groups", "8 batch shards"]),
        (st.ConfigError, lambda: make(microbatches=0), ["microbatches"]),
        (st.ConfigError, lambda: make(precision="f16"), ["f16", "f32"]),
        (st.ConfigError, lambda: make(loss_fn=lambda model: 0.0), ["1 argument"]),
        (st.ShardTrainError, lambda: make(loss_fn=lambda m, b: m(b["x"])), ["shape", "st.Loss"]),
        (
            st.ConfigError,
            lambda: make(loss_fn=lambda m, b: (jnp.mean(m(b["x"])), {"loss": 1.0})),
            ["metric names", "loss"],
        ),
        (st.ShardTrainError, lambda: make(model=nn.Dense(4)), ["linen", "st.linen"]),
        (st.ShardTrainError, lambda: make(model=lambda rngs: 3), ["factory returned", "int"]),
        (st.ShardTrainError, lambda: make(model=7), ["cannot use", "int"]),
        (st.ShardTrainError, lambda: make(trainable=nnx.LoRAParam), ["nothing to train"]),
        (
            st.ShardingError,
            lambda: make(loss_fn=lambda m, b: jnp.mean(st.constrain(m(b["x"]), "batch", "mpl"))),
            ["mpl", "'mlp'"],
        ),
        (
            st.ShardingError,
            lambda: make(loss_fn=lambda m, b: jnp.mean(st.constrain(m(b["x"]), "batch", "seq", "mlp"))),
            ["3 logical axes", "2 dims"],
        ),
    ],
)
def test_refuses_before_compiling(kind, call, words, monkeypatch):
    """The fault in mind: nothing raised, or something without numbers."""
    monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert "try: " in text


class Two(nnx.Module):
    def __init__(self, rngs):
        self.even = nnx.Linear(64, 64, rngs=rngs)
        self.odd = nnx.Linear(63, 67, rngs=rngs)

    def __call__(self, x):
        return self.odd(self.even(x)[..., :63])


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_init_is_the_bare_models(sizes):
    """Same bits, values to 1e-6, on every mesh. Failed once with a key folded before the factory."""
    state = make(st.make_mesh(**sizes)).init(3)
    bare = Mlp(64, 256, nnx.Rngs(3))
    for name in ("up", "down"):
        np.testing.assert_allclose(
            state.params[name]["kernel"], getattr(bare, name).kernel[...], rtol=1e-6, atol=1e-7
        )


def test_init_never_holds_a_full_copy():
    """The compiled init of a 64 MiB parameter under fsdp=8 stays near an eighth. Failed once without
    `out_shardings`, and once with the optimizer's copies whole."""
    model = (lambda key: {"w": jax.random.normal(key, (4096, 4096))}, lambda p, x: x @ p["w"])
    plan = st.plan(
        model,
        lambda m, b: jnp.mean(m(b["x"])),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(8, 4096)),
        mesh=st.make_mesh(fsdp=8),
        rules="fsdp",
    )
    seen = {}
    true = jax.jit

    def spy(function, **options):
        jitted = true(function, **options)
        seen["memory"] = jitted.lower(jax.random.key(0)).compile().memory_analysis()
        return jitted

    jax.jit = spy
    try:
        state = plan.init(0)
    finally:
        jax.jit = true
    whole = 4096 * 4096 * 4
    assert seen["memory"].temp_size_in_bytes < whole / 2
    assert seen["memory"].output_size_in_bytes < 3 * whole / 8 * 1.02
    assert state.params["w"].addressable_shards[0].data.nbytes == whole // 8


def test_rows_are_grouped():
    """Group g holds rows g, g+G, ...; shard s holds groups s, s+1, ... Failed once with rows in blocks."""
    plan = make(st.make_mesh(data=4, tensor=2), rows=32, microbatches=2)
    x = np.arange(32, dtype=np.float32)[:, None] * np.ones((1, 64), np.float32)
    placed = plan.put({"x": x})["x"]
    first = placed.addressable_shards[0].data[:, 0]
    np.testing.assert_array_equal(first, [0, 8, 16, 24, 1, 9, 17, 25])
    np.testing.assert_array_equal(plan.rows, np.arange(32))


@pytest.mark.parametrize(
    "batch",
    [
        {"x": np.zeros((31, 64), np.float32)},
        {"x": np.zeros((32, 63), np.float32)},
        {"x": np.zeros((32, 64), np.int32)},
        {"y": np.zeros((32, 64), np.float32)},
        {},
    ],
)
def test_put_refuses(batch):
    """The fault in mind: int rows for a float field, which were cast."""
    with pytest.raises(st.DataError, match="try: "):
        make().put(batch)


def test_step_does_not_wait_copy_or_recompile():
    """No implicit transfer, no second compilation, donated state. The fault in mind: a NumPy scalar as the step."""
    plan = make()
    step = plan.compile()
    state = plan.init(0)
    batches = [plan.put({"x": np.full((32, 64), i, np.float32)}) for i in range(4)]
    state, _ = step(state, batches[0])
    size = step._jitted._cache_size()
    with jax.transfer_guard("disallow"):
        for batch in batches:
            old = state.leaves[0]
            state, metrics = step(state, batch)
            assert old.is_deleted()
    assert step._jitted._cache_size() == size == 1
    assert int(state) == 5 and state.rows_consumed() == 5 * 32
    assert set(metrics) == {"loss", "grad_norm", "param_norm", "tokens"}


@pytest.mark.parametrize("form", ["one field", "dict", "nested", "tuple"])
def test_a_batch_is_any_tree(form):
    """Fields reach the loss by name, whatever their order in the batch. Failed once (planted) with the values of a flat
    dict taken in its own order."""
    x, y = np.full((32, 64), 2, np.float32), np.full((32, 64), 3, np.float32)
    batch, pick = {
        "one field": ({"x": x}, lambda b: (b["x"], b["x"] + 1)),
        "dict": ({"y": y, "x": x}, lambda b: (b["x"], b["y"])),
        "nested": ({"y": y, "in": {"x": x}}, lambda b: (b["in"]["x"], b["y"])),
        "tuple": ((x, y), lambda b: b),
    }[form]

    def told(model, batch):
        x, y = pick(batch)
        return jnp.square(model(x)).mean(), {"x": x.mean(), "y": y.mean()}

    options = dict(mesh=st.make_mesh(fsdp=8), batch=batch)
    step = (plan := st.plan(lambda rngs: Mlp(64, 256, rngs), told, optax.adam(1e-3), **options)).compile()
    placed = plan.put(batch)
    placed = dict(reversed(placed.items())) if isinstance(placed, dict) else placed
    _, metrics = step(plan.init(0), placed)
    assert (float(metrics["x"]), float(metrics["y"])) == (2, 3)
    for wrong in ({}, {"z": x}, ()):
        with pytest.raises(st.DataError, match="the plan's batch has"):
            step(plan.init(0), wrong)


def test_memory_and_collectives_read_the_program():
    """Failed once when donation was lost: nothing was aliased."""
    step = make().compile()
    memory = step.memory()
    assert memory["aliased"] >= 0.99 * make().state_bytes
    assert memory["peak"] >= memory["arguments"]
    assert {c.axis for c in step.collectives()} == {"fsdp"}
    assert "per device" in str(memory) and "all-gather" in str(step.collectives())


def test_evaluation_uses_no_dropout_and_changes_nothing():
    """Failed once with `train=True` in compile_eval."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(64, 64, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.layer(x))

    plan = make(st.make_mesh(data=8), model=Net, rules="data")
    state = plan.init(0)
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    sums = plan.compile_eval()(state, plan.put({"x": x}))
    bare = Net(nnx.Rngs(0))
    bare.eval()
    expected = float(jnp.square(bare(x)).mean())
    assert float(sums["loss_sum"]) / float(sums["loss_weight"]) == pytest.approx(expected, rel=1e-6)
    assert float(sums["loss_weight"]) == 32


def test_any_function_of_state_and_batch():
    """`plan.jit` keeps the plan's shardings. The fault in mind: a returned state came back replicated."""
    plan = make()
    state = plan.init(0)

    def shrink(state, batch):
        new = state.replace(params=jax.tree.map(lambda p: p * 0.5, state.params))
        return new, plan.model(new)(batch["x"]).sum()

    new, total = plan.jit(shrink)(state, plan.put({"x": np.ones((32, 64), np.float32)}))
    assert np.isfinite(float(total))
    for path, leaf in flatten(new).items():
        assert leaf.sharding.is_equivalent_to(flatten(plan.abstract_state)[path].sharding, leaf.ndim), path


def test_two_layouts_in_one_process():
    """Inner jit, checkpoint and scan are traced anew for each layout. Failed once with a plain context variable."""

    @jax.jit
    def inner(x):
        return st.constrain(x, "batch", "mlp")

    def through(model, batch):
        body = jax.checkpoint(lambda c, _: (inner(c), None))
        y, _ = jax.lax.scan(body, model.up(batch["x"]), None, length=2)
        return jnp.square(model.down(y)).mean()

    texts = []
    for rules in (st.rules.tensor, st.rules.tensor.override(activations={"mlp": None})):
        plan = make(st.make_mesh(tensor=8), rules=rules, loss_fn=through)
        texts.append(plan.compile().lowered.as_text())
    hidden = "tensor<32x256xf32>"  # the model's own constraint, not those on gradients
    constraints = [
        sum('{"tensor"}' in line and "constraint" in line and hidden in line for line in t.splitlines())
        for t in texts
    ]
    assert constraints[0] > 0 and constraints[1] == 0, constraints


def test_bf16_keeps_float32_masters():
    """The fault in mind: the parameters themselves were cast."""
    plan = make(precision="bf16")
    state, metrics = plan.compile()(plan.init(0), plan.put({"x": np.ones((32, 64), np.float32)}))
    assert state.params["up"]["kernel"].dtype == jnp.float32
    assert np.isfinite(float(metrics["loss"]))


def test_inside_set_mesh_and_with_tuples():
    """A caller's own mesh context does not matter; batches may be tuples. Failed once on eager sharding."""
    mesh = st.make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        plan = st.plan(
            lambda rngs: Mlp(64, 256, rngs),
            lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2),
            optax.sgd(0.1),
            batch=(jax.ShapeDtypeStruct((16, 64), np.float32),) * 2,
            mesh=mesh,
        )
        state = plan.init(0)
        x = np.ones((16, 64), np.float32)
        state, metrics = plan.compile()(state, plan.put((x, x)))
    assert np.isfinite(float(metrics["loss"]))


def test_describe_is_json():
    """The fault in mind: a PartitionSpec."""
    import json

    found = json.loads(json.dumps(make().describe()))
    assert found["mesh"] == {"fsdp": 8} and found["groups"] == 8
    assert found["tree"]["params/up/kernel"] == {"shape": [64, 256], "dtype": "float32", "spec": "fsdp"}


def test_named_leaves_may_be_whole():
    """A table that no rule divides is whole under tensor alone, as its axes say. Failed once: it was refused."""
    model = (
        lambda key: {"w": jnp.ones((64, 64)), "positions": jnp.ones((128, 64))},
        lambda p, x: x @ p["w"] + p["positions"][0],
    )
    axes = st.annotate({"w": ("embed", "mlp"), "positions": ("seq", "embed")})
    plan = make(st.make_mesh(tensor=8), model=model, annotations=axes)
    assert plan.leaves["positions"].spec == jax.sharding.PartitionSpec()
