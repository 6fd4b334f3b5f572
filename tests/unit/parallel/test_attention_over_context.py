"""Attention over a divided sequence: exact, in memory that falls with its parts, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import shardtrain as st
from shardtrain.errors import ShardingError
from shardtrain.models import LlamaConfig, build_model, language_model_loss
from shardtrain.parallel.attention import attend, attention
from shardtrain.parallel.presets import fsdp_tensor
from shardtrain.parallel.sequence import positions, zigzag_order
from shardtrain.sharding import context


def divided(function, parts, mode="ring"):
    """`function` of arrays [batch, seq, ...] whose sequence `parts` devices share."""
    mesh = st.make_mesh(devices=jax.devices()[:parts], context=parts)
    manual = frozenset(["context"])
    layout = context.Layout(mesh, fsdp_tensor.activations, manual, sequence=("context",), attention=mode)
    spec = PartitionSpec(None, "context")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)

    def run(*arrays):
        with context.use(layout):
            return mapped(*arrays)

    return run


def arrays(length=32, heads=8, kv_heads=8, width=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q, w = (jax.random.normal(k, (2, length, heads, width), dtype) for k in keys[:2])
    k, v = (jax.random.normal(k, (2, length, kv_heads, width), dtype) for k in keys[2:])
    return q, k, v, w


@pytest.mark.parametrize("mode", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("parts", "segmented"), [(2, True), (4, False), (8, True)])
def test_exact(mode, causal, parts, segmented):
    """Output and gradients of every kind against one device. The fault in mind: the early queries of a later device
    meeting late keys."""
    q, k, v, w = arrays()
    length = q.shape[1]
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, length), 0, 3), 1) if segmented else None
    order = zigzag_order(length, parts)

    def over(q, k, v):
        inputs = [x[:, order] for x in (q, k, v)] + ([segments[:, order]] if segmented else [])
        run = lambda q, k, v, s=None: attention(q, k, v, causal=causal, segments=s)
        return (divided(run, parts, mode)(*inputs)[:, order.argsort()] * w).sum()

    alone = lambda q, k, v: (attend(q, k, v, causal=causal, segments=segments) * w).sum()
    got, gradients = jax.jit(jax.value_and_grad(over, (0, 1, 2)))(q, k, v)
    want, wanted = jax.jit(jax.value_and_grad(alone, (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_grouped_heads_and_chunks(monkeypatch):
    """Fewer keys than queries, scores in chunks."""
    from shardtrain.parallel import ring

    monkeypatch.setattr(ring, "FEW", 4)
    q, k, v, w = arrays(64, 8, 2)
    order = zigzag_order(64, 2)
    over = lambda q, k, v: (
        divided(attention, 2)(*(x[:, order] for x in (q, k, v)))[:, order.argsort()] * w
    ).sum()
    alone = lambda q, k, v: (attend(q, k, v) * w).sum()
    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (over, alone))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_positions_are_those_of_the_order():
    order = divided(lambda x: x * 0 + positions(x.shape[1]), 4)(jnp.zeros((1, 32), jnp.int32))
    assert order[0].tolist() == zigzag_order(32, 4).tolist()
    assert positions(5).tolist() == [0, 1, 2, 3, 4]


def test_ring_memory_falls_with_the_parts():
    """Temporary bytes of the gradient on each device: half for twice the devices. Failed once where a remat policy
    saved the scores of every turn, and where scores were in no loop."""
    q = jax.ShapeDtypeStruct((1, 8192, 4, 32), jnp.float32)

    def temporaries(parts):
        step = jax.grad(lambda *a: divided(jax.checkpoint(attention), parts)(*a).sum(), (0, 1, 2))
        return jax.jit(step).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    two, four, eight = map(temporaries, (2, 4, 8))
    assert four < 0.6 * two and eight < 0.6 * four


@functools.cache
def memory(sequence, parts):
    config = LlamaConfig(
        vocab=256, sequence=sequence, embed=256, layers=2, heads=4, kv_heads=4, mlp=1024, remat="full"
    )
    spec = {
        k: ((1, sequence), d) for k, d in (("tokens", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    return (
        st.plan(
            lambda rngs: build_model(config, rngs),
            language_model_loss,
            optax.sgd(1e-3),
            batch=st.batch_spec(**spec),
            mesh=st.make_mesh(devices=jax.devices()[:parts], context=parts),
        )
        .compile()
        .memory()
    )


def test_eight_times_the_sequence_on_eight_devices():
    """A step on 32k tokens at context=8 within the bytes of 4k on one device."""
    assert memory(32768, 8)["peak"] <= memory(4096, 1)["peak"]


def make(model, loss, shape=(8, 16), **options):
    spec = st.batch_spec(x=(*shape, 8))
    return st.plan(model, loss, optax.sgd(0.1), batch=spec, mesh=st.make_mesh(context=8), **options)


def test_refused():
    """A model that mixes tokens on its own, a sequence that does not divide, heads that do not."""
    pair = (lambda key: {"w": jnp.ones((8, 8))}, lambda p, x: x @ p["w"])
    with pytest.raises(ShardingError, match="no attention for that"):
        make(pair, lambda model, batch: model(batch["x"]).sum())
    with pytest.raises(ShardingError, match="dim 1 = 24 is not divisible by 16"):
        make(pair, lambda model, batch: model(batch["x"]).sum(), (8, 24))
    heads = lambda x: x.reshape(*x.shape[:2], 4, 2)
    mixing = (pair[0], lambda p, x: attention(*(heads(x @ p["w"]),) * 3))
    plan = make(mixing, lambda model, batch: model(batch["x"]).sum(), attention="ulysses")
    with pytest.raises(ShardingError, match="4 heads are not divisible by 8"):
        plan.compile()
    with pytest.raises(st.ConfigError, match="attention"):
        make(mixing, lambda model, batch: model(batch["x"]).sum(), attention="rnig")
