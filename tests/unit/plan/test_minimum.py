"""The minimum of a layout against closed forms, written out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.models import GPTConfig, LlamaConfig, MoEConfig, build_model, language_model_loss
from shardtrain.plan.minimum import minimum

ROWS, SEQUENCE, EMBED, LAYERS, VOCAB = 16, 64, 128, 3, 512
MODELS = {
    "gpt": GPTConfig(vocab=VOCAB, sequence=SEQUENCE, embed=EMBED, layers=LAYERS, heads=8),
    "llama": LlamaConfig(vocab=VOCAB, sequence=SEQUENCE, embed=EMBED, layers=LAYERS, heads=8, kv_heads=8),
}


def planned(name, target, rules, **options):
    shape = (ROWS, SEQUENCE)
    sizes = options.pop("mesh")
    return st.plan(
        lambda rngs: build_model(MODELS.get(name, name), rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=st.Target(target).mesh(**sizes),
        rules=rules,
        **options,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_data_is_one_all_reduce_whatever_the_microbatches(name, precision, microbatches):
    """2 (n-1)/n of the float32 gradients. The fault in mind: times the microbatches."""
    plan = planned(name, "v5e:2x4", "data", mesh={"data": 8}, precision=precision, microbatches=microbatches)
    assert minimum(plan).bytes == 2 * 7 / 8 * 4 * plan.parameter_count


@pytest.mark.parametrize("name", MODELS)
def test_zero1_gathers_in_the_wire_dtype(name):
    """(n-1)/n of bf16 weights and of float32 gradients; vectors under 4,096 elements are all-reduced."""
    plan = planned(name, "v5e:2x4", "zero1", mesh={"data": 8}, precision="bf16", microbatches=2)
    sizes = {path: math.prod(leaf.shape) for path, leaf in plan.leaves.items()}
    small = sum(n for n in sizes.values() if n < 4096)
    large = sum(sizes.values()) - small
    assert minimum(plan).bytes == 7 / 8 * large * (2 + 4) + 2 * 7 / 8 * 4 * small


def test_fsdp_is_three_passes_over_the_layers():
    """Per layer f*X forward, f*X backward in bf16, f*X of gradients in float32; the tied table once each."""
    plan = planned("gpt", "v5e:2x4", "fsdp", mesh={"fsdp": 8}, precision="bf16")
    f, sizes = 7 / 8, {path: math.prod(leaf.shape) for path, leaf in plan.leaves.items()}
    matrices = sum(n for p, n in sizes.items() if p.startswith("blocks") and p.endswith("kernel"))
    vectors = sum(
        n for p, n in sizes.items() if p.startswith("blocks") and not p.endswith("kernel") and n >= 4096
    )
    small = sum(n for n in sizes.values() if n < 4096)
    tables = sum(sizes.values()) - matrices - vectors - small
    expected = f * (matrices * (2 + 2 + 4) + (vectors + tables) * (2 + 4)) + 2 * f * 4 * small
    assert minimum(plan).bytes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rules", "mesh", "options"),
    [
        ("fsdp_tensor", {"fsdp": 4, "tensor": 2}, {}),
        ("fsdp_tensor", {"stage": 2, "tensor": 4}, {"schedule": "interleaved:2", "microbatches": 4}),
        ("tensor", {"tensor": 8}, {"quant": "int8"}),
    ],
)
def test_float64_is_twice_float32(rules, mesh, options):
    """Every term but the ids of tokens. Failed once: scalars of the softmax, and gradients of layers that change places,
    were 4 bytes whatever the precision."""
    model = dataclasses.replace(MODELS["gpt"], layers=4)
    with jax.enable_x64(True):
        twice = {
            t.what: t
            for t in minimum(planned(model, "cpu:8", rules, mesh=dict(mesh), precision="f64", **options))
        }
    once = {t.what: t for t in minimum(planned(model, "cpu:8", rules, mesh=dict(mesh), **options))}
    assert once.keys() == twice.keys() and len(once) > 2
    for what, term in once.items():
        assert twice[what].bytes == (1 if what == "table: ids" else 2) * term.bytes, what


def test_tables_move_rows_where_that_is_less():
    """ids to everybody, then f*T*D each way. Failed once when a tensor axis over the rows divided their width."""
    f, tokens = 3 / 4, ROWS * SEQUENCE // 4
    for vocab, moved in ((128, {}), (8192, {"ids": f * 4 * tokens * 4, "rows": 2 * f * tokens * EMBED * 2})):
        config = dataclasses.replace(MODELS["llama"], vocab=vocab)
        plan = planned(config, "v5e:2x4", "fsdp_tensor", mesh={"fsdp": 4, "tensor": 2}, precision="bf16")
        terms = {t.what: t.bytes for t in minimum(plan) if t.what.startswith("table")}
        assert terms == {f"table: {what}": size for what, size in moved.items()}


def test_tables_move_parts_of_a_divided_sequence():
    """Half of what a device's tokens take over fsdp=2, of a quarter of the sequence each over tensor=4.

    The formula was four times as much until the program sent less than it.
    """
    config = dataclasses.replace(MODELS["llama"], vocab=8192)
    plan = planned(config, "v5e:2x4", "fsdp_tensor_sequence", mesh={"fsdp": 2, "tensor": 4}, precision="bf16")
    rows = [t for t in minimum(plan) if t.what == "table: rows"]
    assert [t.bytes for t in rows] == [2 * (1 / 2) * (ROWS // 2 * SEQUENCE // 4) * EMBED * 2]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_is_the_activations_of_megatron(name, sequence):
    """4 activations a layer and 2 at the ends cross; along the sequence those that enter a block once more."""
    rules = "tensor_sequence" if sequence else "tensor"
    plan = planned(name, "v5e:2x4", rules, mesh={"tensor": 8}, precision="bf16")
    f, activation = 7 / 8, ROWS * SEQUENCE * EMBED * 2
    crossing = (4 * LAYERS + 2) * 2 * f * activation
    again = 2 * LAYERS * f * activation if sequence else 0
    scalars = 3 * 2 * f * ROWS * SEQUENCE * 4
    assert minimum(plan).bytes == pytest.approx(crossing + again + scalars, rel=1e-12)


def test_a_model_of_somebody_else():
    """q, k and v from one input are one reduction backward; the raw input needs none. Failed once on both."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = lambda i, o, *axes: nnx.Linear(
                i, o, rngs=rngs, kernel_init=st.logical(nnx.initializers.lecun_normal(), *axes)
            )
            self.first = make(32, 64, "embed", "mlp")
            self.second = make(64, 32, "mlp", "embed")
            self.q, self.k = make(32, 64, "embed", "heads"), make(32, 64, "embed", "heads")

        def __call__(self, x):
            x = self.second(nnx.relu(self.first(x)))
            return self.q(x) * self.k(x)

    def loss(model, batch):
        return jnp.square(model(batch["x"])).mean()

    plan = st.plan(
        lambda rngs: Net(rngs),
        loss,
        optax.sgd(0.1),
        batch=st.batch_spec(x=(16, 32)),
        mesh=st.Target("v5e:2x4").mesh(tensor=8),
        rules=st.rules.tensor,
    )
    activation = 16 * 32 * 4
    assert minimum(plan).bytes == 2 * (2 * 7 / 8 * activation)  # out of `second`, and back from q and k


