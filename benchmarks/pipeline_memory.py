"""Temporary memory of a pipeline's step by number of microbatches, 1F1B against GPipe. Prints JSON.

    python benchmarks/pipeline_memory.py

A GPT over four stages, compiled for four simulated CPU devices; nothing is run. Bytes are XLA's memory analysis of each
program. A microbatch keeps its size, so the batch grows with their number. Kept as `benchmarks/results/pipeline_memory.json`,
drawn as `pipeline_memory.svg`.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import sys
from typing import Any

import jax
import optax

import shardtrain as st
from shardtrain.mesh import simulate_devices
from shardtrain.models import GPTConfig, build_model, language_model_loss

STAGES, ROWS, SEQUENCE = 4, 8, 128
CONFIG = GPTConfig(vocab=128, sequence=SEQUENCE, embed=64, layers=STAGES, heads=4)
MICROBATCHES = (4, 8, 16, 32, 64)
SCHEDULES = ("gpipe", "1f1b")
INPUT = ROWS * SEQUENCE * CONFIG.embed * 4  # bytes of one microbatch's activations between stages
RESULTS = pathlib.Path(__file__).parent / "results"


def temporaries(schedule: str, microbatches: int) -> int:
    shape = (ROWS * microbatches, SEQUENCE)
    plan = st.plan(
        lambda rngs: build_model(CONFIG, rngs),
        language_model_loss,
        optax.sgd(0.1),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=st.make_mesh(stage=STAGES),
        microbatches=microbatches,
        schedule=schedule,
    )
    found = plan.compile().memory()["temporaries"]
    print(f"{schedule}, {microbatches} microbatches: {found} bytes", file=sys.stderr, flush=True)
    return found


def picture(rows: list[dict[str, Any]]) -> str:
    """Lines over the number of microbatches, in MiB."""
    width, height, left, top = 420, 220, 60, 20
    most = max(r["temporaries"] for r in rows)
    x = lambda m: left + width * m / MICROBATCHES[-1]
    y = lambda b: top + height * (1 - b / most)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{top + height + 50}" '
        'font-family="sans-serif" font-size="12">',
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>',
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle" fill="#666">microbatches</text>',
        f'<text x="4" y="{top - 6}" fill="#666">temporary MiB per device</text>',
    ]
    for m in MICROBATCHES:
        parts.append(
            f'<text x="{x(m):.0f}" y="{top + height + 18}" text-anchor="middle" fill="#666">{m}</text>'
        )
    for share in (0, 0.5, 1):
        parts.append(
            f'<text x="{left - 6}" y="{y(share * most) + 4:.0f}" text-anchor="end" fill="#666">'
            f"{share * most / 2**20:.1f}</text>"
        )
    for schedule, colour in zip(SCHEDULES, ("#c0392b", "#2471a3"), strict=True):
        mine = [r for r in rows if r["schedule"] == schedule]
        line = " ".join(f"{x(r['microbatches']):.0f},{y(r['temporaries']):.1f}" for r in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end = mine[-1]
        parts.append(
            f'<text x="{x(end["microbatches"]) + 6:.0f}" y="{y(end["temporaries"]) + 4:.0f}" fill="{colour}">'
            f"{schedule}</text>"
        )
    return "".join(parts) + "</svg>\n"


def main() -> None:
    simulate_devices(STAGES)
    rows = [
        {"schedule": s, "microbatches": m, "temporaries": temporaries(s, m)}
        for s in SCHEDULES
        for m in MICROBATCHES
    ]
    slope = {}
    for schedule in SCHEDULES:
        first, last = (
            next(r for r in rows if r["schedule"] == schedule and r["microbatches"] == m)
            for m in (MICROBATCHES[1], MICROBATCHES[-1])
        )
        more = last["microbatches"] - first["microbatches"]
        slope[schedule] = round((last["temporaries"] - first["temporaries"]) / more / INPUT, 3)
    result = {
        "formula": "growth = (temporaries at the most microbatches - at the second least) / more microbatches / bytes of "
        "one microbatch's activations between stages",
        "shapes": {
            "stages": STAGES,
            "rows_of_a_microbatch": ROWS,
            "sequence": SEQUENCE,
            "embed": CONFIG.embed,
            "input_bytes": INPUT,
        },
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "hardware": f"{STAGES} simulated CPU devices, {os.cpu_count()} CPU cores; compiled, not run",
        "source": "XLA's memory analysis of the CPU programs",
        "date": datetime.date.today().isoformat(),
        "growth": slope,
        "rows": rows,
    }
    (RESULTS / "pipeline_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "pipeline_memory.svg").write_text(picture(rows))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
