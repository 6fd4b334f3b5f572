"""Metrics reach their files whole, once, and in an order that survives crashes and resumes."""

import json
import math
import sys
import types
from typing import Any

import numpy as np
import pytest

from shardtrain.errors import ConfigError
from shardtrain.monitor import JsonlWriter, TensorBoardWriter, WandbWriter, read_jsonl


def strict(text: str) -> list[dict[str, Any]]:
    """Every line as JSON of the standard: NaN and Infinity refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_jsonl_keeps_every_value(tmp_path):
    """Exact floats, evaluations under their own names. Failed once with `round(value, 6)`."""
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1 / 3, "tokens": 128, "mine": np.float32(0.5)})
    writer.write(1, {"loss": 2 / 3}, "eval")
    assert strict((tmp_path / "metrics.jsonl").read_text()) == [  # before close: each line is flushed
        {"step": 1, "loss": 1 / 3, "tokens": 128, "mine": 0.5},
        {"step": 1, "eval_loss": 2 / 3},
    ]
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_jsonl_writes_null_for_what_is_no_number(tmp_path, value):
    """Failed once when `json.dumps` wrote NaN."""
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(3, {"loss": value, "grad_norm": 1.0})
    writer.close()
    assert strict((tmp_path / "m.jsonl").read_text()) == [{"step": 3, "loss": None, "grad_norm": 1.0}]


def test_jsonl_forgets_the_future_on_resume(tmp_path):
    """Also when the writer has the file open. Failed once with `<` for `<=`, and once with the old file
    still open: what was written after the resume went to a file that no longer had a name."""
    file = tmp_path / "m.jsonl"
    writer = JsonlWriter(file)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.write(3, {"loss": 0.3}, "eval")
    writer.resume(3)
    writer.write(4, {"loss": 44.0})
    writer.close()
    assert [(r["step"], r.get("loss")) for r in strict(file.read_text())] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (3, None),
        (4, 44.0),
    ]
    assert [f.name for f in tmp_path.iterdir()] == ["m.jsonl"]


def test_jsonl_resume_is_atomic(tmp_path, monkeypatch):
    """A crash in the middle leaves the old file. Failed once when the file was truncated in place."""
    file = tmp_path / "m.jsonl"
    writer = JsonlWriter(file)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    before = file.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="power"):
        writer.resume(1)
    assert file.read_bytes() == before


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b'{"step": 3, "mine": "\xc3', b"\0\0\0\0", b"12"])
def test_jsonl_repairs_a_line_that_a_crash_cut_off(tmp_path, rest):
    """With a resume the piece is gone; without one the next line does not continue it.

    Failed once when the piece and the next line became one unreadable line."""
    whole = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'
    for resumes in (True, False):
        file = tmp_path / f"{resumes}.jsonl"
        file.write_bytes(whole + rest)
        assert [row["step"] for row in read_jsonl(file)] == [1, 2]
        writer = JsonlWriter(file)
        if resumes:
            writer.resume(2)
            assert file.read_bytes() == whole
        writer.write(3, {"loss": 3.0})
        writer.close()
        assert [row["step"] for row in read_jsonl(file)] == [1, 2, 3]


def test_jsonl_keeps_a_last_line_without_its_end(tmp_path):
    """A whole object whose newline is missing is whole. Failed once when it was dropped."""
    file = tmp_path / "m.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 1.0}')
    writer = JsonlWriter(file)
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in strict(file.read_text())] == [1, 2]


def scalars(path: Any, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_reads_what_was_written(tmp_path):
    """With TensorBoard's own reader, over a resume that rewrites steps. Failed once without `purge_step`,
    when step 3 was there twice."""
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 4, "tokens": 128})
    writer.close()
    writer = TensorBoardWriter(tmp_path)
    writer.resume(2)
    writer.write(3, {"loss": 9.0, "tokens": 128})
    writer.write(3, {"loss": 0.5}, "eval")
    writer.write(4, {"loss": math.nan})
    writer.close()
    train = scalars(tmp_path, "train/loss")
    assert train[:3] == [(1, 0.25), (2, 0.5), (3, 9.0)]
    assert train[3][0] == 4 and math.isnan(train[3][1])
    assert scalars(tmp_path, "eval/loss") == [(3, 0.5)]
    assert scalars(tmp_path, "train/tokens")[0] == (1, 128.0)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.finished = False

    def log(self, metrics: Any, *, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    """Against a stand-in that takes only the arguments that `wandb.init` has. Failed once with
    `resume="never"`."""
    run, asked = FakeRun(), []

    def init(*, project: str, id: str, resume: str, dir: str, config: dict[str, Any]) -> FakeRun:
        asked.append((project, id, resume, dir, config))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):  # a start, and a resume
        writer = WandbWriter("words", "abc123", directory=tmp_path, config={"seed": 1})
        writer.resume(step - 1)
        writer.write(step, {"loss": 1.0})
        writer.write(step, {"loss": 2.0}, "eval")
        writer.close()
    assert asked == [("words", "abc123", "allow", str(tmp_path), {"seed": 1})] * 2
    assert run.logged[:2] == [(1, {"train/loss": 1.0}), (1, {"eval/loss": 2.0})] and run.finished


@pytest.mark.parametrize(
    ("message", "said"), [("No API key configured.\nUse", "No API key"), ("", "OSError")]
)
def test_wandb_that_does_not_start_says_how(tmp_path, monkeypatch, message, said):
    """No login, no network. Failed once: W&B's own exception, and exit code 3."""

    def init(**_: Any) -> FakeRun:
        raise OSError(message)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ConfigError) as caught:
        WandbWriter("words", "abc", directory=tmp_path, config={})
    assert said in caught.value.message and "WANDB_MODE=offline" in caught.value.fix


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    """Failed once when the ImportError came through."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        WandbWriter("words", "abc", directory=tmp_path, config={})
    assert "pip install 'shardtrain[wandb]'" in caught.value.fix
