"""How the program of a step and the time to compile it grow with layers and with devices. Prints JSON.

    python benchmarks/compiling.py
    python benchmarks/compiling.py --plans [--only TEXT] [--most N]

Needs the extras `aot-tpu` and `aot-gpu`. A GPT of scanned layers, bf16, fsdp and fsdp x tensor, compiled anew
(no cache) by the target's own compiler: instructions of the optimized program, CPU seconds of the compiler's process
while it compiles, CPU seconds of tracing and lowering here. CPU seconds, because this survives other load on the
machine. Kept as `benchmarks/results/compiling.json`.

`--plans`: what `shardtrain plan` and `shardtrain search` take as they are called, with no program in the cache: seconds of the
clock, and CPU seconds of the command and of the compilers that it starts. Kept in `benchmarks/results/planning_time.json`; what is
there already is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["SHARDTRAIN_CACHE"] = tempfile.mkdtemp(prefix="compiling-")

import jax
import optax

import shardtrain as st
from shardtrain.models import GPTConfig, build_model, language_model_loss

VOCAB, EMBED, HEADS, SEQUENCE = 32768, 4096, 32, 1024
LAYERS = (2, 8, 32)
DEVICES = {"v5e": ("v5e:2x4", "v5e:8x8", "v5e:16x16"), "h100": ("h100:1x8", "h100:8x8", "h100:32x8")}

RESULTS = pathlib.Path(__file__).parent / "results"
EACH = {  # config -> target -> what its own layout lacks there
    "configs/gpt.py:b175": {
        "v5e:16x16": "--microbatches 48",
        "v5p:8x8x16": "--microbatches 12",
        "2*v5e:16x16": "--microbatches 24",
        "h100:8x8": "--microbatches 192",
        "h100:128x8": "--microbatches 12",
    },
    "configs/llama.py:b8": {
        "v5e:16x16": "--microbatches 2",
        "v5p:8x8x16": "--global_batch 1024",
        "2*v5e:16x16": "",
        "h100:8x8": "--microbatches 4",
        "h100:128x8": "--global_batch 1024",
    },
    "configs/llama.py:b70": {
        "v5e:16x16": "--microbatches 16",
        "v5p:8x8x16": "--microbatches 4",
        "2*v5e:16x16": "--microbatches 8",
        "h100:8x8": "--microbatches 64",
        "h100:128x8": "--microbatches 4",
    },
    "configs/moe.py:mixtral_8x7b": {
        "v5e:16x16": "--microbatches 2",
        "v5p:8x8x16": "--global_batch 1024",
        "2*v5e:16x16": "",
        "h100:8x8": "--microbatches 8",
        "h100:128x8": "--global_batch 1024",
    },
}
COMMANDS = [
    *(
        f"plan {config} --target {target} {more}".strip()
        for config, found in EACH.items()
        for target, more in found.items()
    ),
    "search configs/llama.py:b8 --target h100:8x8",
]


def timed(command: str) -> dict[str, Any]:
    """One command in a process of its own, as a user calls it."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, started = spent(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="plans-") as cache:
        done = subprocess.run(
            [sys.executable, "-m", "shardtrain", *command.split(), "--json"],
            env={**os.environ, "SHARDTRAIN_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    seconds, cpu = time.perf_counter() - started, spent() - before
    found = json.loads(done.stdout)
    row = {"exit": done.returncode, "wall_seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    if "counts" in found:
        row |= {"counts": found["counts"], "best": found["best"] and found["best"]["layout"]}
    else:
        memory = found.get("memory") or {}
        names = ("mesh", "rules", "microbatches", "fits", "refused", "source", "error")
        row |= {name: found[name] for name in names if found.get(name) is not None}
        row |= {"peak": memory.get("peak"), "ways_to_fit": len(found.get("ways_to_fit", ()))}
    return row


def plans(only: str, most: int) -> None:
    file = RESULTS / "planning_time.json"
    known = json.loads(file.read_text())["commands"] if file.is_file() else {}
    for command in [c for c in COMMANDS if only in c and c not in known][:most]:
        known[command] = {**timed(command), "load_average": round(os.getloadavg()[0], 1)}
        result = {
            "formula": "seconds of one command from start to end; cpu_seconds: of it and of the compilers that it starts",
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores, no accelerator",
            "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
            "commands": {c: known[c] for c in COMMANDS if c in known},
        }
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({command: known[command]}), flush=True)


def measure(name: str, layers: int, tensor: int) -> dict[str, Any]:
    target = st.Target(name)
    shape = (target.size // tensor, SEQUENCE)
    config = GPTConfig(VOCAB, SEQUENCE, EMBED, layers, HEADS, remat="full")
    started = time.process_time()
    plan = st.plan(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        optax.adamw(3e-4),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=target.mesh(fsdp=target.size // tensor, tensor=tensor),
        rules="fsdp_tensor",
        precision="bf16",
    )
    step = plan.compile(target=target)
    ours = time.process_time() - started
    found = {
        "target": name,
        "devices": target.size,
        "layers": layers,
        "tensor": tensor,
        "program_lines": step.program().lines,
        "compile_cpu_seconds": round(step.executable.cpu_seconds, 2),
        "trace_and_lower_cpu_seconds": round(ours, 2),
        "source": step.source,
    }
    print(found, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--only", default="", help="commands that hold this text")
    parser.add_argument("--most", type=int, default=len(COMMANDS))
    options = parser.parse_args()
    if options.plans:
        plans(options.only, options.most)
        return
    rows = [measure(f, n, 1) for f in ("v5e:2x4", "h100:1x8") for n in LAYERS]
    for names in DEVICES.values():
        rows += [measure(name, 4, tensor) for tensor in (1, 4) for name in names]
    growth = {}
    for family, names in DEVICES.items():
        for tensor in (1, 4):
            cost = {
                r["target"]: r["compile_cpu_seconds"] + r["trace_and_lower_cpu_seconds"]
                for r in rows
                if r["layers"] == 4 and r["tensor"] == tensor
            }
            growth[f"{family}, tensor={tensor}: 8 to 256 devices"] = round(
                cost[names[-1]] / cost[names[0]], 3
            )
    for name in ("v5e:2x4", "h100:1x8"):
        cost = {r["layers"]: r for r in rows if r["target"] == name and r["layers"] in LAYERS}
        first, last = cost[LAYERS[0]], cost[LAYERS[-1]]
        growth[f"{name}: {LAYERS[0]} to {LAYERS[-1]} layers, lines"] = round(
            last["program_lines"] / first["program_lines"], 3
        )
        growth[f"{name}: {LAYERS[0]} to {LAYERS[-1]} layers, CPU seconds"] = round(
            last["compile_cpu_seconds"] / first["compile_cpu_seconds"], 3
        )
    result = {
        "formula": "growth = last / first, of compile plus trace and lower CPU seconds, or of program lines",
        "shapes": {"vocab": VOCAB, "embed": EMBED, "heads": HEADS, "sequence": SEQUENCE, "dtype": "bf16"},
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "hardware": f"{os.cpu_count()} CPU cores, no accelerator",
        "date": datetime.date.today().isoformat(),
        "growth": growth,
        "rows": rows,
    }
    file = RESULTS / "compiling.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
