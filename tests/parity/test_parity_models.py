"""Other people's models, not one line changed, on every kind of layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_equal, train
from flax import linen as nn
from flax import nnx

import shardtrain as st

ROWS, WIDTH = 32, 64


def batches(count: int = 2) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    make = lambda *shape: random.normal(size=shape).astype(np.float32)
    result = [
        {"x": make(ROWS, WIDTH), "y": make(ROWS, WIDTH), "mask": np.ones(ROWS, np.float32)}
        for _ in range(count)
    ]
    for batch in result:
        batch["mask"][[1, 9, 17, 25, 3]] = 0  # all of group 1, and one row of group 3
    return result


def loss(model, batch, rngs):
    error = jnp.square(model(batch["x"]) - batch["y"]).sum(-1)
    return st.Loss((error * batch["mask"]).sum(), batch["mask"].sum(), {"rows": (batch["mask"].sum(), 1.0)})


class Mlp(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(WIDTH, 256, rngs=rngs, kernel_init=st.logical(init, "embed", "mlp"))
        self.down = nnx.Linear(256, WIDTH, rngs=rngs, kernel_init=st.logical(init, "mlp", "embed"))
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(st.constrain(nnx.gelu(self.up(x)), "batch", "mlp")))


class Decoder(nnx.Module):
    """Plain Flax, unrolled layers, as in its examples."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(128, WIDTH, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


class DecoderLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(8, WIDTH, decode=False, dropout_rate=0.1, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 256, rngs=rngs)
        self.down = nnx.Linear(256, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, mask=nnx.make_causal_mask(y[..., 0]))
        return x + self.drop(self.down(nnx.gelu(self.up(self.norm2(x)))))


DECODER_AXES = {
    r"embed/embedding": ("vocab", "embed"),
    r".*/(query|key|value)/kernel": ("embed", "heads", "head_dim"),
    r".*/out/kernel": ("heads", "head_dim", "embed"),
    r".*/up/kernel": ("embed", "mlp"),
    r".*/down/kernel": ("mlp", "embed"),
}


def token_loss(model, batch, rngs):
    each = optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"])
    return st.Loss(each.sum(), jnp.float32(each.size))


def token_batches():
    tokens = np.random.default_rng(2).integers(0, 128, (16, 17)).astype(np.int32)
    return [{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}]


class Scanned(nnx.Module):
    """Scans its own layers with nnx.scan; `line` is the one line that fsdp asks for."""

    def __init__(self, rngs, line: bool):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.blocks, self.line = make(rngs), line

    def __call__(self, x):
        line = self.line

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            if line:
                layer = st.gather(layer, "blocks")
            return x + jnp.tanh(layer(x))

        return forward(x, self.blocks)


