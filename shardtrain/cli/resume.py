"""Go on with a run from its own config, on whatever devices are left. Says first what stays exact, if asked.

  shardtrain resume runs/gpt-tiny
  shardtrain resume runs/gpt-tiny --dry-run --devices 4

Same rows, groups and keys on any mesh; a smaller one takes more microbatches. Flags of the config may follow, where
they do not change what is trained (`--mesh.tensor 4`, `--steps` with a constant learning rate).
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be identical, and what only close"
    )
    parser.add_argument(
        "--devices", default="", help="how many, or auto, gpu, tpu, cpu:N; default: as before"
    )
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config.going_on import dry_run, resumed

    config, notes = resumed(options.folder, options.overrides, options.devices)
    if not options.dry_run:
        from shardtrain.cli.train import train

        return train(config, notes, fresh=False, quiet=options.json)
    found = dry_run(options.folder, config)
    for note in notes:
        shell.say(note)
    if not options.json:
        for step, why in found["damaged"].items():
            print(f"step {step} is damaged and would be passed over: {why}")
        print(f"step {found['step']} goes on at row {found['cursor']:,}")
        for name in ("identical", "close"):
            print(f"{name}:" if found[name] else f"{name}: -")
            for line in found[name]:
                print(f"  {line['what']}: {line['why']}")
        if found["bit_for_bit"]:
            print(f"bit for bit what it would have been, on hardware of the same kind ({found['hardware']})")
    return shell.DONE, found
