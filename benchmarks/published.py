"""Steps that others published, against what we predict of them. Prints JSON.

    python benchmarks/published.py [--only TEXT] [--again] [--compile]

Each report's model, batch, sequence, layout and hardware are planned here: partitioned by Shardy, priced by `plan/cost.py`, and
with --compile compiled by the target's compiler, which says whether it fits. One constant is fitted for each kind of chip,
the share of the peak that products reach (`compute`), on the reports marked `fit`; the others are checked with it
frozen. Then a search without compilations over the same chips and batch says how near the published layout is to
our best. Kept in `benchmarks/results/published.json`; a miss stays there.

- `speed_error`: predicted tokens/s of one device / published - 1. MFU is the same times a constant of the report.
- `over_best`: predicted step of the published layout / that of the search's best.

What they recompute has no exact name here on GPUs: selective recomputation of single operations is taken as `dots`, of
whole layers every second as `full`. What MaxText saves and what it keeps on the host has one: `qkv`, `attention_out`,
`layer_input`. HBM may differ (96 GB at 2.4 TB/s on torchtitan's H100 of 500 W).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

FILE = pathlib.Path(__file__).parent / "results" / "published.json"
TITAN_H100 = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "torchtitan docs/performance.md (2024)"
TIERS = "MaxText docs/reference/models/tiering.md; benchmarks/maxtext_{}_model_configs.py"
RECIPE = "tpu-recipes training/trillium/Llama{}"
KQVO_AWAY = "layer_input:offload,qkv:offload,attention_out:offload"
LLAMA3_8B = ("configs/llama.py:b8", [])
LLAMA3_70B = ("configs/llama.py:b70", [])
LLAMA2 = ["--model.vocab=32000", "--model.theta=10000"]
LLAMA2_7B = (
    "configs/llama.py:b8",
    [*LLAMA2, "--model.kv_heads=32", "--model.mlp=11008"],
)
LLAMA2_13B = (
    "configs/llama.py:b8",
    [
        *LLAMA2,
        "--model.embed=5120",
        "--model.layers=40",
        "--model.heads=40",
        "--model.kv_heads=40",
        "--model.mlp=13824",
    ],
)
LLAMA2_70B = ("configs/llama.py:b70", LLAMA2)
LLAMA3_405B = (
    "configs/llama.py:b70",
    ["--model.embed=16384", "--model.layers=126", "--model.heads=128", "--model.mlp=53248"],
)
MIXTRAL = ("configs/moe.py:mixtral_8x7b", [])
MIXTRAL_8X22B = (
    "configs/moe.py:mixtral_8x7b",
    [
        "--model.embed=6144",
        "--model.layers=56",
        "--model.heads=48",
        "--model.expert_mlp=16384",
        "--model.vocab=32768",
        "--param-dtype=bf16",
    ],
)

# name: model, target, layout, remat, rows a device, sequence, tokens/s a device, whether fitted on, source
REPORTS: dict[str, tuple[Any, ...]] = {
    "h100 8B 8": (LLAMA3_8B, "h100:1x8", "fsdp8", "dots", 2, 8192, 6667, True, TITAN_H100),
    "h100 8B 128": (LLAMA3_8B, "h100:16x8", "fsdp128", "dots", 2, 8192, 6514, False, TITAN_H100),
    "a100 8B 64": (LLAMA3_8B, "a100:8x8", "fsdp64", "dots", 1, 8192, 2973, True, TITAN_A100),
    "a100 70B 64": (LLAMA3_70B, "a100:8x8", "fsdp64", "full", 1, 8192, 331, False, TITAN_A100),
    "a100 L2-13B 64": (LLAMA2_13B, "a100:8x8", "fsdp64", "none", 2, 4096, 2162, True, TITAN_A100),
    "a100 L2-13B 64 selective": (LLAMA2_13B, "a100:8x8", "fsdp64", "dots", 2, 4096, 1904, False, TITAN_A100),
    "a100 L2-70B 64": (LLAMA2_70B, "a100:8x8", "fsdp64", "full", 2, 4096, 353, False, TITAN_A100),
    "v6e 8B 256": (LLAMA3_8B, "v6e:16x16", "fsdp256", KQVO_AWAY, 4, 8192, 7207, True, RECIPE.format("3.1-8B-MaxText")),
    "v6e 70B 256": (
        LLAMA3_70B, "v6e:16x16", "fsdp256", "layer_input:offload,qkv:offload", 5, 8192, 960, False,
        RECIPE.format("3.1-70B-MaxText"),
    ),
    "v6e L2-70B 256": (
        LLAMA2_70B, "v6e:16x16", "fsdp256", "qkv:offload", 3, 4096, 900, False, RECIPE.format("2-70B-MaxText")
    ),
    "v6e 405B 512": (
        LLAMA3_405B, "2*v6e:16x16", "slice_fsdp2-fsdp256", "layer_input:offload", 1, 8192, 149.5, False,
        RECIPE.format("3.1-405B-MaxText"),
    ),
    "v6e 8x7B 256": (MIXTRAL, "v6e:16x16", "fsdp256", KQVO_AWAY, 12, 4096, 3899, False, TIERS.format("trillium")),
    "v6e 8x22B 256": (
        MIXTRAL_8X22B, "v6e:16x16", "fsdp64-expert4", f"{KQVO_AWAY},exchanged:again", 8, 4096, 1326, False, TIERS.format("trillium")
    ),
    "v5p L2-70B 512": (LLAMA2_70B, "v5p:8x8x8", "fsdp512", "qkv,attention_out", 4, 4096, 692, True, TIERS.format("v5p")),
    "v5p Mixtral 256": (MIXTRAL, "v5p:4x8x8", "fsdp256", "full", 8, 4096, 2909, False, TIERS.format("v5p")),
}  # fmt: skip


class Case:
    """One report, partitioned once and priced as often as asked."""

    def __init__(self, name: str):
        from shardtrain.config import resolve
        from shardtrain.config.planning import Layout, planned
        from shardtrain.mesh import Target
        from shardtrain.plan.candidates import Candidate
        from shardtrain.plan.partitioned import partition

        (
            (place, flags),
            target,
            layout,
            self.remat,
            rows,
            sequence,
            self.speed,
            self.fitted_on,
            self.source,
        ) = REPORTS[name]
        self.target = Target(target)
        flags = [
            *flags,
            f"--global_batch={rows * self.target.size}",
            f"--model.sequence={sequence}",
            f"--data.sequence={sequence}",
        ]
        self.config, _ = resolve(place, flags, self.target.size)
        self.layout = Layout(Candidate.parse(layout), self.remat)
        self.plan, self.flops = planned(self.layout.of(self.config), self.target)
        self.paper = partition(self.plan, self.target)
        self.tokens = rows * sequence

    def priced(self, constants: Any) -> Any:
        from shardtrain.plan.forecast import forecast

        return forecast(self.plan, self.target, constants=constants, model_flops=self.flops, paper=self.paper)

    def error(self, constants: Any) -> float:
        return self.tokens / self.priced(constants).seconds / self.speed - 1

    def measured(self, constants: Any, compile: bool) -> dict[str, Any]:
        from shardtrain.config.planning import forecast_config
        from shardtrain.config.search import search_config
        from shardtrain.errors import CompileError

        made = self.priced(constants)
        found = search_config(self.config, self.target, constants, partitions=16, compiles=0)
        fits, peak = made.fits, made.bill.peak
        tier = "partitioned"
        if compile:
            try:
                _, sure = forecast_config(self.layout.of(self.config), self.target, constants, compile="full")
                fits, peak, tier = sure.fits, sure.bill.peak, "compiled"
            except CompileError as error:
                tier = f"not compiled: {error.message}"
        return {
            "target": self.target.name,
            "layout": self.layout.name,
            "rows": self.config.global_batch,
            "tokens_per_second_published": self.speed,
            "tokens_per_second_predicted": self.tokens / made.seconds,
            "speed_error": self.tokens / made.seconds / self.speed - 1,
            "mfu_predicted": made.mfu,
            "mfu_published": made.mfu and made.mfu * self.speed / (self.tokens / made.seconds),
            "fits": fits,
            "peak": peak,
            "usable": made.bill.usable,
            "tier": tier,
            "best": found.best.name if found.best else None,
            "over_best": made.seconds / found.best.seconds if found.best else None,
            "terms": made.cost.as_json(),
            "fitted_on": self.fitted_on,
            "source": self.source,
        }


def fitted(cases: list[Case]) -> Any:
    """The share `compute` under which the reports to fit on are met best (least squares of logarithms)."""
    import dataclasses

    from shardtrain.plan.cost import Constants

    start = Constants.of(cases[0].target)
    with_share = lambda share: dataclasses.replace(start, compute=share, source="fitted to reports")
    miss = lambda share: sum(math.log1p(c.error(with_share(share))) ** 2 for c in cases if c.fitted_on)
    shares = [s / 200 for s in range(60, 200)]
    return with_share(min(shares, key=miss))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="reports whose name holds this text")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {"constants": {}, "reports": {}}
    constants, reports = kept["constants"], kept["reports"]
    for chip in dict.fromkeys(name.split(" ")[0] for name in REPORTS):
        names = [n for n in REPORTS if n.startswith(f"{chip} ")]
        wanted = [n for n in names if options.only in n and (options.again or n not in reports)]
        if not wanted:
            continue
        cases = {n: Case(n) for n in names}
        found = fitted(list(cases.values()))
        constants[chip] = found.compute
        for name in wanted:
            reports[name] = cases[name].measured(found, options.compile)
            checked = [r for r in reports.values() if not r["fitted_on"]]
            result = {
                "benchmark": "published",
                "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
                "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")},
                "formula": "speed_error = predicted tokens/s / published - 1; over_best = seconds / those of our best",
                "constants": constants,
                "checked": len(checked),
                "within_20_percent": sum(abs(r["speed_error"]) <= 0.2 for r in checked),
                "within_10_percent_of_best": sum((r["over_best"] or 9) <= 1.1 for r in checked),
                "fitting": sum(bool(r["fits"]) for r in checked),
                "reports": {n: reports[n] for n in REPORTS if n in reports},
            }
            FILE.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps({name: reports[name]}), flush=True)


if __name__ == "__main__":
    main()