class Net(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        axes = lambda *names: nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
        x = nn.gelu(nn.Dense(256, kernel_init=axes("embed", "mlp"))(x))
        x = nn.Dense(WIDTH, kernel_init=axes("mlp", "embed"))(x)
        return nn.BatchNorm(use_running_average=False)(x) if self.norm else x


def pair():
    def init(key):
        keys = jax.random.split(key, 2)
        return {
            "layers": {"w": jax.random.normal(keys[0], (3, WIDTH, WIDTH)) * 0.1, "b": jnp.zeros((3, WIDTH))}
        }

    def apply(params, x):
        def block(x, layer):
            layer = st.gather(layer, "layers")
            return x + jnp.tanh(x @ layer["w"] + layer["b"]), None

        return jax.lax.scan(block, x, params["layers"])[0]

    return init, apply


class Adapted(nnx.Module):
    """A frozen base and a trained low-rank part."""

    def __init__(self, rngs):
        self.base = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.lora = nnx.LoRA(WIDTH, 8, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.base(x) + self.lora(x)


CASES = {
    "mlp": (Mlp, loss, batches, {}, ["data8", "zero1", "fsdp8", "tensor8", "hybrid", "slices"]),
    "decoder": (
        Decoder,
        token_loss,
        token_batches,
        {"annotations": st.annotate(DECODER_AXES)},
        ["fsdp8", "tensor8", "hybrid"],
    ),
    "decoder-infer": (Decoder, token_loss, token_batches, {"rules": "infer"}, ["fsdp8"]),
    "scanned": (lambda rngs: Scanned(rngs, False), loss, batches, {"rules": "fsdp"}, ["fsdp8"]),
    "scanned-line": (lambda rngs: Scanned(rngs, True), loss, batches, {"rules": "fsdp"}, ["fsdp8"]),
    "linen": (st.linen(Net(), lambda b: (b["x"],)), loss, batches, {}, ["fsdp8", "tensor8", "hybrid"]),
    "linen-batchnorm": (st.linen(Net(norm=True), lambda b: (b["x"],)), loss, batches, {}, ["hybrid"]),
    "pair": (pair(), loss, batches, {"rules": "fsdp"}, ["fsdp8", "hsdp"]),
    "lora": (Adapted, loss, batches, {"trainable": nnx.LoRAParam, "rules": "fsdp"}, ["fsdp8", "hsdp"]),
}


SLOW = {
    ("decoder", "fsdp8"),
    ("decoder", "tensor8"),
    ("decoder-infer", "fsdp8"),
}  # the language models have them in the suite
NAMED = [
    pytest.param(n, layout, marks=[pytest.mark.slow] if (n, layout) in SLOW else [])
    for n, case in CASES.items()
    for layout in case[4]
]


@pytest.mark.parametrize(("name", "layout"), NAMED)
def test_equals_one_device(name, layout):
    """The faults in mind: no `pcast` in `varying` (data), a stale dropout key (mlp), a wrong dim in
    `without_leading` (scanned-line, pair), statistics of one group kept for all (linen-batchnorm)."""
    model, loss_fn, make, options, _ = CASES[name]
    sgd = {"optimizer": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))}
    ours = train(model, loss_fn, make(), layout, steps=3, **sgd, **options)
    reference = train(model, loss_fn, make(), None, steps=3, **sgd, **options)
    assert_equal(ours, reference, parameters=1e-5)
    for path, value in reference.state.items():
        np.testing.assert_allclose(ours.state[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    if "rows" in reference.metrics:
        assert ours.metrics["rows"] == pytest.approx(reference.metrics["rows"])


def test_an_instance_keeps_its_weights():
    """Failed once when an instance was initialised anew."""
    module = Mlp(nnx.Rngs(7))
    plan = st.plan(
        module,
        loss,
        optax.sgd(0.1),
        batch=st.batch_spec(**batches()[0]),
        mesh=st.make_mesh(fsdp=8),
        rules="fsdp",
    )
    state = plan.init(0)
    np.testing.assert_array_equal(state.params["up"]["kernel"], module.up.kernel[...])


def test_frozen_parameters_stay():
    """The fault in mind: `trainable=` was ignored."""
    plan = st.plan(
        Adapted,
        loss,
        optax.sgd(0.1),
        batch=st.batch_spec(**batches()[0]),
        mesh=st.make_mesh(fsdp=8),
        rules="fsdp",
        trainable=nnx.LoRAParam,
    )
    state = plan.init(0)
    base = np.asarray(state.model_state["frozen"]["base"]["kernel"])
    assert state.model_state["frozen"]["base"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp")
    state, _ = plan.compile()(state, plan.put(batches()[0]))
    np.testing.assert_array_equal(state.model_state["frozen"]["base"]["kernel"], base)
    assert set(state.params) == {"lora"}


def test_batch_statistics_are_the_mean_over_groups():
    """By hand: 0.99 x 0 + 0.01 x mean over groups of the group's mean. Failed once with the sum over groups, which
    the comparison with one device cannot see."""
    batch = batches()[0]
    options = dict(batch=st.batch_spec(**batch), mesh=st.make_mesh(data=8), rules="data")
    plan = st.plan(CASES["linen-batchnorm"][0], loss, optax.sgd(0.0), **options)
    state = plan.init(0)
    before = nn.Dense(WIDTH).bind({"params": jax.device_get(state.params["Dense_1"])})(
        nn.gelu(nn.Dense(256).bind({"params": jax.device_get(state.params["Dense_0"])})(batch["x"]))
    )
    state, _ = plan.compile()(state, plan.put(batch))
    found = state.model_state["variables"]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, 0.01 * np.asarray(before).mean(0), rtol=1e-4, atol=1e-7)
