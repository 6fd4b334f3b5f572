"""What `benchmarks/planning.py` kept: steps on paper against the same steps compiled."""

import json
import pathlib
import statistics

import pytest

from shardtrain.mesh import Target

RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"
KEPT = json.loads((RESULTS / "planning.json").read_text())
CASES = KEPT["measured"]
OFF = {  # under tensor the TPU compiler runs the router's backward on a part of the sequence each: CONTRIBUTING
    ("configs/moe.py:tiny", "v5e:2x4"): 0.004,
}


def test_memory():
    """Half of the cases within a tenth, all but 5% within a quarter. The fault in mind: the summary of other cases."""
    assert len(CASES) >= 40
    errors = sorted(abs(c["peak_on_paper"] / c["peak_compiled"] - 1) for c in CASES if "refused" not in c)
    assert statistics.median(errors) == pytest.approx(KEPT["median_error"]) and KEPT["median_error"] < 0.10
    assert errors[int(0.95 * len(errors))] == pytest.approx(KEPT["error_of_95_percent"])
    assert KEPT["error_of_95_percent"] < 0.25


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['config']} {c['target']} {c['layout']}")
def test_flops_and_verdict(case):
    """FLOPs to 0.1%, but for what a compiler runs again since memory was short; nothing fits that the compiler does not take.

    The faults in mind: a kernel that nobody counts; a verdict on paper under the name of the compiler's.
    """
    if "refused" in case:
        assert case["fits"] is False and case["fits_on_paper"] is False
        return
    planned = case["flops_compiled"] - case["flops_recomputed"]
    within = OFF.get((case["config"], case["target"]), 1e-3)
    assert case["flops_on_paper"] == pytest.approx(planned, rel=within)
    chip = Target(case["target"]).chip
    assert case["fits"] == (None if chip is None else case["peak_compiled"] <= chip.usable_bytes)
    if case["flops_recomputed"]:  # XLA for GPUs counts what waits on the host, too, when it looks for room
        held = case["peak_compiled"] + case.get("hosted_compiled", 0)
        assert held > 0.75 * chip.hbm_bytes, "a program with room is run as it was planned"
