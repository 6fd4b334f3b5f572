"""The comparison has teeth: each fault, planted alone in our own code, is seen."""

import jax
import numpy as np
import optax
import pytest
from compare import difference, train
from test_parity_models import Mlp, batches, loss

from shardtrain.parallel import fsdp, groups
from shardtrain.train import parts
from shardtrain.train import step as steps


@pytest.fixture(scope="module")
def reference():
    return train(Mlp, loss, batches(), None, optimizer=optax.sgd(0.1), steps=3)


def scaled(monkeypatch):
    true = steps.reduce_leaf
    monkeypatch.setattr(steps, "reduce_leaf", lambda g, *rest: 8 * true(g, *rest))


def not_reduced(monkeypatch):
    true = steps.reduce_leaf
    monkeypatch.setattr(
        steps,
        "reduce_leaf",
        lambda g, *rest: jax.tree.map(lambda x: jax.lax.pmax(g, rest[2]), true(g, *rest)),
    )


def one_key(monkeypatch):
    monkeypatch.setattr(steps, "group_key", lambda key, step, group: jax.random.fold_in(key, 0 * group))


def key_of_every_step(monkeypatch):
    monkeypatch.setattr(steps, "group_key", lambda key, step, group: jax.random.fold_in(key, group))


def mean_of_means(monkeypatch):
    true = steps._scalars

    def weigh_alike(value):
        return true(groups.Loss(value.sum / jax.numpy.maximum(value.weight, 1), 1.0, value.metrics))

    monkeypatch.setattr(steps, "_scalars", weigh_alike)


def duplicated_row(monkeypatch):
    from shardtrain.plan import batches

    true = groups.group_order
    monkeypatch.setattr(
        batches, "group_order", lambda batch, count: np.where((o := true(batch, count)) == 5, 6, o)
    )


def blocked_rows(monkeypatch):
    from shardtrain.plan import batches

    monkeypatch.setattr(batches, "group_order", lambda batch, count: np.arange(batch))


def permuted_gather(monkeypatch):
    true = fsdp._gather.fun if hasattr(fsdp._gather, "fun") else fsdp._gather
    monkeypatch.setattr(fsdp, "gather_leaf", lambda leaf, shard: _rolled(true, leaf, shard))
    monkeypatch.setattr(parts, "gather_leaf", lambda leaf, shard: _rolled(true, leaf, shard))


def _rolled(gather, leaf, shard):
    if shard.dim is None:
        return leaf
    size = leaf.shape[shard.dim]
    return jax.numpy.roll(gather(leaf, shard), size, shard.dim)


FAULTS = {
    "scaled by the number of devices": (scaled, "data8"),
    "not summed over devices": (not_reduced, "data8"),
    "one key for all groups": (one_key, "data8"),
    "the same key every step": (key_of_every_step, "data8"),
    "a mean of means": (mean_of_means, "data8"),
    "a duplicated row": (duplicated_row, "data8"),
    "rows in blocks, not interleaved": (blocked_rows, "data8"),
    "a permuted gather": (permuted_gather, "fsdp8"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, reference, monkeypatch):
    """This test is its own proof: without the fault the same comparison is silent (test_no_fault)."""
    plant, layout = FAULTS[name]
    plant(monkeypatch)
    ours = train(Mlp, loss, batches(), layout, optimizer=optax.sgd(0.1), steps=3)
    worst = max(
        difference(ours.gradients, reference.gradients)[0], difference(ours.params, reference.params)[0]
    )
    assert worst > 1e-4, f"{name} was not seen: {worst:.1e}"


@pytest.mark.parametrize("layout", ["data8", "fsdp8"])
def test_no_fault(layout, reference):
    """The fault in mind: a fault left in."""
    ours = train(Mlp, loss, batches(), layout, optimizer=optax.sgd(0.1), steps=3)
    assert difference(ours.gradients, reference.gradients)[0] < 1e-6
    assert difference(ours.params, reference.params)[0] < 1e-6


def test_clipping_is_global():
    """A clip by each shard's own norm gives another update. The fault in mind: the update inside the manual region."""
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    reference = train(Mlp, loss, batches(), None, optimizer=clip, steps=2)
    for layout in ("fsdp8", "zero1"):
        ours = train(Mlp, loss, batches(), layout, optimizer=clip, steps=2)
        assert difference(ours.params, reference.params)[0] < 1e-6
