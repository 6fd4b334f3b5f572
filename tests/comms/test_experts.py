"""The exact collectives of the exchange of tokens, read from the compiled program."""

import functools
import math

import optax
import pytest

import shardtrain as st
from shardtrain.models import MoEConfig, build_model, language_model_loss
from shardtrain.parallel.routing import capacity
from shardtrain.plan.minimum import minimum

ROWS, LENGTH, LAYERS, D, E, K = 32, 32, 3, 64, 8, 2


@functools.cache
def compiled(factor, remat="full", **sizes):
    config = MoEConfig(
        vocab=256, sequence=LENGTH, embed=D, layers=LAYERS, heads=8, kv_heads=8, experts=E, expert_mlp=64,
        chosen=K, capacity=factor, remat=remat,
    )  # fmt: skip
    shape = (ROWS, LENGTH)
    plan = st.plan(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=st.make_mesh(**sizes),
    )
    return plan, plan.compile()


def test_tokens_go_and_come_back_twice():
    """Four all-to-alls a layer, of E*C places each. The fault in mind: remat that sends them again."""
    plan, step = compiled(1.25, expert=8)
    by_axis = step.collectives().by_axis()
    places = E * capacity(ROWS * LENGTH // 8, K, E, 1.25)
    count, size = by_axis["all-to-all", "expert"]
    assert count == 4 * LAYERS
    assert size == 4 * LAYERS * 7 / 8 * places * D * 4
    # Nothing else but the gradients of what every device has.
    assert set(by_axis) == {("all-to-all", "expert"), ("all-reduce", "expert")}
    dense = sum(math.prod(leaf.shape) for leaf in plan.leaves.values() if "expert" not in leaf.logical)
    assert by_axis["all-reduce", "expert"][1] == pytest.approx(2 * 7 / 8 * dense * 4, rel=2e-3)


def test_tokens_travel_again_when_told():
    """What came and went is not kept: two all-to-alls more in each layer, and less memory. The faults in mind: a policy that saves
    it all the same; one of the two kept."""
    _, kept = compiled(1.25, expert=8)
    _, again = compiled(1.25, "exchanged:again", expert=8)
    count, size = kept.collectives().by_axis()["all-to-all", "expert"]
    assert again.collectives().by_axis()["all-to-all", "expert"] == (
        count * 3 // 2,
        pytest.approx(size * 3 / 2),
    )
    assert again.memory()["temporaries"] < kept.memory()["temporaries"]


@pytest.mark.parametrize("sizes", [{"expert": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_the_minimum_is_met(sizes):
    """Over every axis. The fault in mind: sums over tensor per choice, not per token."""
    plan, step = compiled(1.25, **sizes)
    assert step.collectives().wire_bytes == pytest.approx(minimum(plan).bytes, rel=0.02)


def test_without_drops_the_largest_buffers():
    """On CPU, where the all-to-all is padded: n * T * min(k, E/n) rows; and a gather of the counts."""
    _, step = compiled(0.0, data=2, expert=4)
    by_axis = step.collectives().by_axis()
    tokens = ROWS * LENGTH // 8
    assert by_axis["all-to-all", "expert"] == (4 * LAYERS, 4 * LAYERS * 3 / 4 * 4 * tokens * K * D * 4)
    assert by_axis["all-gather", "expert"] == (LAYERS, LAYERS * 3 / 4 * 4 * E * 4)
