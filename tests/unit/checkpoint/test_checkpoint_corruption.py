"""Seeded damage to all files of a checkpoint: always seen, never loaded, the step before used."""

import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).parents[3] / "benchmarks" / "corruption.py"


@pytest.fixture(scope="module")
def corruption():
    spec = importlib.util.spec_from_file_location("corruption", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("faults", "restores", "seed"), [(60, 6, 1), pytest.param(2000, 40, 2, marks=pytest.mark.slow)]
)
def test_every_damage_is_seen(corruption, faults, restores, seed):
    """Failed when the chunks' digests were not compared."""
    found = corruption.run(faults, restores, seed)
    assert found["missed"] == [] and found["detected"] == faults
    assert found["restored_older_bit_for_bit"] == found["restores"] >= restores
    assert set(found["by_kind"]) == set(corruption.KINDS) and len(found["by_file"]) >= 8
