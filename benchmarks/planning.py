"""Steps on paper against the same steps compiled: memory, FLOPs, bytes sent.

    python benchmarks/planning.py [--only TEXT] [--most N] [--again | --paper]

For each case (config, target, layout) the step is partitioned by Shardy's passes and compiled by the target's compiler as
production would. Prints, and keeps in `benchmarks/results/planning.json`, peak bytes of one device by both and their ratio,
FLOPs, and bytes sent by axis. A compiler that finds memory short runs products again (`flops_recomputed`): the program that
was planned is what is left. A case that is there already, with its FLOPs, is not made again without `--again`. Formula: error =
paper / compiled - 1, of FLOPs paper / (compiled - recomputed) - 1. `--paper` compiles nothing: what is kept of the compiled steps is
set against the paper of the code as it is.
Needs the extras aot-tpu and aot-gpu; half a minute to two minutes of CPU a case.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

FILE = pathlib.Path(__file__).parent / "results" / "planning.json"
CASES = [
    ("configs/llama.py:b8", "h100:8x8", "fsdp64"),
    ("configs/gpt.py:small", "h100:1x8", "data8"),
    ("configs/gpt.py:small", "h100:1x8", "fsdp8+x4"),
    ("configs/gpt.py:tiny", "h100:1x8", "data2-fsdp2-tensor2"),
    ("configs/llama.py:b1", "h100:1x8", "fsdp8+x8"),
    ("configs/llama.py:b8", "h100:8x8", "fsdp16-tensor4"),
    ("configs/llama.py:b8", "h100:8x8", "fsdp16-tensor4+fsdp_tensor_sequence"),
    ("configs/llama.py:b70", "h100:16x8", "fsdp16-tensor8"),
    ("configs/moe.py:tiny", "h100:1x8", "data2-expert2-tensor2"),
    ("configs/gpt.py:tiny", "v5e:2x4", "data2-fsdp2-tensor2"),
    ("configs/gpt.py:small", "v5e:2x4", "fsdp8+x16"),
    ("configs/llama.py:b8", "v5p:4x4x4", "fsdp64"),
    ("configs/gpt.py:tiny", "cpu:8", "data2-fsdp2-tensor2"),
    ("configs/gpt.py:tiny", "cpu:8", "fsdp2-context4"),
    ("configs/gpt.py:tiny", "cpu:8", "stage2-data4+x2"),
    ("configs/llama.py:tiny", "cpu:8", "data2-tensor4+tensor_sequence"),
    ("configs/moe.py:tiny", "cpu:8", "data2-expert2-tensor2"),
    ("configs/gpt.py:small", "h100:1x8", "fsdp8+x2"),
    ("configs/gpt.py:small", "h100:1x8", "data8+zero1+x4"),
    ("configs/gpt.py:small", "h100:1x8", "data2-tensor4"),
    ("configs/gpt.py:small", "h100:1x8", "fsdp2-tensor4+fsdp_tensor_sequence"),
    ("configs/gpt.py:small", "h100:1x8", "fsdp4-context2"),
    ("configs/gpt.py:small", "h100:1x8", "data4-stage2+x8"),
    ("configs/gpt.py:xl", "h100:1x8", "fsdp8+x8"),
    ("configs/gpt.py:xl", "h100:2x8", "fsdp16"),
    ("configs/gpt.py:b175", "h100:64x8", "fsdp64-tensor8"),
    ("configs/gpt.py:b175", "h100:64x8", "fsdp64-tensor8+fsdp_tensor_sequence"),
    ("configs/llama.py:b1", "h100:1x8", "fsdp2-tensor4"),
    ("configs/llama.py:b1", "h100:1x8", "fsdp4-context2+ulysses+x4"),
    ("configs/llama.py:b1", "h100:1x8", "stage2-fsdp4+x8"),
    ("configs/llama.py:b1", "a100:1x8", "fsdp8+x16"),
    ("configs/llama.py:b8", "h100:8x8", "fsdp64+x4"),
    ("configs/llama.py:b8", "h100:8x8", "fsdp32-context2"),
    ("configs/llama.py:b8", "h100:8x8", "stage8-fsdp8+x16"),
    ("configs/llama.py:b8", "a100:8x8", "fsdp64"),
    ("configs/llama.py:b8", "h200:1x8", "fsdp8+x16"),
    ("configs/llama.py:b70", "h100:32x8", "fsdp256"),
    ("configs/moe.py:tiny", "h100:1x8", "expert8"),
    ("configs/moe.py:tiny", "h100:1x8", "fsdp4-expert2"),
    ("configs/moe.py:deepseek_16b", "h100:8x8", "fsdp8-expert8"),
    ("configs/moe.py:mixtral_8x7b", "h100:8x8", "fsdp8-expert8"),
    ("configs/gpt.py:tiny", "cpu:8", "fsdp8"),
    ("configs/gpt.py:tiny", "cpu:8", "tensor8+tensor_sequence"),
    ("configs/llama.py:tiny", "cpu:8", "fsdp8+x4"),
    ("configs/llama.py:tiny", "cpu:8", "fsdp2-context4+ulysses"),
    ("configs/moe.py:tiny", "cpu:8", "fsdp8"),
    ("configs/gpt.py:tiny", "v5e:2x4", "fsdp8"),
    ("configs/gpt.py:small", "v5e:2x4", "data8+x16"),
    ("configs/llama.py:b1", "v5e:4x4", "fsdp16+x16"),
    ("configs/moe.py:tiny", "v5e:2x4", "data2-expert2-tensor2"),
    ("configs/llama.py:b8", "v5p:4x4x4", "fsdp16-tensor4"),
    ("configs/llama.py:b8", "v6e:8x8", "fsdp64"),
    ("configs/llama.py:b8", "tpu7x:4x4x4", "fsdp128"),
    ("configs/moe.py:mixtral_8x7b", "v5p:4x4x4", "fsdp8-expert8"),
    # heads of 64 on TPUs, saved; stages of a divided sequence
    ("configs/gpt.py:small", "v5e:2x4", "fsdp8"),
    ("configs/gpt.py:small", "v5e:2x4", "fsdp8+x4+remat:dots"),
    ("configs/gpt.py:small", "v5e:2x4", "stage2-tensor4+fsdp_tensor_sequence+x16"),
    ("configs/llama.py:b1", "v6e:2x4", "fsdp4-tensor2+x16+remat:dots"),
    # layers' inputs in the host's memory
    ("configs/llama.py:b8", "v6e:4x4", "fsdp16+remat:layer_input:offload"),
    ("configs/llama.py:b8", "v5p:2x2x4", "fsdp4-tensor4+x8+remat:layer_input:offload,qkv:offload"),
    ("configs/llama.py:b8", "h100:2x8", "fsdp16+remat:layer_input:offload"),
    # which their compilers refuse
    ("configs/gpt.py:b175", "v5e:16x16", "fsdp32-tensor8+x48"),
    ("configs/gpt.py:b175", "v5e:16x16", "fsdp32-tensor8+fsdp_tensor_sequence+x48"),
    ("configs/llama.py:b70", "v5e:16x16", "fsdp32-tensor8+x16"),
]


def by_axis(found: Any) -> dict[str, float]:
    return {
        axis: sum(c.wire_bytes for c in found if c.axis == axis)
        for axis in sorted({c.axis for c in found if c.axes})
    }


def measured(
    config_name: str, target_name: str, layout: str, kept: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`kept`: what a compiler said of it already."""
    from shardtrain.config import resolve
    from shardtrain.config.planning import Layout, planned
    from shardtrain.errors import CompileError
    from shardtrain.mesh import Target
    from shardtrain.plan.candidates import Candidate
    from shardtrain.plan.partitioned import partition

    target = Target(target_name)
    config, _ = resolve(config_name, [], target.size)
    name, _, remat = layout.partition("+remat:")
    plan, _ = planned(Layout(Candidate.parse(name), remat or None).of(config), target)
    started = time.process_time()
    paper = partition(plan, target)
    found = {
        "config": config_name,
        "target": target_name,
        "layout": layout,
        "peak_on_paper": paper.peak,
        "hosted_on_paper": paper.live.host,
        "arguments_on_paper": paper.arguments,
        "flops_on_paper": paper.flops,
        "sent_on_paper": by_axis(paper.collectives),
        "paper_cpu_seconds": time.process_time() - started,
    }
    if kept is not None:
        theirs = kept.keys() & {"refused", "source"} | {
            k for k in kept if k.endswith(("_compiled", "_recomputed"))
        }
        found |= {key: kept[key] for key in sorted(theirs)}
    else:
        try:
            step = plan.compile(target=target)
        except CompileError as error:  # refused: what the paper says of it stands beside
            found |= {"refused": error.message}
        else:
            program, memory = step.program(), step.memory()
            found |= {
                "peak_compiled": memory["peak"],
                "hosted_compiled": memory.get("host", 0),
                "arguments_compiled": memory["arguments"],
                "flops_compiled": program.flops,
                "flops_recomputed": program.recomputed,
                "sent_compiled": by_axis(program.collectives),
                "source": step.source,
            }
    if "refused" in found:
        return found | {"error": None, "flops_error": None}
    planned_flops = found["flops_compiled"] - found["flops_recomputed"]
    return found | {
        "error": paper.peak / found["peak_compiled"] - 1,
        "flops_error": paper.flops / planned_flops - 1,
    }


