"""Compiler options that every compilation starts from, by platform, and by chip where only some have them.

Each moved bytes, or bytes under which something else runs; `benchmarks/overlap.py` has the figures. What the user says
wins: `plan.compile(options={name: value})`, None to leave one of ours out, or the same name in `XLA_FLAGS` or
`LIBTPU_INIT_ARGS`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("shardtrain")

# Collectives run on the SparseCores beside compute; without, all are waited for on v5p and v6e. Told of its all-gathers over
# three dims, the compiler leaves them as they are: it wrote them as all-reduces, of twice the bytes. What public training
# recipes of these chips set.
_SPARSECORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # Reduce-scatters in the layout that their users want: without, fsdp sends a copy of each remainder.
        "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
        "xla_tpu_assign_all_reduce_scatter_layout": "true",
        # No products in pieces (collective matmul): a ring of n sends (n+1)/(n-1) of what a reduce-scatter does. For
        # models that leave the edges of their blocks to the partitioner; ours write them by hand, and it moves nothing there.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
    "v5e": {  # on other TPUs the compiler refuses them
        # All-reduces start early and end late: under tensor half of their bytes, which were all waited for.
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_enable_async_all_reduce": "true",
    },
    **dict.fromkeys(("v5p", "v6e", "tpu7x"), _SPARSECORE),
    "cuda": {},  # its compiler starts nearly everything early by itself
    "cpu": {},
}

_HEARD = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def heard() -> list[str]:
    """The user's own settings that change a program."""
    return [os.environ.get(name, "") for name in _HEARD]


def options_for(platform: str, given: Mapping[str, Any] | None = None, *, chip: str = "") -> dict[str, str]:
    """Ours, but for what the user's environment says, under what was given. `platform`: tpu, cuda or cpu; `chip`: `v5e`."""
    said = set(re.findall(r"--(\w+)", " ".join(heard())))
    start = {name: value for name, value in _ours(platform, chip).items() if name not in said}
    return {name: str(v) for name, v in {**start, **(given or {})}.items() if v is not None}


def _ours(platform: str, chip: str) -> dict[str, str]:
    return {**OPTIONS[platform], **OPTIONS.get(chip, {})}


def as_value(text: str) -> str | bool:
    """As JAX passes it on: the GPU and CPU compilers take no text for a truth value."""
    return {"true": True, "false": False}.get(text.lower(), text)


def compile_with[T](
    compiler: Callable[[dict[str, str | bool]], T],
    options: Mapping[str, str],
    platform: str,
    chip: str = "",
) -> T:
    """`compiler(options)`; of ours, those that this version of the compiler does not know are left out, with a line in
    the log. One that the user gave is an error."""
    left = dict(options)
    while True:
        try:
            return compiler({name: as_value(text) for name, text in left.items()})
        except Exception as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            name = unknown.group(1) if unknown else ""
            ours = _ours(platform, chip)
            if ours.get(name) is None or left.get(name) != ours[name]:
                raise
            log.warning("this compiler has no option %s: left out", name)
            del left[name]
