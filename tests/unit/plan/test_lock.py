"""`plan.lock`: what a change of the model, of the rules or of a library looks like."""

import copy
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import shardtrain as st
from shardtrain.plan.lock import Lock


def locked(width=128, rules="fsdp"):
    init = lambda key: {
        "up": jax.random.normal(key, (64, width)),
        "down": jax.random.normal(key, (width, 64)),
    }
    plan = st.plan(
        (init, lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]),
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(32, 64)),
        mesh=st.make_mesh(fsdp=8),
        rules=rules,
    )
    return Lock.of(plan, st.audit(plan.compile()))


@pytest.fixture(scope="module")
def lock():
    return locked()


def test_round_trip(lock, tmp_path):
    """Written, read, and no change. The fault in mind: numbers that come back as others."""
    (tmp_path / "plan.lock").write_text(lock.text())
    again = Lock.read(tmp_path / "plan.lock")
    assert lock.changes_from(again) == [] and again.changes_from(lock) == []
    assert again.text() == lock.text()
    assert len(lock.text().splitlines()) > 15  # one entry a line, for the diff of a version control


def test_a_wider_model(lock):
    """Shapes, bytes, and once a leaf, not three times. Failed once: copies in the optimizer were listed each."""
    lines = locked(width=256).changes_from(lock)
    state = [line for line in lines if line.startswith("state:")]
    assert state == [
        "state: params/down: float32[128,64] fsdp -> float32[256,64] fsdp (and 2 copies in the optimizer)",
        "state: params/up: float32[64,128] fsdp -> float32[64,256] fsdp (and 2 copies in the optimizer)",
    ]
    assert any(
        line.startswith("collectives: all-gather over fsdp: ") and "168.0 KiB" in line for line in lines
    )
    assert any(line.startswith("sent per device: ") and "+" in line for line in lines)
    assert not any("versions" in line or "mesh" in line for line in lines)


def test_other_rules(lock):
    """The name of the rules and what they change. The fault in mind: shapes are equal, so nothing is said."""
    lines = locked(rules="infer").changes_from(lock)
    assert "rules: fsdp -> infer" in lines
    assert any(
        line.startswith("state: params/up: float32[64,128] fsdp -> float32[64,128] . fsdp (and 2")
        for line in lines
    )


def test_an_upgrade_of_jax(lock):
    """A compiler that sends more is a change and names the versions; one that sends the same is none. Failed once when
    a version alone was a change."""
    content = json.loads(lock.text())
    content["versions"]["jax"] = "0.1.0"
    content["compiler"] = "an older one"
    assert lock.changes_from(Lock(content)) == []
    older = copy.deepcopy(content)
    older["collectives"]["all-gather over fsdp"]["wire_bytes"] /= 2
    older["collectives"]["all-to-all over fsdp"] = {"count": 3, "wire_bytes": 3 * 2**20}
    older["bytes"] /= 2
    older["peak_bytes"] = content["peak_bytes"] * 1.01  # as close as compilers are
    lines = lock.changes_from(Lock(older))
    assert f"versions: jax: 0.1.0 -> {jax.__version__}" in lines
    assert "collectives: - all-to-all over fsdp: 3 x, 3.0 MiB" in lines
    assert any(line.startswith("sent per device: ") and "(+100.0%)" in line for line in lines)
    assert any(line.startswith("compiler: an older one -> ") for line in lines)
    assert not any(line.startswith("peak") for line in lines)
    older["peak_bytes"] = content["peak_bytes"] * 1.5
    assert any(line.startswith("peak memory: ") for line in lock.changes_from(Lock(older)))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "state": []}'])
def test_files_that_are_no_lock(content, tmp_path):
    """One message that names the file and --update. Failed once when a lock that was cut by hand was taken for one."""
    file = tmp_path / "plan.lock"
    file.write_text(content)
    with pytest.raises(st.ConfigError, match="--update") as caught:
        Lock.read(file)
    assert str(file) in str(caught.value)
    with pytest.raises(st.ConfigError, match="No such file"):
        Lock.read(tmp_path / "nothing.lock")
