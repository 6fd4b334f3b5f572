"""What each of our compiler options moves: bytes, and bytes under which something else may run. Prints JSON.

    python benchmarks/overlap.py

Needs the extra `aot-tpu`. The GPT of `bytes.py` on v5e:2x4, bf16, compiled with none of the options of
`shardtrain/plan/options.py`, with all, and with all but one group. `async_share` = wire bytes of collectives that the
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
}
CASES = {
    "data": "async all-reduce",
    "fsdp": "reduce-scatter layout",
    "tensor": "async all-reduce",
    "tensor_sequence": "no windowed einsum",
}


def measure(layout: str, name: str, left_out: tuple[str, ...]) -> dict[str, Any]:
    target, plan = planned(Case("v5e:2x4", "gpt", layout))
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
    for layout, group in CASES.items():
        rows.append(measure(layout, "none of ours", tuple({**OPTIONS["tpu"], **OPTIONS["v5e"]})))
        rows.append(measure(layout, f"all but {group}", GROUPS[group]))
        rows.append(measure(layout, "ours", ()))
    result = {
        "formula": "async_share = wire bytes of asynchronous collectives / wire bytes",
        "options": {**OPTIONS["tpu"], **OPTIONS["v5e"]},
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
