"""What `benchmarks/choosing.py` kept: searches against every candidate compiled."""

import json
import pathlib

import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[3] / "benchmarks" / "results" / "choosing.json"
CASES = json.loads(FILE.read_text())["cases"]


def ranks(values):
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("name", CASES)
def test_the_choice_is_near_the_best(name):
    """Within 5% of the least compiled cost of all that fit; compiled costs in the order of those on paper.

    The fault in mind: a choice compared with itself, or with layouts that do not fit.
    """
    case = CASES[name]
    compiled = {
        c["layout"]: c["compiled"] for c in case["candidates"] if c["compiled"] and c["fits"] is not False
    }
    assert len(compiled) == case["compiled"] and min(compiled, key=compiled.get) == case["best"]
    assert compiled[case["choice"]] / min(compiled.values()) == pytest.approx(case["choice_over_best"])
    assert case["choice_over_best"] <= 1.05
    both = [
        (c["partitioned"], c["compiled"]) for c in case["candidates"] if c["partitioned"] and c["compiled"]
    ]
    paper, truth = (ranks(column) for column in zip(*both, strict=True))
    assert np.corrcoef(paper, truth)[0, 1] == pytest.approx(case["rank_partitioned"], abs=0.01)
    assert case["rank_partitioned"] >= 0.9 and case["rank_sketched"] >= 0.89


def test_each_model_was_compiled_often():
    """At least forty candidates of each model, on TPUs and on GPUs."""
    for model in ("gpt", "llama", "moe"):
        found = {case["target"]: case["compiled"] for name, case in CASES.items() if name.startswith(model)}
        assert len(found) == 2 and sum(found.values()) >= 40, (model, found)
