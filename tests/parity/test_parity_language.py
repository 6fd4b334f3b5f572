"""GPT and Llama on every layout equal one device: dropout on, uneven weights, clipping below the norm."""

import dataclasses
import functools

import numpy as np
import optax
import pytest
from compare import LAYOUTS, Trained, assert_equal, difference, train

from shardtrain.models import GPTConfig, LlamaConfig, build_model, language_model_loss

CONFIGS = {
    "gpt": GPTConfig(vocab=128, sequence=32, embed=64, layers=2, heads=8, dropout=0.1),
    "llama": LlamaConfig(
        vocab=128, sequence=32, embed=64, layers=2, heads=8, kv_heads=8, mlp=128, dropout=0.1, remat="dots"
    ),
}


def batches(count: int = 3, rows: int = 16) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    result = []
    for _ in range(count):
        tokens = random.integers(0, 128, (rows, 33))
        weights = (random.random((rows, 32)) > 0.3).astype(np.float32)
        weights[[0, 8]] = 0  # group 0 has no weight at all: a mean of means would divide by nothing
        result.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return [{k: v.astype(np.int32 if k != "weights" else np.float32) for k, v in b.items()} for b in result]


@functools.cache
def trained(family: str, layout: str | None, steps: int = 5, sgd: bool = False) -> Trained:
    config = CONFIGS[family]
    optimizer = optax.sgd(0.1) if sgd else None
    return train(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        batches(),
        layout,
        steps=steps,
        optimizer=optimizer,
    )


@pytest.mark.parametrize(
    "layout",
    [
        "data8",
        "zero1",
        pytest.param("fsdp8", marks=pytest.mark.slow),
        "tensor8",
        "tensor4-fsdp2",
        "hybrid",
        pytest.param("slices", marks=pytest.mark.slow),
        "slices-fsdp",
    ],
)
def test_gpt(layout):
    """The fault in mind: `psum` left out of `reduce_leaf`, and once with one key for all groups."""
    assert_equal(trained("gpt", layout), trained("gpt", None))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("fsdp8", marks=pytest.mark.slow),
        pytest.param("fsdp4-micro2", marks=pytest.mark.slow),
        "hybrid",
        "zero1-tensor",
        "hsdp",
    ],
)
def test_llama(layout):
    """The fault in mind: gathered weights in the wrong order."""
    assert_equal(trained("llama", layout), trained("llama", None))


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps(family, layout):
    """Loss within 1e-4 over 50 steps, on every layout."""
    ours, reference = trained(family, layout, 50), trained(family, None, 50)
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=1e-4)
    np.testing.assert_allclose(ours.losses[:10], reference.losses[:10], rtol=1e-5)


def test_sgd_parameters():
    """SGD shows the scale of gradients, which Adam hides. The fault in mind: gradients multiplied by 8."""
    assert (
        difference(trained("gpt", "hybrid", sgd=True).params, trained("gpt", None, sgd=True).params)[0] < 1e-5
    )


def test_groups_decide_dropout():
    """Another number of groups is another training: the comparison is not blind to the keys."""
    config = dataclasses.replace(CONFIGS["gpt"], dropout=0.3)
    make = lambda rngs: build_model(config, rngs)
    eight = train(make, language_model_loss, batches(), None, steps=1)
    import compare

    compare.GROUPS = 4
    try:
        four = train(make, language_model_loss, batches(), None, steps=1)
    finally:
        compare.GROUPS = 8
    assert difference(eight.gradients, four.gradients)[0] > 1e-3
