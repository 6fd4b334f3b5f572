"""`st.verify` finds what distributing can do to a model. Each fault is planted in one layout, and named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.errors import ConfigError
from shardtrain.models import GPTConfig, LlamaConfig, build_model, language, language_model_loss
from shardtrain.models.layers import cross_entropy as ce
from shardtrain.models.layers import dense
from shardtrain.parallel import fsdp, lookup, pipeline, ring, sequence, stages, stream
from shardtrain.plan import batches as batches_room
from shardtrain.plan import verify as room
from shardtrain.plan.candidates import Candidate, candidates, covering
from shardtrain.train import step

GPT = GPTConfig(vocab=64, sequence=16, embed=32, layers=4, heads=8, dropout=0.1)
LLAMA = LlamaConfig(vocab=64, sequence=16, embed=32, layers=2, heads=8, kv_heads=8, mlp=64)
ROWS, GROUPS = 16, 8


def data():
    random = np.random.default_rng(0)
    result = []
    for _ in range(2):
        tokens = random.integers(0, 64, (ROWS, 17), np.int32)
        weights = (np.arange(16) < random.integers(2, 17, (ROWS, 1))).astype(np.float32)
        result.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights})
    return result


def optimizer():
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3))


def trained(config, name, tx=None):
    """As `verify` trains a layout; None: the reference."""
    candidate = Candidate.parse(name) if name else Candidate.of({"data": 1})
    options = {k: v for k, v in candidate.options.items() if k != "microbatches"}
    plan = st.plan(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        optax.chain(room._record(), tx or optimizer()),
        batch=st.batch_spec(**data()[0]),
        mesh=st.make_mesh(devices=jax.devices()[: candidate.devices], **candidate.mesh),
        groups=GROUPS,
        **options,
    )
    return room._train(plan, data(), 2, 0)


@functools.cache
def reference(config):
    return trained(config, None)


def found(config, name, tx=None):
    return room._compare(trained(config, name, tx), reference(config), room.BOUNDS["f32"])


# --- the faults -----------------------------------------------------------------------------------


def scaled_gradients(patch):
    """Gradients multiplied by the number of devices."""
    plain = fsdp.reduce_leaf
    patch.setattr(step, "reduce_leaf", lambda *a: 8 * plain(*a))


def duplicated_row(patch):
    """One row in the place of another."""

    def order(batch, groups):
        rows = np.arange(batch).reshape(batch // groups, groups).T.reshape(-1)
        rows[1] = rows[0]
        return rows

    patch.setattr(batches_room, "group_order", order)


def equal_dropout(patch):
    """One key for all groups."""
    patch.setattr(
        step, "group_key", lambda key, step, group: jax.random.fold_in(jax.random.fold_in(key, step), 0)
    )


def weights_ignored(patch):
    """Padding counts."""
    plain = ce.cross_entropy
    patch.setattr(
        language, "cross_entropy", lambda x, head, targets, w: plain(x, head, targets, jnp.ones_like(w))
    )


def local_clip():
    """The norm of an eighth of every leaf."""

    def update(grads, state, params=None):
        part = jax.tree.map(lambda g: g.reshape(-1)[: -(-g.size // 8)], grads)
        scale = jnp.minimum(1.0, 0.1 / optax.tree.norm(part))
        return jax.tree.map(lambda g: g * scale, grads), state

    clip = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(clip, optax.adamw(1e-3))


def stage_skipped(patch):
    """The second stage passes on what it gets."""
    plain = pipeline._Executor.forward

    def forward(self, carry, row):
        x, y, scalars = plain(self, carry, row)
        return x, jax.tree.map(lambda a, b: jnp.where(self.stage == 1, a, b), x, y), scalars

    patch.setattr(pipeline._Executor, "forward", forward)


def permuted_gather(patch):
    """Shards of a weight in another order."""
    plain = fsdp._gather

    def gather(leaf, shard):
        whole = plain(leaf, shard)
        return jnp.roll(whole, whole.shape[shard.dim] // 4, shard.dim)

    patch.setattr(fsdp, "_gather", gather)


def unreduced_leaf(patch):
    """The gradient of vectors is each device's own."""
    plain = fsdp.reduce_leaf

    def reduce(gradient, shard, target, axes):
        if gradient.ndim > 1:
            return plain(gradient, shard, target, axes)
        # What one device would have, in the type that is expected.
        first = jnp.where(jax.lax.axis_index(axes) == 0, gradient, 0)
        return plain(first, shard, target, axes)

    patch.setattr(step, "reduce_leaf", reduce)


