"""What `benchmarks/parity.py` kept: every layout that could be is equal to one device, and the kinds are there."""

import json
import pathlib

import pytest

KEPT = json.loads((pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "parity.json").read_text())
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


def test_kinds_of_layouts():
    """The fault in mind: a kind of layout that the plan refuses, and that so left the matrix."""
    for model in ("gpt",):
        equal = {n.split(" ", 1)[1]: r for n, r in CASES.items() if n.startswith(f"{model} ") and r["equal"]}
        assert len(equal) >= 30
        assert {a for r in equal.values() for a in r["mesh"]} >= {
            "data",
            "fsdp",
            "context",
            "tensor",
            "stage",
        }
