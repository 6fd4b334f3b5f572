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
    """The whole objects of a metrics file; a last line that a crash cut off is left out."""
    file = pathlib.Path(path)
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class JsonlWriter:
    """One JSON object a line: `step`, then the metrics; evaluations have `eval_` before each name."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self._file: Any = None

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        prefix = "" if kind == "train" else f"{kind}_"
        row = {"step": step, **{prefix + k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def resume(self, step: int) -> None:
        rows = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
        work = self.path.with_suffix(".tmp")
        work.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        work.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardWriter:
    """Scalars for TensorBoard, under `train/` and `eval/`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self._purge: int | None = None
        self._writer: Any = None

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(self.path, purge_step=self._purge)
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def resume(self, step: int) -> None:
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbWriter:
    """Weights & Biases; `run_id` is kept with the run, so that a resume continues the same one.

    Raises:
        ConfigError: the extra `wandb` is not installed.
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
        self._run = wandb.init(
            project=project, id=run_id, resume="allow", dir=str(directory), config=dict(config)
        )

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        self._run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def resume(self, step: int) -> None:
        """W&B keeps the later steps of the old run; new ones with the same number are dropped by its server."""

    def close(self) -> None:
        self._run.finish()
