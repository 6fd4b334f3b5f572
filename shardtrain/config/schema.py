"""What a run is, as frozen dataclasses. Every leaf is a flag: `--optimizer.learning-rate 1e-3`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from shardtrain.errors import ConfigError
from shardtrain.models import GPTConfig, LlamaConfig, MoEConfig
from shardtrain.train.guard import Guard


@dataclasses.dataclass(frozen=True)
class Custom:
    """A model and a loss of your own, by file and name; see `custom`.

    `model`: `file.py:name` of a factory `(rngs, **options) -> nnx.Module`. `loss`: `file.py:name` of
    `(model, batch, rngs) -> Loss`. `data`: `file.py:name` of `(config) -> iterable of batches`, or
    empty for the text of the config.
    """

    model: str
    loss: str
    data: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def custom(
    model: Callable[..., Any] | str,
    loss: Callable[..., Any] | str,
    data: Callable[..., Any] | str = "",
    **options: Any,
) -> Custom:
    """A `Custom` from functions at the top level of a file."""
    return Custom(_reference(model), _reference(loss), _reference(data) if data else "", options)


def _reference(function: Callable[..., Any] | str) -> str:
    if isinstance(function, str):
        return function
    name, file = getattr(function, "__qualname__", ""), inspect.getsourcefile(function)
    if file is None or not name.isidentifier():
        raise ConfigError(
            f"{name or function} is not a function at the top level of a file",
            where="custom",
            why="a saved run must be able to find it again",
            fix="def it at the top level of your config file",
        )
    return f"{file}:{name}"


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis, outer to inner; one may be -1."""

    slice: int = 1
    slice_fsdp: int = 1
    stage: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Dcn:
    """So many times across the slow network, see `make_mesh`."""

    data: int = 1
    fsdp: int = 1
    stage: int = 1

    @property
    def named(self) -> dict[str, int]:
        return {a: n for a, n in dataclasses.asdict(self).items() if n != 1}


@dataclasses.dataclass(frozen=True)
class Text:
    """Text, tokenised once into a memory-mapped file.

    `source`: `king_james` (ships with the library), a file or pattern (.txt, .txt.gz, .jsonl, .npy, .bin), or a
    folder that `shardtrain data prepare` wrote.
    `tokenizer`: `bpe:N` trains a byte-pair tokenizer of N entries on the text; or a tokenizer.json.
    `sequence`: tokens per row. `field`: of .jsonl. `dtype`: of .bin. `cache`: folder of tokenised files.
    `quarantine`: rows that cannot be read and may be left out, by each process; the next good one stands in.
    """

    source: str = "king_james"
    tokenizer: str = "bpe:512"
    sequence: int = 128
    eval_fraction: float = 0.05
    field: str = "text"
    dtype: Literal["uint16", "uint32"] = "uint16"
    quarantine: int = 0
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax optimizer behind a warm-up and a decay, with the global gradient norm clipped.

    `warmup` in steps; `final`: last learning rate as a fraction of the peak. `clip`: 0 for none. `state_dtype`: of the
    average of gradients (first moment, momentum). That of their squares stays float32: what a step adds to it, 1 - b2 of
    it, is less than 16 bits resolve.
    """

    name: Literal["adamw", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 0
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    momentum: float = 0.0
    clip: float = 1.0
    state_dtype: Literal["f32", "bf16"] = "f32"


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What is written besides `metrics.jsonl`. `wandb`: a project name, needs the extra `wandb`."""

    tensorboard: bool = True
    wandb: str = ""
    progress: bool = True


NO_GUARD = Guard(on_bad="off")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. `global_batch` in rows; `eval_every`, `checkpoint_every` in steps, 0 for never.

    `attention`: under a `context` axis, how queries meet the keys of other devices.
    `groups`: at least so many; a new run takes the next multiple of its batch shards x microbatches and keeps
    it, on whatever mesh it goes on. As many as there are devices lets every mesh of them go on. `devices`: `auto`, `gpu`,
    `tpu`, or `cpu:N` for N simulated devices. `eval_rows`: held-out rows per evaluation, 0 for all.
    `precision`: of the loss; f64, of everything, is there to compare (`shardtrain verify`).
    `quant`: operands of the products of attention and MLPs, forward and backward, in 8 bits: int8 or fp8. Needs the extra
    `quant`, which brings qwix.
    `param_dtype`: of parameters at rest; model: as it has them. In bf16 there is no copy in more bits, and a step that moves a
    weight by less than a 256th of it may not move it.
    `schedule`: of a pipeline, where the mesh has stages: gpipe, 1f1b, interleaved:V or zb.
    `guard`: what becomes of steps whose loss or gradient is not finite, or a spike; off: the run stops after one that is
    not finite. `durable`: URL of a folder in an object store (`gs://BUCKET/FOLDER`, `s3://BUCKET/FOLDER`) that checkpoints are
    copied to, and taken from where `output` has none. `replica_check_every`: steps between comparisons of what several
    devices hold the same of, 0 for never.
    """

    model: GPTConfig | LlamaConfig | MoEConfig | Custom
    data: Text = Text()
    optimizer: Optimizer = Optimizer()
    mesh: MeshSizes = MeshSizes()
    dcn: Dcn = Dcn()
    rules: str = "fsdp_tensor"
    microbatches: int = 1
    schedule: str = "1f1b"
    groups: int | None = None
    precision: Literal["f32", "bf16", "f64"] = "f32"
    quant: Literal["none", "int8", "fp8"] = "none"
    param_dtype: Literal["model", "f32", "bf16"] = "model"
    attention: Literal["ring", "gather", "ulysses"] = "ring"
    global_batch: int = 64
    steps: int = 100
    seed: int = 0
    devices: str = "auto"
    output: str = "runs/default"
    eval_every: int = 50
    eval_rows: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    durable: str = ""
    monitor: Monitor = Monitor()
    guard: Guard = NO_GUARD
    replica_check_every: int = 0
    sample: str = ""
    sample_tokens: int = 128


KINDS: Mapping[str, type] = {"gpt": GPTConfig, "llama": LlamaConfig, "moe": MoEConfig, "custom": Custom}

LAYOUT_FIELDS = (
    "attention",
    "mesh",
    "dcn",
    "rules",
    "microbatches",
    "schedule",
    "groups",
    "devices",
    "output",
    "monitor",
    "keep",
    "durable",
)
"""Fields that say where and how a run goes, not what it trains: they may change on resume.

So may `steps`, `eval_every`, `eval_rows`, `checkpoint_every`, `sample`, `sample_tokens` (see `load.difference`);
`steps` only where the learning rate does not depend on it.
"""
