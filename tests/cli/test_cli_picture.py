"""`--html` of plan and search, and `calibrate`: files that are written whole or not at all."""

import json
import os
import pathlib
import shutil

import pytest

from shardtrain.plan import calibrate as room

PAPER = ["--target", "h100:1x8", "--compile", "no"]


def test_a_page_of_a_plan(config, as_json, tmp_path):
    """The page has the numbers of the JSON beside it, and the config's name as text, whatever it is.

    Failed once with a title that was not escaped.
    """
    bad = tmp_path / "<script>alert(1)<b>"
    bad.mkdir()
    file, function = config.rsplit(":", 1)
    shutil.copy(file, bad / "my.py")
    page = tmp_path / "plan.html"
    code, found = as_json("plan", f"{bad / 'my.py'}:{function}", *PAPER, "--html", page)
    text = page.read_text()
    assert code == 0 and "&lt;script&gt;alert(1)" in text and "<script>alert" not in text
    assert all(row["path"] in text for row in found["placement"]) and found["step_source"] in text
    assert {row["path"] for row in found["placement"]} == {
        p.removeprefix("params/") for p in found["layout"] if p.startswith("params/")
    }
    assert sum(c["seconds"] for c in found["collectives"]) == pytest.approx(
        sum(v for k, v in found["step_seconds"].items() if "fsdp" in k or "tensor" in k or "data" in k)
    )


@pytest.mark.parametrize("command", ["plan", "search", "calibrate"])
def test_places_that_cannot_be_written(command, config, shardtrain, tmp_path, monkeypatch):
    """A folder, and one that is not there: exit 2 and one message, before anything is computed.

    The fault in mind: found out after minutes.
    """
    monkeypatch.setattr("shardtrain.config.build.make_plan", lambda *a: pytest.fail("computed first"))
    monkeypatch.setattr(room, "calibrate", lambda *a, **k: pytest.fail("measured first"))
    flag = "--out" if command == "calibrate" else "--html"
    given = ["--devices", "cpu:8"] if command == "calibrate" else [config, "--target", "h100:1x8"]
    for place, says in ((tmp_path, "is a folder"), (tmp_path / "none" / "page", "no such folder")):
        code, _, err = shardtrain(command, *given, flag, place)
        assert code == 2 and says in err and flag in err and "Traceback" not in err


def test_a_page_is_whole_or_not_there(config, shardtrain, tmp_path, monkeypatch):
    """A disk that fails at the last moment leaves the old page and nothing else. Failed once with the page
    written where it stands."""
    page = tmp_path / "out" / "page.html"
    page.parent.mkdir()
    page.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, err = shardtrain("plan", config, *PAPER, "--html", page)
    assert code == 3 and "No space left" in err and "Traceback" not in err
    assert page.read_text() == "old" and [p.name for p in page.parent.iterdir()] == ["page.html"]
    assert shardtrain("plan", config, *PAPER, "--html", page)[0] == 0
    assert page.read_text().startswith("<!doctype html>") and len(list(page.parent.iterdir())) == 1


@pytest.mark.slow
def test_calibrate_and_plan(config, as_json, shardtrain, tmp_path, monkeypatch):
    """Measured here, read by plan, said to be measured; twice the rates are half the seconds, exactly.

    Failed once with a plan for CPUs that had no seconds, constants or not.
    """
    monkeypatch.setattr(room, "PAYLOADS", (2**13, 2**15, 2**17))
    monkeypatch.setattr(room, "MEMORY", 2**16)
    monkeypatch.setattr(room, "ENOUGH", 0.0)
    monkeypatch.setattr(room, "ROUNDS", 2)
    file = tmp_path / "here.json"
    code, found = as_json("calibrate", "--devices", "cpu:8", "--out", file)
    keys = "target device_kind devices date versions flops memory_bytes_per_second dispatch_seconds links collectives seconds"
    assert code == 0 and set(keys.split()) <= set(found) and found["file"] == str(file)
    kept = json.loads(file.read_text())
    assert kept["cpu"]["measured"]["collectives"] == found["collectives"]
    assert {"bytes", "seconds"} == set(found["collectives"][0]["timings"][0]) and "residual" in found[
        "collectives"
    ][0]
    on_cpus = ["plan", config, "--target", "cpu:8", "--compile", "no"]
    assert as_json(*on_cpus)[1]["step_seconds"] is None
    _, before = as_json(*on_cpus, "--constants", file)
    assert (
        f"measured on 8 x {found['device_kind']}" in before["step_source"]
        and str(file) in before["step_source"]
    )
    chip = kept["cpu"]["chip"]
    for name in chip:
        if name == "flops":
            chip[name] = {k: 2 * v for k, v in chip[name].items()}
        else:
            chip[name] *= 0.5 if name.endswith("seconds") else 2
    file.write_text(json.dumps(kept))
    _, after = as_json(*on_cpus, "--constants", file)
    assert after["step_seconds"]["total"] == pytest.approx(before["step_seconds"]["total"] / 2)
    for command in (["plan", config, *PAPER], ["search", config, "--target", "h100:1x8"]):
        code, _, err = shardtrain(*command, "--constants", file)
        assert code == 2 and "is of cpu, not of h100" in err and "Traceback" not in err
    text = file.read_text()
    for broken in (text[: len(text) // 2], "", "[]", '{"cpu": 1}'):
        pathlib.Path(file).write_text(broken)
        code, _, err = shardtrain(*on_cpus, "--constants", file)
        assert code == 2 and "constants" in err and "Traceback" not in err
