"""Llama 8B on hardware that is not here: what its own layout takes, and the best layouts, with the targets' compilers.

    python benchmarks/before_renting.py [--only h100:8x8]

Prints, and keeps in `benchmarks/results/before_renting.json`, the object of `shardtrain plan` and of `shardtrain search` (its first
layouts) for 64 H100 and 64 chips of v5p. notebooks/03 draws them where the compilers are not installed. Formula: as in
`shardtrain/plan/cost.py`; memory and bytes are counted in compiled programs where a source says so. Needs the extras aot-tpu and
aot-gpu; ten minutes a target on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

FILE = pathlib.Path(__file__).parent / "results" / "before_renting.json"
CONFIG, TARGETS, SHOWN = "configs/llama.py:b8", ("h100:8x8", "v5p:4x4x4"), 150


def measured(name: str) -> dict[str, Any]:
    from shardtrain.config import resolve
    from shardtrain.config.planning import forecast_config
    from shardtrain.config.search import search_config
    from shardtrain.mesh import Target
    from shardtrain.plan.cost import Constants

    target = Target(name)
    constants = Constants.of(target)
    config, _ = resolve(CONFIG, [], target.size)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    _, planned = forecast_config(config, target, constants, compile="fast", timeout=1500)
    say(planned)
    found = search_config(config, target, constants, timeout=1500, say=say)
    return {"plan": planned.as_json(), "search": found.as_json(SHOWN)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TARGETS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    known = json.loads(FILE.read_text())["measured"] if FILE.is_file() else {}
    for name in [options.only] if options.only else TARGETS:
        known[name] = measured(name)
        names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
        result = {
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
            "versions": {n: importlib.metadata.version(n) for n in names},
            "formula": "shardtrain/plan/cost.py; memory and bytes as the source of each says",
            "config": CONFIG,
            "measured": {n: known[n] for n in TARGETS if n in known},
        }
        FILE.write_text(json.dumps(result, separators=(",", ":")) + "\n")
        print(json.dumps({name: known[name]}), flush=True)


if __name__ == "__main__":
    main()
