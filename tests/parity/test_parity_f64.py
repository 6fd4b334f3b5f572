"""In float64 every layout is one device to twelve digits: nothing in the step rounds to less."""

import jax
import jax.numpy as jnp
import pytest
from test_verify import GPT, LLAMA, data, optimizer

import shardtrain as st
from shardtrain.errors import ConfigError
from shardtrain.models import MoEConfig, build_model, language_model_loss
from shardtrain.models.layers import norm, rotary
from shardtrain.parallel import attention, expert, lookup, pipeline, ring, routing
from shardtrain.train import step

MOE = MoEConfig(
    vocab=64, sequence=16, embed=32, layers=2, heads=8, kv_heads=8, expert_mlp=32, capacity=0.0, dropout=0.1
)
DROPPING = MoEConfig(
    vocab=64,
    sequence=16,
    embed=32,
    layers=3,
    heads=8,
    kv_heads=8,
    expert_mlp=32,
    shared=1,
    dense_layers=1,
    mlp=64,
    score="sigmoid",
    bias_rate=0.01,
)
MODELS = {"gpt": GPT, "llama": LLAMA, "moe": MOE, "dropping": DROPPING}


def verified(name, layouts, precision="f64", **options):
    model = MODELS[name]
    return st.verify(
        lambda rngs: build_model(model, rngs),
        language_model_loss,
        optimizer(),
        data(),
        layouts=layouts,
        steps=2,
        groups=8,
        precision=precision,
        **options,
    )


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_float64(wide):
    """Every leaf of gradients, parameters and optimizer state within 1e-12."""
    result = verified("gpt", ["fsdp4-tensor2+fsdp_tensor_sequence"])
    assert result.equal and result.tolerance == 1e-12, str(result)


def test_needs_64_bits():
    with pytest.raises(ConfigError, match="JAX_ENABLE_X64"):
        verified("gpt", ["data8"])


LAYOUTS = {
    "gpt": "data8 data8+zero1 tensor8 stage2-data4 fsdp2-context2-tensor2 data4-tensor2+x4",
    "llama": "context8 context4-data2+gather context8+ulysses stage2-data4+zb slice2-fsdp4 tensor8+tensor_sequence",
    "moe": "data8 expert8 expert4-context2 fsdp2-expert2-tensor2",
    "dropping": "data8 expert4-tensor2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_float64_layouts(wide, name):
    result = verified(name, LAYOUTS[name].split())
    assert result.equal and all(c.equal for c in result.layouts), str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_bf16_is_sane(name):
    """Two orders of the same sums in 16 bits: within the bounds, and not in more bits than that by accident."""
    layouts = ["data8", "fsdp4-tensor2", "context8"]
    result = verified(name, layouts, precision="bf16")
    assert result.equal and all(c.equal for c in result.layouts), str(result)
    assert any(c.gradients > 1e-5 for c in result.layouts), str(result)  # data8 may add up in the same order


NARROW = {
    (step, "widen"): ("gpt", "data8"),
    (norm, "widen"): ("gpt", "data8"),
    (rotary, "wide"): ("llama", "data8"),
    (lookup, "widen"): ("gpt", "fsdp8"),
    (ring, "wide_of"): ("llama", "context8"),
    (pipeline, "wide"): ("gpt", "stage2-data4"),
    (routing, "widen"): ("moe", "expert8"),
    (expert, "widen"): ("moe", "expert8"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [pytest.param(p, id=f"{p[0].__name__.split('.')[-1]}.{p[1]}") for p in NARROW]
)
def test_float32_anywhere_is_found(wide, monkeypatch, place):
    """One place goes through float32 on the layout, as all of them did: it is not equal any more."""
    name, layout = NARROW[place]
    module, what = place
    true_wide = module.__dict__[what]
    narrow = (
        (lambda x: x.astype(jnp.float32).astype(true_wide(x).dtype))
        if what == "widen"
        else lambda x: jnp.float32
    )
    from shardtrain.plan import verify as room

    plain, trained = room._train, []

    def train(made, *rest):
        """The layout is trained first, with the fault; then the reference without."""
        with monkeypatch.context() as patch:
            if not trained:
                patch.setattr(module, what, narrow)
            trained.append(made)
            return plain(made, *rest)

    monkeypatch.setattr(room, "_train", train)
    result = verified(name, [layout])
    assert len(trained) == 2 and not result.equal


def test_softmax_in_float64(wide):
    """JAX's own attention takes its softmax in float32: 1e-8 off. Failed once: it was used here."""
    random = jax.random.normal
    q, k, v = (random(jax.random.key(i), (2, 8, h, 4), jnp.float64) for i, h in enumerate((4, 2, 2)))
    got = attention.attend(q, k, v)
    seen = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
    scores = jnp.einsum("bthd,bshd->bhts", q, seen[0]) / 2
    scores = jnp.where(jnp.tril(jnp.ones((8, 8), bool)), scores, -jnp.inf)
    wanted = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), seen[1])
    assert got.dtype == jnp.float64 and jnp.abs(got - wanted).max() < 1e-14
