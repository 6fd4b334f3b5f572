"""The TPU's fused attention, interpreted: what it computes, on one device and on parts; and how its programs are read."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.models import LlamaConfig, build_model, language_model_loss
from shardtrain.parallel import attention as room
from shardtrain.parallel import fused
from shardtrain.plan import hlo

MODEL = LlamaConfig(vocab=64, sequence=128, embed=128, layers=2, heads=2, kv_heads=2, head_dim=64, mlp=64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
def test_exact(causal, segmented):
    """Output and gradients against attention in the open, with grouped heads. Failed once with the scale of the gradient
    of q left out."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, w = (jax.random.normal(k, (2, 256, 4, 64)) for k in keys[:2])
    k, v = (jax.random.normal(k, (2, 256, 2, 64)) for k in keys[2:])
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, 256), 0, 3), 1) if segmented else None
    kernel = fused._Kernel("splash", causal, interpret=True)
    got = lambda *a: (fused._fused(*a, segments, kernel, None) * w).sum()
    want = lambda *a: (room.attend(*a, causal=causal, segments=segments) * w).sum()
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (got, want))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def gradients(mesh, **options):
    shape = (8, 128)
    plan = st.plan(
        lambda rngs: build_model(MODEL, rngs),
        language_model_loss,
        optax.sgd(1.0),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=mesh,
        groups=4,
        **options,
    )
    tokens = np.random.default_rng(0).integers(0, 64, shape, np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones(shape, np.float32)}
    state = plan.init(0)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = plan.compile()(state, plan.put(batch))
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after.params), float(metrics["loss"])


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_on_parts(sizes, monkeypatch):
    """A step with the kernel on parts against one device without it. Failed once where no axis was left to the
    partitioner."""
    alone, loss = gradients(st.make_mesh(devices=jax.devices()[:1], data=1))
    monkeypatch.setattr(fused, "kernel_for", lambda *_: "splash")
    monkeypatch.setattr(fused, "_Kernel", functools.partial(fused._Kernel, interpret=True))
    parts, other = gradients(st.make_mesh(devices=jax.devices()[:4], **sizes))
    norm = float(optax.global_norm(alone))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(parts), strict=True):
        assert np.linalg.norm(a - b) / norm < 1e-5
    assert other == pytest.approx(loss, rel=1e-6)


def test_which_kernel():
    """The fault in mind: float32 on a TPU, whose kernel would round its products."""
    tpu = types.SimpleNamespace(platform="tpu")
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    good = of(1, 256, 2, 128)
    assert fused.kernel_for(tpu, good, good) == fused.kernel_for(tpu, good, good, "segments") == "splash"
    for bad in (of(1, 200, 2, 128), of(1, 256, 2, 80), of(1, 256, 2, 128, dtype=jnp.float32)):
        assert fused.kernel_for(tpu, bad, bad) is None
    h100 = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert (
        fused.kernel_for(h100, good, good) == "cudnn"
        and fused.kernel_for(h100, good, good, "segments") is None
    )


PROGRAM = """HloModule m

ENTRY %e (q: bf16[2,4,256,128], k: bf16[2,2,256,128], g: bf16[2,256,4,128], h: bf16[2,256,2,128]) -> f32[] {{
  %q = bf16[2,4,256,128]{{3,2,1,0}} parameter(0)
  %k = bf16[2,2,256,128]{{3,2,1,0}} parameter(1)
  %g = bf16[2,256,4,128]{{3,2,1,0}} parameter(2)
  %h = bf16[2,256,2,128]{{3,2,1,0}} parameter(3)
  %s = s8[1,2,2]{{2,1,0}} constant({{...}})
  %call = {call}
  ROOT %c = f32[] constant(0)
}}
"""
SPLASH = (
    "bf16[2,4,256,128]{{3,2,1,0}} custom-call(%s, %q, %k, %k), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,2,2]{{2,1,0}}, '
    "bf16[2,4,256,128]{{3,2,1,0}}, bf16[2,2,256,128]{{3,2,1,0}}, bf16[2,2,256,128]{{3,2,1,0}}}}, "
    'metadata={{op_name="jit(f)/{scope}_attention/vmap(splash_mha_{which}_no_residuals)/pallas_call"}}'
)
CUDNN = (
    "bf16[2,4,256,128]{{3,1,2,0}} custom-call(%g, %h, %h), "
    'custom_call_target="__cudnn$fmhaSoftmax{which}", operand_layout_constraints={{bf16[2,256,4,128]{{3,2,1,0}}, '
    "bf16[2,256,2,128]{{3,2,1,0}}, bf16[2,256,2,128]{{3,2,1,0}}}}, "
    'backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{scope}"}}}}'
)
SCORES = 2 * 2 * 4 * 256 * 256 * 128  # FLOPs of one product over all of them


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (SPLASH.format(scope="causal", which="fwd"), 2 * SCORES / 2),
        (SPLASH.format(scope="full", which="dq"), 3 * SCORES),
        (SPLASH.format(scope="causal", which="dkv"), 4 * SCORES / 2),
        (CUDNN.format(scope="CAUSAL", which=""), 2 * SCORES / 2),
        (CUDNN.format(scope="NO_MASK", which="Backward"), 5 * SCORES),
        (SPLASH.format(scope="causal", which="fwd").replace("splash", "other"), 0),
    ],
)
def test_kernels_are_counted(call, flops):
    """In a compiled program, by the shapes that it gives. Failed once with the keys' width in place of their number."""
    text = PROGRAM.format(call=call)
    assert hlo.read(text, {"data": 1}).flops == flops