def mean_of_means(patch):
    """Each group's loss is divided by its own weight."""
    plain = step._scalars

    def scalars(loss):
        vector, names = plain(loss)
        return vector.at[:2].set(jnp.stack([vector[0] / jnp.maximum(vector[1], 1), jnp.float32(1)])), names

    patch.setattr(step, "_scalars", scalars)


def microbatch_skipped(patch):
    """The last group of every device is left out."""
    plain = step.over_groups

    def over(function, *rest, **how):
        return plain(
            lambda g, rows: jax.tree.map(lambda x: jnp.where(g % 2 == 1, 0 * x, x), function(g, rows)),
            *rest,
            **how,
        )

    patch.setattr(step, "over_groups", over)


def narrow_reduction(patch):
    """Gradients reduced in 16 bits."""
    plain = fsdp.reduce_leaf
    patch.setattr(step, "reduce_leaf", lambda g, *a: plain(g.astype(jnp.bfloat16).astype(jnp.float32), *a))


def positions_in_order(patch):
    """Positions of a device's part as if the sequence were cut in order."""

    def own(whole, dim=0):
        axes = sequence.sequence_axes()
        if not axes:
            return whole
        size = whole.shape[dim] // jax.lax.axis_size(axes)
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axes) * size, size, dim)

    patch.setattr(sequence, "own", own)


def own_dropout(patch):
    """Each part of a sequence draws the same mask."""
    patch.setattr(dense, "own_part", lambda make, shape, dim=1: make(shape))


def last_hop_missing(patch):
    """Keys of one device are never met."""
    plain = ring._pairs

    def pairs(way, other):
        return (
            plain(way, other)
            if other is None
            else plain(way, jnp.where(other == 0, jax.lax.axis_index(way.axes) + 1, other))
        )

    patch.setattr(ring, "_pairs", pairs)


def future_seen(patch):
    """Queries meet the keys of later devices in place of earlier ones."""
    plain = ring._pairs

    def pairs(way, other):
        found = plain(way, other)
        return found if other is None else [found[0], (1 - found[1][0], 1 - found[1][1], False)]

    patch.setattr(ring, "_pairs", pairs)


def partial_rows(patch):
    """A row of a divided vocabulary as one device has it: others are not summed."""
    plain = lookup._place
    patch.setattr(
        lookup, "_place", lambda ids, height, vocab: (plain(ids, height, vocab)[0], jnp.ones_like(ids, bool))
    )


def stream_unsummed(patch):
    """A block's output is one device's part of the sum."""
    plain = stream.reduce_scatter
    patch.setattr(
        stream,
        "reduce_scatter",
        lambda x, axes, dim: plain(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes, dim),
    )


def layers_swapped(patch):
    """Two layers of a pipeline change places."""
    plain = stages.Deal.out

    def out(self, leaf):
        pieces = plain(self, leaf)
        return jnp.flip(pieces, 1)

    patch.setattr(stages.Deal, "out", out)


def stale_microbatch(patch):
    """A stage's backward takes the rows of another microbatch."""
    plain = pipeline._Executor.back

    def back(self, carry, row, half):
        from shardtrain.parallel import ticks

        return plain(self, carry, row.at[ticks.B_BATCH].set(jnp.maximum(row[ticks.B_BATCH] - 1, 0)), half)

    patch.setattr(pipeline._Executor, "back", back)


