"""Compiler options: ours, under what the user says."""

import logging

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