def test_slices_carry_their_part():
    """Over 2 slices of 4: 2 * 3/4 * X inside, 2 * 1/2 * X/4 across."""
    plan = planned("gpt", "2*v5e:2x2", "data", mesh={"data": 4, "dcn": {"data": 2}})
    gradients = 4 * plan.parameter_count
    by_axis = minimum(plan).by_axis()
    assert by_axis == pytest.approx({"data": 2 * 3 / 4 * gradients, "slice": gradients / 4})


@pytest.mark.parametrize(("factor", "rows"), [(1.25, 8 * 40), (0.0, 256)])
def test_tokens_go_to_experts_and_come_back(factor, rows):
    """4f*S*D over expert, for the places of the capacity or the choices; over tensor as a dense MLP.

    The fault in mind: sums over tensor counted for every choice.
    """
    sizes = dict(vocab=VOCAB, sequence=SEQUENCE, embed=EMBED, layers=LAYERS, heads=8)
    config = MoEConfig(**sizes, kv_heads=8, experts=8, chosen=2, capacity=factor)
    plan = planned(config, "v5e:2x4", "tensor", mesh={"expert": 4, "tensor": 2}, precision="bf16", groups=8)
    terms = {(t.what, t.axis): t.bytes for t in minimum(plan)}
    calls, tokens = 2, ROWS * SEQUENCE // 8
    assert terms["tokens to experts and back", "expert"] == 4 * 3 / 4 * calls * LAYERS * rows * EMBED * 2
    crossing = (2 * LAYERS + 1) * 2 * 1 / 2 * calls * tokens * EMBED * 2
    assert terms["activations forward", "tensor"] == terms["activations backward", "tensor"] == crossing
    experts = sum(math.prod(leaf.shape) for p, leaf in plan.leaves.items() if "expert" in leaf.logical)
    dense = sum(math.prod(leaf.shape) / (2 if "tensor" in leaf.spec else 1) for leaf in plan.leaves.values())
    dense -= experts / 2
    assert terms["gradients", "expert"] == 2 * 3 / 4 * dense * 4
