"""Compiler options: ours, under what the user says."""

import json
import logging
import pathlib
import re

import pytest

from shardtrain.plan.options import OPTIONS, compile_with, options_for

NAME = "xla_enable_async_all_reduce"


def test_what_the_user_says_wins(monkeypatch):
    """Environment over ours, arguments over both, None leaves one out. The fault in mind: ours written over theirs."""
    assert options_for("tpu", chip="v5e") == {**OPTIONS["tpu"], **OPTIONS["v5e"]} and NAME in OPTIONS["v5e"]
    assert NAME not in options_for("tpu", {NAME: None}, chip="v5e")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{NAME}=false")
    assert NAME not in options_for("tpu", chip="v5e")
    assert options_for("tpu", {NAME: "true"}, chip="v5e")[NAME] == "true"


def test_what_one_chip_takes_others_do_not_get():
    """Other TPUs refuse early all-reduces: no program at all. Failed once with them in the options of every TPU."""
    assert NAME not in options_for("tpu", chip="v6e") and options_for("tpu") == OPTIONS["tpu"]
    assert options_for("cpu", chip="") == {} and not {*OPTIONS["tpu"]} & {*OPTIONS["v5e"]}


def compiler(unknown):
    def compiled(options):
        for name in options:
            if name == unknown:
                raise RuntimeError(f"INVALID_ARGUMENT: No such compile option: '{name}'")
        return options

    return compiled


def test_an_option_of_ours_that_a_compiler_lacks_is_left_out_aloud(caplog):
    with caplog.at_level(logging.WARNING, "shardtrain"):
        assert NAME not in compile_with(compiler(NAME), options_for("tpu", chip="v5e"), "tpu", "v5e")
    assert NAME in caplog.text


def test_an_option_of_the_user_that_a_compiler_lacks_is_an_error():
    """Failed once when every unknown option was left out."""
    with pytest.raises(RuntimeError, match="No such compile option: 'xla_speed'"):
        compile_with(compiler("xla_speed"), options_for("tpu", {"xla_speed": "true"}), "tpu")
    with pytest.raises(RuntimeError, match=NAME):
        compile_with(compiler(NAME), options_for("tpu", {NAME: "false"}), "tpu", "v5e")


def test_truth_values_are_not_text():
    """The GPU compiler refuses 'true'. Failed once so."""
    assert compile_with(lambda o: o, {"xla_a": "true", "xla_b": "2"}, "cuda") == {"xla_a": True, "xla_b": "2"}


def test_the_table_is_what_was_measured():
    """README against `benchmarks/results/overlap.json`, and that of what was compiled with these options. The fault in mind: a
    table by hand."""
    root = pathlib.Path(__file__).parents[3]
    kept = json.loads((root / "benchmarks" / "results" / "overlap.json").read_text())
    assert kept["options"] == {chip: OPTIONS[chip] for chip in kept["options"]}
    found = {(r["target"], r["layout"], r["options"].partition(" ")[0]): r for r in kept["rows"]}
    number = r"([\d.]+)"
    pattern = rf"\| (\S+) \| (\w+) \| [^|]+ \| {number}, {number} \| {number}, {number} \|"
    rows = re.findall(pattern, (root / "README.md").read_text())
    assert (
        len(rows) == len({(target, layout) for target, layout, _ in found}) - 1
    )  # but for the windowed einsum
    for target, layout, *numbers in rows:
        pairs = [found[target, layout, which] for which in ("all", "ours")]
        assert numbers == [f"{r[k]:.{d}f}" for r in pairs for k, d in (("ratio", 3), ("async_share", 2))]
