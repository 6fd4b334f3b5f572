"""The bytes of presets in what the TPU and GPU compilers make of them. Needs the extras aot-tpu and aot-gpu."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import shardtrain as st
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.plan.partitioned import partition

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


def bytes_benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bytes_benchmark", BENCHMARKS / "bytes.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:1x8"])
@pytest.mark.parametrize("layout", ["data", "zero1", "fsdp", "tensor", "tensor_sequence", "fsdp x tensor"])
def test_presets_send_the_least(target, layout):
    """Compiled anew where the code changed. The fault in mind: one that only these compilers show."""
    bench = bytes_benchmark()
    row = bench.measure(bench.Case(target, "gpt", layout))
    assert 0.98 <= row["ratio"] <= (1.05 if " x " in layout else 1.02), row
    assert not [f for f in row["findings"] if not f.startswith("note")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5p:4x4x4", "v6e:4x4", "tpu7x:4x4x4"])
def test_what_sparsecores_send(target):
    """Beside compute, and no more than is due. Without our options none of it on v5p and v6e, and 1.46 of it over three dims."""
    bench = bytes_benchmark()
    row = bench.measure(bench.Case(target, "gpt", "fsdp"))
    assert 0.98 <= row["ratio"] <= 1.02 and row["async_share"] > 0.9, row


@pytest.mark.slow
def test_short_vectors_over_many_chips():
    """Two numbers of a bias for each of 64 chips: the TPU compiler gave up at their reduce-scatter."""
    target = st.Target("v5e:8x8")
    model = (
        lambda key: {"w": jax.random.normal(key, (512, 96, 128)), "b": jax.random.normal(key, (96, 128))},
        lambda p, x: jnp.tanh(jnp.einsum("be,ekh->bkh", x, p["w"]) + p["b"]),
    )
    plan = st.plan(
        model,
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.sgd(0.1),
        batch=st.batch_spec(x=(128, 512)),
        mesh=target.mesh(fsdp=64),
        rules=st.rules.fsdp,
    )
    assert plan.leaves["b"].shard.dim == 1, "a vector with parts of two is what this is about"
    assert plan.compile(target=target).collectives()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "layers"), [("h100:1x8", 1), ("v5e:2x4", 1), ("h100:1x8", 2)])
def test_a_lone_layer_is_recomputed_too(target, layers):
    """A scan of one layer is unrolled by XLA. Failed once on h100: it then merged what the backward was to run again with the
    forward, which kept everything that `remat="full"` was to drop.
    """
    target = st.Target(target)
    model = GPTConfig(vocab=256, sequence=64, embed=64, layers=layers, heads=8, remat="full")
    plan = st.plan(
        lambda rngs: build_model(model, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=((16, 64), "int32"), targets=((16, 64), "int32"), weights=(16, 64)),
        mesh=target.mesh(data=8),
    )
    assert plan.compile(target=target).program().flops == partition(plan, target).flops


def test_a_last_dim_in_low_parts():
    """Rows of 32 numbers for each of 64 chips, of a leaf that is no vector: reduce-scattered along that dim, moved to the front.
    Failed once: all-reduced and cut, 1.027 of the least in all of Llama 70B over 256 v6e."""
    target = st.Target("v5e:8x8")
    model = (
        lambda key: {"w": jax.random.normal(key, (8, 16, 2048))},
        lambda p, x: jnp.einsum("bhd,hde->be", x, p["w"]),
    )
    plan = st.plan(
        model,
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.sgd(0.1),
        batch=st.batch_spec(x=(128, 8, 16)),
        mesh=target.mesh(fsdp=64),
        rules=st.rules.fsdp,
    )
    assert plan.leaves["w"].shard.dim == 2, "parts of 32, in the last of three dims"
    sent = partition(plan, target).collectives.by_axis()
    size = 8 * 16 * 2048 * 4
    assert sent["reduce-scatter", "fsdp"][1] == pytest.approx(63 / 64 * size)
    assert sent.get(("all-reduce", "fsdp"), (0, 0))[1] < 0.001 * size


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:1x8"])
def test_stages_of_a_divided_sequence(target):
    """The TPU compiler refused all of them, see `test_no_branch_ends_in_a_constraint`."""
    target = st.Target(target)
    model = GPTConfig(vocab=256, sequence=64, embed=64, layers=4, heads=8)
    plan = st.plan(
        lambda rngs: build_model(model, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=((16, 64), "int32"), targets=((16, 64), "int32"), weights=(16, 64)),
        mesh=target.mesh(stage=2, data=2, tensor=2),
        rules="fsdp_tensor_sequence",
        microbatches=4,
    )
    assert plan.compile(target=target).program().flops == partition(plan, target).flops
