"""Signals at random moments, as `benchmarks/chaos.py` sends them."""

import importlib.util
import pathlib
import sys

import pytest

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "chaos.py"
ONE = {
    "trial": 0, "seed": 0, "fault": "SIGKILL", "processes": 2, "then": 2, "in_save": True, "missed": False,
    "lost_commit": False, "corrupt_resume": False, "samples_repeated": 0, "samples_skipped": 0, "curve_equal": True,
    "detection_seconds": 1.0, "recovery_seconds": 5.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def chaos():
    sys.path.insert(0, str(FILE.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("chaos", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(FILE.parent))
    return module


def test_what_is_lost_is_counted(chaos):
    """Each kind of loss in its own number. The fault in mind: a sum that is zero whatever happened."""
    bad = {**ONE, "lost_commit": True, "corrupt_resume": True, "samples_repeated": 16, "samples_skipped": 32}
    bad |= {"curve_equal": False, "recovery_seconds": 9.0, "then": 4}
    late = {**ONE, "fault": "SIGSTOP", "detection_seconds": 16.0, "recovery_seconds": None}
    found = chaos.summary([ONE, bad, late])
    numbers = [
        found[n] for n in ("trials", "lost_commits", "corrupt_resumes", "samples_repeated", "samples_skipped")
    ]
    assert numbers == [3, 1, 1, 16, 32] and found["curves_equal"] == 2 and found["on_another_number"] == 1
    assert found["recovery_seconds"]["killed"] == {"median": 7.0, "p95": 9.0, "worst": 9.0, "count": 2}
    assert (
        found["detection_seconds"]["stopped"]["worst"] == 16.0
        and found["recovery_seconds"]["stopped"] is None
    )


def test_trials_that_are_there_are_not_run_again(chaos, tmp_path, monkeypatch):
    """It goes in pieces, and another seed is another series. The fault in mind: a piece counted twice."""
    ran = []
    monkeypatch.setattr(
        chaos, "trial", lambda n, seed, *_: ran.append((seed, n)) or {**ONE, "trial": n, "seed": seed}
    )
    for trials, seed, total in ((2, 0, 2), (3, 0, 3), (1, 5, 1)):
        assert chaos.run(trials, seed, tmp_path / "out.jsonl", tmp_path)["trials"] == total
    assert ran == [(0, 0), (0, 1), (0, 2), (5, 0)]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost(chaos, tmp_path):
    """Three trials. The faults in mind: a commit before its bytes, a cursor that is not restored."""
    found = chaos.run(3, 7, tmp_path / "out.jsonl", tmp_path)
    assert found["trials"] == found["curves_equal"] == 3
    lost = ("lost_commits", "corrupt_resumes", "samples_repeated", "samples_skipped")
    assert [found[n] for n in lost] == [0] * 4