FAULTS = {
    scaled_gradients: (GPT, "data8", "gradient of"),
    duplicated_row: (GPT, "data8", "gradient of"),
    equal_dropout: (GPT, "fsdp8", "gradient of"),
    weights_ignored: (GPT, "data8", "gradient of"),
    stage_skipped: (GPT, "stage4-data2", "gradient of"),
    permuted_gather: (GPT, "fsdp8", "gradient of"),
    unreduced_leaf: (GPT, "data8", "gradient of .*(bias|scale)"),
    mean_of_means: (GPT, "data8", "gradient of"),
    microbatch_skipped: (GPT, "data4-tensor2", "gradient of"),
    narrow_reduction: (GPT, "data8", "gradient of"),
    positions_in_order: (LLAMA, "context8", "gradient of"),
    own_dropout: (GPT, "context8", "gradient of"),
    last_hop_missing: (LLAMA, "context4-data2", "gradient of"),
    future_seen: (LLAMA, "context8", "gradient of"),
    partial_rows: (GPT, "tensor8", "gradient of"),
    stream_unsummed: (LLAMA, "tensor8+tensor_sequence", "gradient of"),
    layers_swapped: (GPT, "stage2-data4", "gradient of"),
    stale_microbatch: (GPT, "stage4-data2+gpipe", "gradient of"),
}
FAST = {scaled_gradients, weights_ignored, permuted_gather}  # the others: `pytest -m slow`


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.__name__, marks=() if f in FAST else pytest.mark.slow) for f in FAULTS],
)
def test_fault_is_found(fault, monkeypatch):
    config, name, first = FAULTS[fault]
    reference(config)
    fault(monkeypatch)
    result = found(config, name)
    assert not result["equal"]
    import re

    assert re.match(first, result["first_difference"])


def test_fault_local_clip():
    """Gradients are right; what was made of them is not."""
    result = found(GPT, "data8", local_clip())
    assert not result["equal"] and result["gradients"] < 1e-5
    assert not result["first_difference"].startswith("gradient of")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for _, name, _ in FAULTS.values()}))
def test_without_a_fault_they_are_equal(name):
    for config in (GPT, LLAMA):
        if "stage4" not in name or config.layers >= 4:
            assert found(config, name)["equal"]


def test_verify():
    """Two layouts, one that cannot be, and one that is unknown; the report."""
    result = st.verify(
        lambda rngs: build_model(dataclasses.replace(LLAMA, kv_heads=4), rngs),
        language_model_loss,
        optimizer(),
        data(),
        layouts=["fsdp4-tensor2", "context8+ulysses", "expert8"],
        steps=2,
        groups=GROUPS,
    )
    ok, also, impossible = result.layouts
    assert ok.equal and also.equal is None and impossible.equal is None and result.equal
    assert "heads" in also.first_difference and "expert" in impossible.first_difference
    assert ok.gradients < 1e-6 and ok.parameters < 1e-6 and ok.groups == 8
    assert "1 of 1 layouts are equal" in str(result) and result.as_json()["layouts"][0]["mesh"] == {
        "fsdp": 4,
        "tensor": 2,
    }


@pytest.mark.parametrize("name", ["data", "data2-data4", "rows8", "data8+zero", "data8+y4", ""])
def test_names_that_say_nothing(name):
    with pytest.raises(ConfigError, match=f"layout '{name}'".replace("+", r"\+")):
        Candidate.parse(name)


def test_candidates():
    """Each once, of eight devices, with a name that says all; few cover every pair of choices."""
    every = candidates(8, ("data", "fsdp", "tensor", "context", "stage", "expert"))
    assert len(set(every)) == len(every) > 60
    for candidate in every:
        assert candidate.devices == 8 and Candidate.parse(candidate.name) == candidate
    few = covering(every)
    assert len(few) < len(every) / 2 and set(few) <= set(every)


def test_nothing_compared_is_not_equal():
    """Failed once: a list of layouts none of which can be came out as equal, with exit code 0."""
    refused = room.Compared("expert8", {"expert": 8}, "fsdp_tensor", 1, 0, *[None] * 7, "no experts", 0.0)
    assert not room.Verification((refused,), "one device", 1e-5).equal
