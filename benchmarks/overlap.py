"""What each of our compiler options moves: bytes, and bytes under which something else may run. Prints JSON.

    python benchmarks/overlap.py

Needs the extra `aot-tpu`. The GPT of `bytes.py`, bf16, compiled with none of the options of
`shardtrain/plan/options.py` for its chip, with all, and with all but one group. `async_share` = wire bytes of collectives that the
compiler split into a start and an end (or fused with what runs meanwhile) / wire bytes. Of the products in pieces
(windowed einsum) every transfer is asynchronous; they send more, see `ratio`. Kept as `benchmarks/results/overlap.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from bytes import Case, planned

import shardtrain as st
from shardtrain.plan.options import OPTIONS

GROUPS = {
    "async all-reduce": (
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        "xla_enable_async_all_reduce",
    ),
    "reduce-scatter layout": (
        "xla_tpu_use_minor_sharding_for_major_trivial_input",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
        "xla_tpu_assign_all_reduce_scatter_layout",
    ),
    "no windowed einsum": ("xla_jf_spmd_threshold_for_windowed_einsum_mib",),
    "SparseCores": tuple(OPTIONS["v5p"]),
}
CASES = (
    ("v5e:2x4", "data", "async all-reduce"),
    ("v5e:2x4", "fsdp", "reduce-scatter layout"),
    ("v5e:2x4", "tensor", "async all-reduce"),
    ("v5e:2x4", "tensor_sequence", "no windowed einsum"),
    ("v5p:4x4x4", "data", "SparseCores"),
    ("v5p:4x4x4", "fsdp", "SparseCores"),
    ("v6e:4x4", "data", "SparseCores"),
    ("v6e:4x4", "fsdp", "SparseCores"),
    ("tpu7x:4x4x4", "fsdp", "SparseCores"),
)


def measure(on: str, layout: str, name: str, left_out: tuple[str, ...]) -> dict[str, Any]:
    target, plan = planned(Case(on, "gpt", layout))
    step = plan.compile(target=target, options=dict.fromkeys(left_out))
    found = st.audit(step)
    row = {
        "target": str(target),
        "layout": layout,
        "options": name,
        "ratio": round(found.ratio or 0.0, 4),
        "async_share": round(found.async_share or 0.0, 4),
        "peak_memory": found.memory["peak"],
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    rows = []
    for target, layout, group in CASES:
        ours = tuple({**OPTIONS["tpu"], **OPTIONS[st.Target(target).family]})
        rows.append(measure(target, layout, "none of ours", ours))
        rows.append(measure(target, layout, f"all but {group}", GROUPS[group]))
        rows.append(measure(target, layout, "ours", ()))
    result = {
        "formula": "async_share = wire bytes of asynchronous collectives / wire bytes",
        "options": {chip: OPTIONS[chip] for chip in ("tpu", "v5e", "v5p", "v6e", "tpu7x")},
        "groups": GROUPS,
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "hardware": "compiled without devices",
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    file = pathlib.Path(__file__).parent / "results" / "overlap.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
