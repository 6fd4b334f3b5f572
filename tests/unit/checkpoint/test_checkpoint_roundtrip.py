"""What is restored is what was saved, wherever it was saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_fakes import FakePlan, at_step, equal, mesh_of

from shardtrain.checkpoint import Checkpointer, inspect, restore
from shardtrain.errors import CheckpointError


def test_bit_exact_across_meshes(tmp_path):
    """Failed when leaves were saved as bfloat16, and when the loaded tree was flattened in its own order."""
    meshes = [mesh_of(fsdp=8), mesh_of(tensor=4, fsdp=2), mesh_of(data=8), mesh_of(one=1)]
    first = FakePlan(meshes[0])
    state = reference = at_step(first.init(3), 1)
    for number in range(1, len(meshes) + 1):
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            assert checkpointer.save(state, force=True)
        plan = FakePlan(meshes[number % len(meshes)])
        state = restore(tmp_path / str(number), plan)
        assert equal(state, reference)
        for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(plan.abstract_state), strict=True):
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
            assert leaf.sharding.mesh == plan.mesh


def test_restored_state_can_be_donated(tmp_path):
    """Failed when the restored leaves were left on the host."""
    plan = FakePlan(mesh_of(fsdp=4))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(plan.init(0), force=True)
        state = checkpointer.restore(plan)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    before = np.asarray(state.params["bias"]).copy()
    assert np.array_equal(np.asarray(step(state).params["bias"]), before + 1)


def test_donating_at_once_does_not_change_what_is_written(tmp_path):
    """Failed when the write was started in a thread after `save` had returned."""
    plan = FakePlan(mesh_of(fsdp=8), width=2048)
    state = plan.init(0)
    reference = jax.tree.map(lambda x: np.asarray(x).copy(), state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, force=True)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    assert equal(restore(tmp_path, plan), reference)


def test_a_part_alone(tmp_path):
    """Failed when the fields not asked for were read as well (the optimizers differ)."""
    plan = FakePlan(mesh_of(fsdp=8))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(at_step(plan.init(1), 5), force=True)
    other = FakePlan(mesh_of(tensor=4), optimizer=optax.sgd(0.1, momentum=0.9))
    state = restore(tmp_path, other, parts=("params",), seed=2)
    fresh = other.init(2)
    assert equal(state.params, plan.init(1).params)
    assert equal(state.opt_state, fresh.opt_state) and int(state.step) == 0
    with pytest.raises(CheckpointError, match="unknown parts"):
        restore(tmp_path, other, parts=("weights",))


def test_what_is_kept_beside_the_state(tmp_path):
    """Failed when `extra` was left out of the manifest."""
    plan = FakePlan(mesh_of(tensor=4, fsdp=2))
    with Checkpointer(tmp_path, config={"steps": 3}) as checkpointer:
        state = checkpointer.restore_or_init(plan)
        checkpointer.save(at_step(state, 1), force=True, extra={"wandb": "abc"})
        checkpointer.wait()
        checkpointer.restore_or_init(plan)
        assert checkpointer.restored["extra"] == {"wandb": "abc"}
    seen = inspect(tmp_path)
    assert (seen["step"], seen["cursor"]) == (1, (1 << 32) + 5)
    assert (seen["groups"], seen["rules"], seen["config"]) == (8, "fake", {"steps": 3})
    assert seen["mesh"] == {"tensor": 4, "fsdp": 2}
    assert {"jax", "flax", "optax", "orbax", "shardtrain"} <= seen["versions"].keys()
    assert seen["parameters"] == 2 * 16 * 16 + 16
    assert seen["tree"]["params/blocks/0/w"] == {
        "shape": [16, 16],
        "dtype": "float32",
        "spec": ["fsdp", "tensor"],
    }


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(width=32), "params/bias: shape [16] in the checkpoint, [32] here"),
        (dict(optimizer=optax.sgd(0.1)), "not in this model: opt_state/0/count (int32[])"),
        (
            dict(optimizer=optax.sgd(0.1, momentum=0.9)),
            "missing in the checkpoint: opt_state/0/trace/bias (float32[16])",
        ),
        (dict(dtype=jnp.bfloat16), "params/bias: dtype float32 in the checkpoint, bfloat16 here"),
    ],
)
def test_another_model_is_refused(tmp_path, other, said):
    """Failed (silent cast for the dtype, an Orbax error for the others) without the comparison."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(FakePlan(mesh_of(fsdp=8)).init(0), force=True)
    plan = FakePlan(mesh_of(fsdp=8), **other)
    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, plan)
    assert said in caught.value.why and plan.inits == 0
    assert len(caught.value.why.splitlines()) <= 11
    assert ("weights alone" in caught.value.fix) == ("optimizer" in other)


def test_many_differences_are_cut_short(tmp_path):
    """Failed when all lines were printed."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(FakePlan(mesh_of(fsdp=8)).init(0), force=True)

    with pytest.raises(CheckpointError) as caught:
        restore(tmp_path, FakePlan(mesh_of(fsdp=8), width=32, optimizer=optax.sgd(0.1, momentum=0.9)))
    lines = caught.value.why.splitlines()
    assert len(lines) == 11 and lines[-1].strip() == "and 3 more"
