"""The same training on one device and on other layouts, compared leaf by leaf. Exit code 1 where one differs.

  shardtrain verify configs/gpt.py:tiny                              every layout of its devices, 10 steps
  shardtrain verify configs/gpt.py:tiny --layouts data8,fsdp4-tensor2+tensor_sequence,stage2-data4+gpipe --steps 50
  shardtrain verify configs/moe.py:tiny --precision f64              the judge: every leaf within 1e-12
  shardtrain verify configs/llama.py:b1 --width 256 --model.layers 4 --devices cpu:8

A layout is mesh axes with their sizes, and after + what goes with them: rules, a kind of attention, a schedule, or xN for N
microbatches.
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell
from shardtrain.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.add_argument("--layouts", default="all", help="all, or names with commas between")
    parser.add_argument("--steps", type=int, default=10, help="of the comparison")
    parser.add_argument("--width", type=int, default=0, help="embed of the model in place of the config's")
    parser.add_argument(
        "--tolerance", type=float, help="of gradients, relative: 1e-5, 0.05 in bf16, 1e-12 in f64"
    )
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    for name in ("steps", "tolerance"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{value}", where=f"--{name}", fix="more than 0")
    from shardtrain.config import load_config
    from shardtrain.config.devices import start_devices
    from shardtrain.config.overrides import apply_overrides

    # The mesh of the config plays no part: each layout brings its own.
    config, _ = apply_overrides(load_config(options.config), options.overrides)
    line = start_devices(config.devices)
    if line:
        shell.say(line)
    import jax

    if config.precision == "f64":
        jax.config.update("jax_enable_x64", True)

    from shardtrain.config.verify import layouts_of, verify_config
    from shardtrain.plan.verify import Compared

    layouts = layouts_of(config, options.layouts, jax.device_count())

    def say(c: Compared) -> None:
        verdict = {True: f"equal, gradients {c.gradients or 0:.1e}", False: "DIFFERS", None: "cannot be"}[
            c.equal
        ]
        flips = "" if not c.flips else f", {c.flips} choices of experts differ"
        shell.say(
            f"{c.layout}: {verdict}{flips if c.equal else ''}{'' if c.equal else ': ' + str(c.first_difference)} ({c.seconds:.0f} s)"
        )

    found = verify_config(
        config, layouts, steps=options.steps, width=options.width, tolerance=options.tolerance, say=say
    )
    if not options.json:
        print(found)
    return shell.DONE if found.equal else shell.FOUND, found.as_json()
