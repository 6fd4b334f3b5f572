"""What a remat policy says by name: what is saved, what is made again, what waits in the host's memory."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.errors import ConfigError, ShardTrainError
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.parallel.remat import opaque, over_layers, policy

ARGUMENTS = jnp.ones((8, 16)), jnp.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16)


def loss(name):
    def body(x, w):
        up = jax.ad_checkpoint.checkpoint_name(x @ w, "up")
        out = jax.ad_checkpoint.checkpoint_name(jnp.tanh(up) @ w.T, "out")
        return jnp.sin(out), None

    return lambda x, ws: over_layers(body, x, ws, name)[0].sum()


def test_offloaded_by_name():
    """The one named value goes to the host and comes back, as lowered for TPU and GPU; gradients are those of saving it.
    Failed once: it was saved on the device."""
    gradient = lambda name: jax.grad(loss(name), 1)
    for platform in ("tpu", "cuda"):
        moved = [
            jax.jit(gradient(name)).trace(*ARGUMENTS).lower(lowering_platforms=(platform,)).as_text()
            for name in ("up,out", "up,out:offload", "up:offload,out:offload")
        ]
        # One to the host for each value, forward, and one back.
        assert [text.count('_xla_buffer_placement = "pinned_host"') for text in moved] == [0, 1, 2]
        assert [text.count('_xla_buffer_placement = "device"') for text in moved] == [0, 1, 2]
    for name in ("out:offload", "up,out:offload"):
        np.testing.assert_allclose(
            gradient(name)(*ARGUMENTS), gradient("up,out")(*ARGUMENTS), rtol=1e-5, atol=1e-4
        )


def test_what_the_cpu_makes_of_it():
    """A program lowered for GPUs, with its transfers, through the CPU compiler: they are gone, and the gradients are those of
    saving the value bit for bit. Where this fails, the backend can hold values on the host: let it (`remat._check_host`)."""
    gradient = lambda name: jax.jit(jax.grad(loss(name), 1))
    call = jax.export.DisabledSafetyCheck.custom_call("annotate_device_placement")
    checks = [jax.export.DisabledSafetyCheck.platform(), call]
    there = jax.export.export(gradient("up,out:offload"), platforms=["cuda"], disabled_checks=checks)(
        *ARGUMENTS
    )
    lowered = jax.jit(there.call).lower(*ARGUMENTS)
    assert lowered.as_text().count("annotate_device_placement") == 2
    compiled = lowered.compile()
    assert "annotate_device_placement" not in compiled.as_text() and "S(5)" not in compiled.as_text()
    assert "pinned_host" in {m.kind for m in jax.devices()[0].addressable_memories()}
    np.testing.assert_array_equal(compiled(*ARGUMENTS), gradient("up,out")(*ARGUMENTS))


def test_in_a_vmap():
    """Failed once with a NotImplementedError that said nothing."""
    with pytest.raises(ShardTrainError, match=r"a jax\.vmap over 3"):
        jax.vmap(opaque(jnp.sin))(jnp.ones((3, 2)))


@pytest.mark.parametrize(
    "name", ["qkv:ofload", ":offload", "a:offload:b", "qkv:", "a,a:offload", "reduced:offload", "qkv:again"]
)
def test_words_that_say_nothing(name):
    with pytest.raises(ConfigError, match="name:offload"):
        policy(name)


def test_cpu_has_no_other_memory():
    """Failed once: the step compiled, and the memory that it said it had saved was still there."""
    config = GPTConfig(vocab=64, sequence=16, embed=32, layers=2, heads=8, remat="qkv,mlp_up:offload")
    plan = st.plan(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        optax.sgd(0.1),
        batch=st.batch_spec(
            tokens=((8, 16), "int32"), targets=((8, 16), "int32"), weights=((8, 16), "float32")
        ),
        mesh=st.make_mesh(data=8),
    )
    with pytest.raises(ConfigError, match="memory of the host") as error:
        plan.compile().memory()
    assert "'qkv,mlp_up' here" in str(error.value)
