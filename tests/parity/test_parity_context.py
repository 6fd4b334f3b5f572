"""A sequence divided over `context` equals one device: rotary and learned positions, dropout, labels, packing, zig-zag."""

import functools

import numpy as np
import pytest
from compare import assert_equal, leaf_difference, train
from test_parity_language import CONFIGS, batches, trained

from shardtrain.models import build_model, language_model_loss
from shardtrain.parallel import sequence


def packed():
    """Documents of uneven lengths in each row."""
    random = np.random.default_rng(1)
    result = batches()
    for batch in result:
        batch["segments"] = np.sort(random.integers(0, 4, batch["tokens"].shape), 1).astype(np.int32)
    return result


@functools.cache
def run(family: str, layout: str | None, attention: str = "ring", packs: bool = False):
    model = lambda rngs: build_model(CONFIGS[family], rngs)
    return train(model, language_model_loss, packed() if packs else batches(), layout, attention=attention)


@pytest.mark.parametrize(
    ("family", "layout", "attention"),
    [
        ("gpt", "context8", "ring"),
        pytest.param("gpt", "context4-data2", "ulysses", marks=pytest.mark.slow),
        ("llama", "context2-hybrid", "gather"),
        pytest.param("llama", "context2-sequence", "ring", marks=pytest.mark.slow),
        pytest.param("gpt", "slices-context", "ring", marks=pytest.mark.slow),
    ],
)
def test_context(family, layout, attention):
    """Five steps with dropout. Failed once with rotary positions of a device's own part, and with its own dropout mask."""
    assert_equal(run(family, layout, attention), trained(family, None))


@pytest.mark.parametrize(
    ("layout", "attention"),
    [
        pytest.param("context8", "ring", marks=pytest.mark.slow),
        ("context2-hybrid", "ulysses"),
        pytest.param("context4-data2", "gather", marks=pytest.mark.slow),
    ],
)
def test_packed_documents(layout, attention):
    """Segments travel with the keys. The fault in mind: the segments of a device's own keys for everyone's."""
    assert_equal(run("llama", layout, attention, True), run("llama", None, "ring", True))


def test_segments_matter():
    """The comparison above is not blind: without them the gradients are others."""
    assert (
        leaf_difference(run("llama", None, "ring", True).gradients, trained("llama", None).gradients)[0]
        > 1e-3
    )


def test_fault_positions_in_order(monkeypatch):
    """Planted: positions as if each device held a piece of the sequence in order."""

    def in_order(whole, dim=0):
        import jax

        axes = sequence.sequence_axes()
        if not axes:
            return whole
        size = whole.shape[dim] // jax.lax.axis_size(axes)
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axes) * size, size, dim)

    monkeypatch.setattr(sequence, "own", in_order)
    model = lambda rngs: build_model(CONFIGS["llama"], rngs)
    wrong = train(model, language_model_loss, batches(), "context8", steps=1)
    assert leaf_difference(wrong.gradients, trained("llama", None).gradients)[0] > 1e-3
