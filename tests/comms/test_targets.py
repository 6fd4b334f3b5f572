"""The bytes of presets in what the TPU and GPU compilers make of them. Needs the extras aot-tpu and aot-gpu."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import shardtrain as st

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
