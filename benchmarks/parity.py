"""The same training on one device and on every layout of eight, compared leaf by leaf. Prints JSON.

    python benchmarks/parity.py                                  every layout that is not in the results yet
    python benchmarks/parity.py --only "moe context" --again     those cases anew
    python benchmarks/parity.py --f64                            in float64, two steps
    python benchmarks/parity.py --draw                           the table alone

The tiny configs of GPT, Llama and mixture of experts at half their width, ten steps of AdamW on shipped text, float32,
on eight simulated devices: `config.verify.verify_config`, which is `shardtrain verify CONFIG --layouts all --width 64`.
Dropout on, clipped below the gradient norm, padding of uneven length. Differences are relative norms: gradients of
step one by leaf, losses and gradient norms the largest of ten steps, parameters against their global norm. Beside them stand
the choices of experts in step one that went to another expert. Results go to
`benchmarks/results/parity.json` after every layout; a table stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the work here, and it is not what is measured.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

from shardtrain.config import load_config
from shardtrain.config.devices import start_devices
from shardtrain.config.verify import layouts_of, verify_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = {name: f"{ROOT}/configs/{name}.py:tiny" for name in ("gpt", "llama", "moe")}
STEPS, WIDTH = 10, 64
KEYS = ("cases", "cases_f64")


def save(kept: dict[str, dict[str, Any]]) -> None:
    content = {
        "formula": "relative norm of the difference to one device with the same groups",
        "steps": STEPS,
        "width": WIDTH,
        "dtype": "float32; cases_f64: float64, two steps",
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "hardware": f"{os.cpu_count()} CPU cores, eight simulated devices",
        **kept,
    }
    staged = RESULTS / "parity.new"
    staged.write_text(json.dumps(content, indent=1) + "\n")
    staged.replace(RESULTS / "parity.json")
    tables = [table(kept[name]) for name in KEYS if kept[name]]
    (RESULTS / "parity.md").write_text("\n\nIn float64:\n\n".join(tables) + "\n")


def table(cases: dict[str, Any]) -> str:
    """Markdown: the worst over all layouts, by model and kind of layout."""
    kinds: dict[str, dict[str, list[Any]]] = {}
    for name, row in cases.items():
        model = name.split(" ")[0]
        axes = [a for a in row["mesh"] if row["mesh"][a] > 1]
        kind = "one axis" if len(axes) == 1 else f"{len(axes)} axes"
        kind = "across slices" if "slice" in axes else kind
        kind = "pipelines" if "stage" in axes else kind
        kinds.setdefault(kind, {}).setdefault(model, []).append(row)
    lines = ["| layouts | " + " | ".join(CONFIGS) + " |", "|---" * (len(CONFIGS) + 1) + "|"]
    for kind, models in sorted(kinds.items()):
        cells = []
        for model in CONFIGS:
            rows = [r for r in models.get(model, []) if r["equal"] is not None]
            same = sum(bool(r["equal"]) for r in rows)
            worst = max((r["gradients"] for r in rows), default=0.0)
            flips = [r["flips"] for r in rows if r.get("flips") is not None]
            counted = f", {sum(flips)} flips" if flips else ""
            cells.append(f"{same} of {len(rows)}, {worst:.1e}{counted}" if rows else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it (words, all of them)")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--f64", action="store_true", help="in float64 in place of float32")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    start_devices("cpu:8")
    file = RESULTS / "parity.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    kept: dict[str, dict[str, Any]] = {name: found.get(name, {}) for name in KEYS}
    key, steps, precision = ("cases_f64", 2, "f64") if options.f64 else ("cases", STEPS, "f32")
    jax.config.update("jax_enable_x64", options.f64)
    for model, place in CONFIGS.items() if not options.draw else ():
        config = dataclasses.replace(load_config(place), precision=precision)
        todo = {f"{model} {c.name}": c for c in layouts_of(config, "all", 8)}
        kept[key] = cases = {n: r for n, r in kept[key].items() if n.split(" ")[0] != model or n in todo}
        names = [n for n in todo if all(w in n for w in options.only.split())]
        names = [n for n in names if options.again or n not in cases]

        def say(found: Any, model: str = model, cases: dict[str, Any] = cases) -> None:
            row = {**dataclasses.asdict(found), "date": datetime.date.today().isoformat()}
            row["first_difference"] = (found.first_difference or "").replace(f"{ROOT}/", "") or None
            cases[f"{model} {found.layout}"] = row
            save(kept)
            print(f"{model} {found.layout}: {found.equal} {found.gradients} {found.first_difference or ''}")

        if names:
            sys.stdout, out = sys.stderr, sys.stdout
            verify_config(config, [todo[n] for n in names], steps=steps, width=WIDTH, say=say)
            sys.stdout = out
    save(kept)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