def with_verdicts(case: dict[str, Any]) -> dict[str, Any]:
    """`fits_on_paper`, and what counts: `fits`, as the compiler has it. None where the usable bytes are not known."""
    from shardtrain.mesh import Target

    chip = Target(case["target"]).chip
    usable = chip.usable_bytes if chip else None
    fits = lambda peak: None if usable is None else bool(peak <= usable)
    said = False if "refused" in case else fits(case["peak_compiled"])
    if case["flops_error"] == 0:
        case.setdefault("flops_recomputed", 0.0)
    return {**case, "usable": usable, "fits_on_paper": fits(case["peak_on_paper"]), "fits": said}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    errors = sorted(abs(c["error"]) for c in cases if c["error"] is not None) or [0.0]
    flops = [abs(c["flops_error"]) for c in cases if c["flops_error"] is not None]
    return {
        "cases": len(cases),
        "median_error": statistics.median(errors),
        "error_of_95_percent": errors[min(len(errors) - 1, int(0.95 * len(errors)))],
        "largest_error": errors[-1],
        "largest_flops_error": max(flops, default=None),
        "refused": sum("refused" in c for c in cases),
        "fits_on_paper_alone": sum(c["fits_on_paper"] is True and c["fits"] is False for c in cases),
        "verdict_of_paper_is_the_compilers": sum(
            c["fits"] == c["fits_on_paper"] for c in cases if c["usable"] is not None
        )
        / max(1, sum(c["usable"] is not None for c in cases)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument("--most", type=int, default=len(CASES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--paper", action="store_true")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    kept = json.loads(FILE.read_text())["measured"] if FILE.is_file() else []
    known = {(c["config"], c["target"], c["layout"]): c for c in kept}
    wanted = [case for case in CASES if options.only in " ".join(case)]
    # Where both have the same FLOPs, nothing was run again.
    lacking = lambda c: (
        not {"refused", "flops_recomputed"} & known.get(c, {}).keys()
        and known.get(c, {}).get("flops_error") != 0
    )
    todo = sorted((c for c in wanted if options.again or lacking(c)), key=known.__contains__)
    if options.paper:
        todo = [c for c in wanted if c in known]
    for case in todo[: options.most]:
        known[case] = measured(*case, known[case] if options.paper else None)
        found = [with_verdicts(known[c]) for c in CASES if c in known]
        versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")}
        result = {
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
            "versions": versions,
            "formula": "error = peak on paper / peak of the compiled program - 1; flops_error = paper / "
            "(compiled - recomputed by the compiler) - 1; fits: peak <= usable",
            **summary(found),
            "measured": found,
        }
        FILE.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(known[case]), flush=True)


if __name__ == "__main__":
    main()
