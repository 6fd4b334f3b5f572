"""What a config becomes."""

import jax
import numpy as np
import pytest

from shardtrain.config import MeshSizes, Optimizer, RunConfig
from shardtrain.config.build import decays, learning_rate
from shardtrain.models import GPTConfig, LlamaConfig, build_model
from shardtrain.plan.model import as_model
from shardtrain.tree import flatten


@pytest.mark.parametrize("model", [GPTConfig(), LlamaConfig()])
def test_weight_decay_reaches_matrices_only(model):
    """Failed once: the names were compared whole, and nothing decayed."""
    params, _ = jax.eval_shape(
        as_model(lambda rngs: build_model(model, rngs), None, None).init, jax.random.key(0)
    )
    chosen = flatten(decays(params))
    assert {p for p, yes in chosen.items() if not yes} == {p for p in chosen if p.endswith(("bias", "scale"))}
    assert sum(chosen.values()) >= 6


def test_learning_rate():
    """Rises over the warm-up, falls to `final`; a run shorter than its warm-up ends inside it."""
    config = RunConfig(GPTConfig(), optimizer=Optimizer(learning_rate=1.0, warmup=10, final=0.1), steps=110)
    rate = learning_rate(config)
    values = np.array([float(rate(i)) for i in range(111)])
    assert (
        values[0] == pytest.approx(0.1)
        and values[9] == pytest.approx(1.0)
        and values[110] == pytest.approx(0.1)
    )
    assert (np.diff(values[10:]) <= 1e-6).all()
    short = learning_rate(RunConfig(GPTConfig(), optimizer=Optimizer(learning_rate=1.0, warmup=10), steps=5))
    np.testing.assert_allclose([float(short(i)) for i in range(5)], values[:5], rtol=1e-6)


def test_every_shipped_config_resolves():
    """Every function of configs/ is a RunConfig that survives its JSON. The fault in mind: b175."""
    import importlib.util
    import pathlib

    from shardtrain.config import from_json, to_json

    found = 0
    for file in sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in vars(module).items():
            if (
                callable(function)
                and getattr(function, "__module__", "") == file.stem
                and not name.startswith("_")
            ):
                config = function()
                assert from_json(to_json(config)) == config
                assert isinstance(config.mesh, MeshSizes)
                found += 1
    assert found == 11
