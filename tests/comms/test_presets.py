"""The exact collectives of each preset, by mesh axis, read from the compiled program."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.models import GPTConfig, build_model, language_model_loss
from shardtrain.plan.minimum import minimum
from shardtrain.tree import flatten

CONFIG = GPTConfig(vocab=256, sequence=32, embed=64, layers=3, heads=8, remat="dots")
ROWS, LAYERS = 32, 3


def compiled(sizes, rules, microbatches=1, remat="dots", layers=LAYERS):
    spec = {
        k: ((ROWS, 32), d) for k, d in (("tokens", "int32"), ("targets", "int32"), ("weights", "float32"))
    }
    plan = st.plan(
        lambda rngs: build_model(dataclasses.replace(CONFIG, remat=remat, layers=layers), rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(**spec),
        mesh=st.make_mesh(**sizes),
        rules=rules,
        microbatches=microbatches,
    )
    return plan, plan.compile()


@pytest.fixture(scope="module")
def steps():
    return {
        "data": compiled({"data": 8}, "data"),
        "data4": compiled({"data": 8}, "data", 4),
        "zero1": compiled({"data": 8}, "zero1"),
        "zero1-4": compiled({"data": 8}, "zero1", 4),
        "fsdp": compiled({"fsdp": 8}, "fsdp"),
        "fsdp-none": compiled({"fsdp": 8}, "fsdp", remat="none"),
        "tensor": compiled({"tensor": 8}, "tensor"),
        "hybrid": compiled({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor"),
    }


def parameter_bytes(plan):
    return 4 * plan.parameter_count


@pytest.mark.parametrize("name", ["data", "data4"])
def test_data_reduces_once(steps, name):
    """2f*X bytes whatever the number of microbatches. The fault in mind: the reduction inside the loop."""
    plan, step = steps[name]
    by_axis = step.collectives().by_axis()
    assert set(by_axis) == {("all-reduce", "data")}
    expected = 2 * 7 / 8 * parameter_bytes(plan)
    assert step.collectives().wire_bytes == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["zero1", "zero1-4"])
def test_zero1_scatters_and_gathers(steps, name):
    """f*X down and f*X back, and little else. The fault in mind: `psum` in place of `psum_scatter`."""
    plan, step = steps[name]
    wire = {op: bytes_ for (op, axis), (_, bytes_) in step.collectives().by_axis().items() if axis == "data"}
    spread = sum(math.prod(x.shape) for x in plan.leaves.values() if x.shard.dim is not None) * 4
    assert wire["reduce-scatter"] == pytest.approx(7 / 8 * spread, rel=1e-6)
    assert wire["all-gather"] == pytest.approx(7 / 8 * spread, rel=1e-6)
    assert spread > 0.97 * parameter_bytes(plan)


def test_zero1_divides_what_it_keeps(steps):
    """Parameters and moments at rest are parts. Failed once when the moments were whole."""
    plan, _ = steps["zero1"]
    part = jax.sharding.PartitionSpec(None, "data")
    moments = plan.abstract_state.opt_state[0].mu
    assert flatten(moments)["blocks/mlp/up_kernel"].sharding.spec == part
    assert flatten(plan.abstract_state.params)["blocks/mlp/up_kernel"].sharding.spec == part


@pytest.mark.parametrize("name", ["fsdp", "fsdp-none"])
def test_fsdp_gathers_each_layer_twice(steps, name):
    """Per layer: all-gather forward and backward, one reduce-scatter. Failed once when remat saved weights."""
    plan, step = steps[name]
    by_axis = step.collectives().by_axis()
    spread = {p: math.prod(x.shape) * 4 for p, x in plan.leaves.items() if x.shard.dim is not None}
    layers = sum(size for path, size in spread.items() if path.startswith("blocks/"))
    rest = sum(spread.values()) - layers
    assert by_axis["all-gather", "fsdp"][1] == pytest.approx(7 / 8 * (2 * layers + rest), rel=1e-6)
    assert by_axis["reduce-scatter", "fsdp"][1] == pytest.approx(7 / 8 * (layers + rest), rel=1e-6)
    assert set(axis for _, axis in by_axis) == {"fsdp"}


def test_tensor_reduces_activations_only(steps):
    """Two all-reduces of an activation per layer forward, two backward, and scalars per token for the
    loss; no gather of logits, tables or hidden states. The fault in mind: q, k, v split from one fused dim."""
    _, step = steps["tensor"]
    collectives = step.collectives()
    assert {(c.op, c.axis) for c in collectives} == {("all-reduce", "tensor")}
    activation = ROWS * 32 * 64 * 4
    large = sum(c.count * c.bytes / activation for c in collectives if c.bytes >= activation / 2)
    assert large <= 4 * LAYERS + 2 + 0.1  # and the table's lookup and the head's gradient of x


@pytest.mark.parametrize("name", ["data", "zero1", "fsdp", "tensor", "hybrid"])
def test_nothing_is_gathered_whole(steps, name):
    """No parameter tree, no logits, no batch. The fault in mind: gathered weights saved for the backward."""
    plan, step = steps[name]
    logits, batch = ROWS * 32 * 256 * 4, ROWS * 32 * 4
    inside = {
        (tuple(s), d)
        for s, d in (
            ((ROWS, 32, 256), "f32"),
            ((ROWS * 32, 256), "f32"),
            ((ROWS, 32), "s32"),
            ((ROWS * 32,), "s32"),
        )
    }
    stacked = {
        tuple(x.shape) for p, x in plan.leaves.items() if p.startswith("blocks/") and x.shard.dim is not None
    }
    for c in step.collectives():
        if c.op != "all-gather":
            continue
        shapes = [part.rstrip("]").split("[") for part in c.shape.split()]
        for dtype, dims in shapes:
            shape = tuple(int(d) for d in dims.split(",") if d)
            assert (shape, dtype) not in inside, f"gathers the batch or logits: {c}"
            if name == "fsdp":
                assert shape not in stacked, f"gathers a whole stack: {c}"
    if name in ("fsdp", "hybrid"):
        largest = max(c.bytes for c in step.collectives() if c.op == "all-gather")
        assert largest < parameter_bytes(plan) / 4
    assert logits > batch  # the shapes above are what they say


def test_state_stays_divided():
    """Shardings after a step are those after init, leaf by leaf, for many optimizers. The fault in mind: without
    `out_shardings`."""
    model = (lambda key: {"w": jax.random.normal(key, (64, 64)), "b": np.zeros(64, np.float32)}, None)
    model = (model[0], lambda p, x: x @ p["w"] + p["b"])
    loss = lambda model, batch: (model(batch["x"]) ** 2).mean()
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "sgd": optax.sgd(1e-2, momentum=0.9),
        "lion": optax.lion(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=16),
        "multi": optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(1e-2)}, {"w": "a", "b": "b"}),
        "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        "accumulate": optax.MultiSteps(optax.adam(1e-3), 2),
    }
    for name, optimizer in optimizers.items():
        for rules, sizes in (("fsdp", {"fsdp": 8}), ("zero1", {"data": 8})):
            plan = st.plan(
                model,
                loss,
                optimizer,
                batch=st.batch_spec(x=(16, 64)),
                mesh=st.make_mesh(**sizes),
                rules=rules,
            )
            first = plan.init(0)
            before = {p: x.sharding for p, x in flatten(first).items()}
            after, metrics = plan.compile()(first, plan.put({"x": np.ones((16, 64), np.float32)}))
            for path, leaf in flatten(after).items():
                assert leaf.sharding.is_equivalent_to(before[path], leaf.ndim), (name, rules, path)
            assert ("learning_rate" in metrics) == (name == "inject")


def test_a_program_does_not_grow_with_layers(steps):
    """Three times the layers, the same instructions and as many collectives in the text; only loops run longer.
    Failed once: the scan unrolled."""
    few, many = steps["fsdp"][1], compiled({"fsdp": 8}, "fsdp", layers=3 * LAYERS)[1]
    assert many.program().lines == pytest.approx(few.program().lines, rel=0.01)
    assert len(many.collectives()) == len(few.collectives())
    runs = lambda step: sum(c.count for c in step.collectives() if LAYERS in c.loops or 3 * LAYERS in c.loops)
    assert runs(many) == 3 * runs(few) > 0


def test_fsdp_across_slices():
    """Over 2 slices of 4 devices: of X gathered 3/4 within and 1/2 * X/4 across, and the minimum says so.

    Failed once: gathered within first, each device sent 1/2 * X across.
    """
    plan, step = compiled({"fsdp": 4, "dcn": {"fsdp": 2}}, "fsdp")
    sent = {key: wire for key, (_, wire) in step.collectives().by_axis().items()}
    assert set(op for op, _ in sent) == {"all-gather", "reduce-scatter", "all-reduce"}
    for op in ("all-gather", "reduce-scatter"):
        assert sent[op, "slice_fsdp"] == sent[op, "fsdp"] / 6
        for axis in ("slice_fsdp", "fsdp"):
            assert sent[op, axis] == sum(t.bytes for t in minimum(plan) if (t.op, t.axis) == (op, axis))
