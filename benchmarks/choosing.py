"""What a search chooses, against compiling every candidate. Prints JSON.

    python benchmarks/choosing.py [--only TEXT] [--again] [--candidates 44]
    python benchmarks/choosing.py --sketch [--only TEXT]

For each case (config, target) so many of the layouts that a search looks at, spread evenly over all of them, are sketched,
partitioned and compiled at the search's own level, each in a process of its own; the compiled cost is the cost model over
the compiled program's bytes. Then the search runs over the same layouts as a user would run it (24 partitioned, 5
compiled). Kept in `benchmarks/results/choosing.json`:

- `choice_over_best`: compiled cost of the search's choice / the least compiled cost among those that fit.
- `rank_partitioned`, `rank_sketched`: Spearman's rank correlation of that tier's cost with the compiled one.

`--sketch` compiles nothing: it sketches the layouts of the cases that are kept again, with the code as it is, and ranks those
costs against the compiled ones that are kept.

Programs are cached on disk, so a run that was cut off goes on. Needs the extras aot-gpu and aot-tpu; 15 (GPU) to 40 (TPU)
seconds of CPU a candidate.
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

import numpy as np

FILE = pathlib.Path(__file__).parent / "results" / "choosing.json"
LARGER = [
    "--model.embed=1024",
    "--model.layers=8",
    "--model.expert_mlp=1024",
    "--model.sequence=1024",
    "--data.sequence=1024",
    "--global_batch=64",
    "--precision=bf16",
]
CASES: dict[str, tuple[str, list[str], str]] = {
    f"{name} {target}": (config, overrides, target)
    for target in ("h100:1x8", "v5e:2x4")
    for name, config, overrides in (
        ("gpt", "configs/gpt.py:small", ["--global_batch=64"]),
        ("llama", "configs/llama.py:b1", ["--global_batch=32"]),
        ("moe", "configs/moe.py:tiny", LARGER),
    )
}


def ranks(values: list[float]) -> np.ndarray:
    """Ties share the mean of their places."""
    _, places, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def correlation(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def measured(config_name: str, overrides: list[str], target_name: str, count: int) -> dict[str, Any]:
    from shardtrain.config import resolve
    from shardtrain.config.search import layouts_for, search_config
    from shardtrain.mesh import Target
    from shardtrain.plan.cost import Constants

    target = Target(target_name)
    config, _ = resolve(config_name, overrides, target.size)
    every = layouts_for(config, target)
    places = np.unique(np.linspace(0, len(every) - 1, count).round().astype(int))
    layouts = [every[i] for i in places]
    constants = Constants.of(target)

    def found(partitions: int, compiles: int) -> Any:
        return search_config(
            config,
            target,
            constants,
            layouts=layouts,
            partitions=partitions,
            compiles=compiles,
            workers=1,
            say=lambda line: print(f"{config_name} {target_name}: {line}", file=sys.stderr, flush=True),
        )

    truth, paper, asked = found(count, count), found(count, 0), found(24, 5)
    known = {
        e.name: e
        for e in truth.entries
        if e.tier in ("compiled", "certified") and e.fits is not False and e.seconds
    }
    papers = {e.name: e for e in paper.entries if e.seconds and e.name in known}
    names = sorted(papers)
    best = min(known.values(), key=lambda e: e.seconds or 0.0)
    choice = known.get(asked.best.name) if asked.best else None
    compiled = [known[n].seconds for n in names]
    return {
        "config": config_name,
        "overrides": overrides,
        "target": target_name,
        "layouts_of_the_search": len(every),
        "looked_at": len(layouts),
        "compiled": len(known),
        "best": best.name,
        "choice": asked.best.name if asked.best else None,
        "choice_over_best": choice.seconds / best.seconds if choice else None,
        "rank_partitioned": correlation([papers[n].seconds for n in names], compiled),
        "rank_sketched": correlation([known[n].sketch.cost.total for n in names], compiled),
        "candidates": [
            {
                "layout": e.name,
                "tier": e.tier,
                "sketched": e.sketch.cost.total if e.sketch and e.sketch.cost else None,
                "partitioned": papers[e.name].seconds if e.name in papers else None,
                "compiled": known[e.name].seconds if e.name in known else None,
                "peak": e.peak,
                "fits": e.fits,
                "why": e.why,
            }
            for e in truth.entries
        ],
    }


def sketched(case: dict[str, Any]) -> dict[str, Any]:
    """The case with sketches of the code as it is."""
    from shardtrain.config import resolve
    from shardtrain.config.planning import Layout
    from shardtrain.config.search import layouts_for, search_config
    from shardtrain.mesh import Target
    from shardtrain.plan.cost import Constants

    target = Target(case["target"])
    config, _ = resolve(case["config"], case["overrides"], target.size)
    names = {c["layout"] for c in case["candidates"]}
    layouts = [pair for pair in layouts_for(config, target) if Layout(*pair).name in names]
    found = search_config(
        config, target, Constants.of(target), layouts=layouts, partitions=0, compiles=0, workers=1
    )
    costs = {e.name: e.sketch.cost.total for e in found.entries if e.sketch and e.sketch.cost}
    candidates = [{**c, "sketched": costs.get(c["layout"])} for c in case["candidates"]]
    both = [(c["sketched"], c["compiled"]) for c in candidates if c["sketched"] and c["compiled"]]
    assert len(both) == case["compiled"]
    return {
        **case,
        "rank_sketched": correlation(*map(list, zip(*both, strict=True))),
        "candidates": candidates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--sketch", action="store_true")
    parser.add_argument("--candidates", type=int, default=44)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    kept = lambda: json.loads(FILE.read_text())["cases"] if FILE.is_file() else {}
    for name, case in CASES.items():
        if options.only in name and (options.again or (name in kept()) == options.sketch):
            found = sketched(kept()[name]) if options.sketch else measured(*case, options.candidates)
            cases = {**kept(), name: found}  # another process may have written one meanwhile
            versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
            result = {
                "benchmark": "choosing",
                "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
                "versions": versions,
                "formula": "cost: plan/cost.py over the bytes of each tier; Spearman's rank correlation",
                "cases": {n: cases[n] for n in CASES if n in cases},
            }
            FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(kept()))


if __name__ == "__main__":
    main()
