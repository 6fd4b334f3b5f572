"""Where every array of a config lives, what each device holds and sends. Nothing is trained or allocated.

shardtrain plan configs/gpt.py:tiny --mesh.tensor 8
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config import resolve
    from shardtrain.config.devices import start_devices

    config, notes = resolve(options.config, options.overrides)
    line = start_devices(config.devices)
    for note in [*notes, *([line] if line else [])]:
        shell.say(note)

    from shardtrain.config.build import build, make_plan
    from shardtrain.mesh import chip_of

    pieces = build(config)
    made = make_plan(config, pieces)
    step = made.compile()
    memory, collectives = step.memory(), step.collectives()
    device = made.mesh.devices.flat[0]
    chip = chip_of(device)
    name = chip.name if chip else device.platform
    source = f"counted in the program compiled by XLA for {device.platform}"
    if not options.json:
        print(made)
        print(f"\n{memory}\n\n{collectives}\n\nmemory and collectives: {source}")
        if made.pipeline is not None:
            print(
                f"\n{made.pipeline.timeline()}\n\non paper: a backward is a forward again and as much for each of its halves"
            )
    flops = pieces.flops_per_row * made.global_batch if pieces.flops_per_row else None
    return shell.DONE, {
        "target": f"{name}:{made.mesh.size}",
        "mesh": dict(made.mesh.shape),
        "rules": made.rules.name,
        "groups": made.groups,
        "pipeline": _pipeline(made),
        "parameters": made.parameter_count,
        "fits": memory["peak"] <= chip.hbm_bytes if chip else None,
        "memory": {
            "arguments": memory["arguments"],
            "temporaries": memory["temporaries"],
            "peak": memory["peak"],
            "usable": chip.hbm_bytes if chip else None,
            "by_module": _by_module(made),
        },
        "flops": flops,
        "collectives": collectives.as_json(),
        "layout": made.describe()["tree"],
        "step_seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "source": source,
    }


def _pipeline(made: Any) -> dict[str, Any] | None:
    """Schedule and bubble as the program runs it, on paper; None without stages."""
    if made.pipeline is None:
        return None
    timeline, deal = made.pipeline.timeline(), made.pipeline.deal
    return {
        "schedule": made.pipeline.schedule.name,
        "stages": deal.stages,
        "microbatches": made.microbatches,
        "bubble": timeline.bubble,
        "inputs_kept": max(timeline.in_flight),
        "layers_per_piece": deal.longest,
    }


def _by_module(made: Any) -> dict[str, int]:
    """Bytes of the state per device by the first part of each path: parameters and optimizer of a module."""
    from shardtrain.tree import flatten

    totals: dict[str, int] = {}
    for path, leaf in flatten(made.abstract_state).items():
        owner = max((p for p in made.leaves if f"/{path}".endswith(f"/{p}")), key=len, default="other")
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        module = owner.split("/")[0]
        totals[module] = totals.get(module, 0) + size
    return totals
