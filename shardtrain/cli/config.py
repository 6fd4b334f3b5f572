"""The resolved config: flag over environment over config over default. What differs from the defaults is marked."""

from __future__ import annotations

import argparse
import json
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config import Custom, RunConfig, flat, resolve, to_json

    config, notes = resolve(options.config, options.overrides)
    for note in notes:
        shell.say(note)
    if not options.json:
        model = config.model if isinstance(config.model, Custom) else type(config.model)()
        plain = flat(RunConfig(model=model))
        for name, value in flat(config).items():
            mark = (
                ""
                if plain.get(name, value) == value
                else f"   # default {json.dumps(plain.get(name), default=str)}"
            )
            print(f"{name} = {json.dumps(value, default=str)}{mark}")
    return shell.DONE, to_json(config)
