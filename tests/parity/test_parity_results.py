"""What `benchmarks/parity.py` kept: every layout that could be is equal to one device, and the kinds are there."""

import itertools
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KEPT = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
CASES = KEPT["cases"]


@pytest.mark.parametrize("name", CASES)
def test_equal_to_one_device(name):
    """The fault in mind: results made again with a layout that differs."""
    row = CASES[name]
    if row["equal"] is None:
        why = ("fewer than", "divisible")
        assert any(words in row["first_difference"] for words in why)
    else:
        assert row["equal"] and row["gradients"] <= 1e-5 and row["loss"] <= 1e-5 and row["grad_norm"] <= 1e-5
        assert not row.get("flips"), (
            "a choice of an expert that rounding decided: look at it, then say so here"
        )


@pytest.mark.parametrize("model", ["gpt", "llama", "moe"])
def test_kinds_of_layouts(model):
    """The fault in mind: a kind of layout that the plan refuses, and that so left the matrix."""
    equal = [r for n, r in CASES.items() if n.startswith(f"{model} ") and r["equal"]]
    assert len(equal) >= 30
    axes = {"data", "fsdp", "context", "tensor", "stage"} | ({"expert"} if model == "moe" else set())
    together = {frozenset(a for a, n in r["mesh"].items() if n > 1) for r in equal}
    assert set().union(*together) >= axes
    assert {frozenset(pair) for pair in itertools.combinations(axes, 2)} <= together
    assert {r["microbatches"] for r in equal} >= {1, 4}


def test_float64():
    """Of the same layouts. The fault in mind: a place in the step that rounds to less."""
    rows = KEPT["cases_f64"]
    assert {n for n, r in rows.items() if r["equal"]} == {n for n, r in CASES.items() if r["equal"]}
    equal = [r for r in rows.values() if r["equal"]]
    assert all(max(r["gradients"], r["loss"], r["grad_norm"]) <= 1e-12 and not r.get("flips") for r in equal)


def test_the_readme_says_it():
    assert (ROOT / "benchmarks" / "results" / "parity.md").read_text().strip() in (
        ROOT / "README.md"
    ).read_text()
