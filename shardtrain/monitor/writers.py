"""Where metrics go. A resumed run continues each of them at its step."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from shardtrain.errors import ConfigError


class Writer(Protocol):
    """Takes one step's metrics. `kind`: `train` or `eval`."""

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None: ...

    def resume(self, step: int) -> None:
        """Forget what was written after `step`: that future is written again."""

    def close(self) -> None: ...


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole objects of a metrics file; a line that a crash cut off is left out."""
    file = pathlib.Path(path)
    rows = []
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not even UTF-8
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class JsonlWriter:
    """One JSON object a line: `step`, then the metrics; evaluations have `eval_` before each name.

    NaN and infinities become null: other readers of JSON know no such numbers. Every line is flushed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._file: Any = None

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        if self._file is None:
            self._file = self.path.open("ab+")
            if self._file.tell() and not self._ends_a_line():
                self._file.write(b"\n")  # a crash cut the last line off; ours must not continue it
        prefix = "" if kind == "train" else f"{kind}_"
        row = {"step": step, **{prefix + name: _number(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _ends_a_line(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return bool(self._file.read(1) == b"\n")

    def resume(self, step: int) -> None:
        self.close()  # the file is about to be another one
        if not self.path.exists():
            return
        rows = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
        work = self.path.with_name(f".{self.path.name}.tmp")
        with work.open("wb") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        work.replace(self.path)  # whole, or not at all

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _number(value: float) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


class TensorBoardWriter:
    """Scalars for TensorBoard, under `train/` and `eval/`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self._purge: int | None = None
        self._writer: Any = None

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # the suffix: two starts within a second would write the same file, and readers go by name
            self._writer = SummaryWriter(
                self.path,
                purge_step=self._purge,
                flush_secs=10,
                filename_suffix=f".{self._purge or 0:012}",
            )
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def resume(self, step: int) -> None:
        self.close()
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbWriter:
    """Weights & Biases; `run_id` is kept with the run, so that a resume continues the same one.

    Raises:
        ConfigError: the extra `wandb` is not installed, or W&B does not take the run.
    """

    def __init__(
        self, project: str, run_id: str, *, directory: str | os.PathLike[str], config: Mapping[str, Any]
    ):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "wandb is not installed", where="monitor.wandb", fix="pip install 'shardtrain[wandb]'"
            ) from error
        try:
            self._run = wandb.init(
                project=project, id=run_id, resume="allow", dir=str(directory), config=dict(config)
            )
        except Exception as error:  # no login, no network, no such project
            raise ConfigError(
                f"W&B did not start: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where="monitor.wandb",
                fix="wandb login, or WANDB_MODE=offline to write the run here",
            ) from error

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        self._run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def resume(self, step: int) -> None:
        """W&B cannot forget: it keeps the steps logged after `step`, and drops new ones with those numbers."""

    def close(self) -> None:
        self._run.finish()
