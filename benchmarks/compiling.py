"""How the program of a step and the time to compile it grow with layers and with devices. Prints JSON.

    python benchmarks/compiling.py

Needs the extras `aot-tpu` and `aot-gpu`. A GPT of scanned layers, bf16, fsdp and fsdp x tensor, compiled anew
(no cache) by the target's own compiler: instructions of the optimized program, CPU seconds of the compiler's process
while it compiles, CPU seconds of tracing and lowering here. CPU seconds, because this survives other load on the
machine. Kept as `benchmarks/results/compiling.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
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
    file = pathlib.Path(__file__).parent / "results" / "compiling.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
