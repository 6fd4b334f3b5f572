"""Text from a trained run, on one device, whatever mesh trained it.

shardtrain generate runs/gpt-tiny --prompt "In the beginning "
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="RUN", help="a run's folder")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=100, help="how many to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="default: the newest checkpoint")
    parser.add_argument("--devices", default="auto", help="auto, gpu, tpu or cpu; one of them is used")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    import pathlib

    from shardtrain.config import MeshSizes, load_config
    from shardtrain.config.devices import start_devices
    from shardtrain.errors import CheckpointError, ConfigError

    path = pathlib.Path(options.path)
    if not (path / "config.json").is_file():
        raise ConfigError(
            "no run here: it has no config.json", where=str(path), fix="the --output of a training run"
        )
    config = dataclasses.replace(load_config(str(path)), mesh=MeshSizes())
    start_devices(options.devices)

    import jax

    from shardtrain import checkpoint
    from shardtrain.config.build import build, make_plan
    from shardtrain.mesh import make_mesh
    from shardtrain.models import LanguageModel, generate

    pieces = build(config, make_mesh(devices=jax.devices()[:1], data=1))
    if pieces.text is None:
        raise ConfigError("was not trained on text", where=str(path), fix="a run of a language model")
    tokenizer = pieces.text.tokenizer()
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    if not prompt:
        raise ConfigError("the prompt is empty", where="--prompt", fix="at least one character")
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            "no checkpoint here", where=str(folder), fix="train further, until one is written"
        )
    made = make_plan(dataclasses.replace(config, rules="fsdp_tensor"), pieces, config.groups)
    parts = ["params", "step", *(["model_state"] if made.abstract_state.model_state else [])]
    state = checkpoint.restore(folder, made, options.step, parts=parts)
    model = made.model(state)
    if not isinstance(model, LanguageModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot generate",
            where=str(path),
            fix="a run of configs/gpt.py or llama.py",
        )
    ids = generate(
        model,
        prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
    )
    text = tokenizer.decode(ids.tolist())
    if not options.json:
        print(text)
    return shell.DONE, {"run": str(path), "step": int(state), "prompt": options.prompt, "text": text}
