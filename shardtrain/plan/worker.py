"""Compiles one lowered program with one target's compiler, in a process of its own.

    python -m shardtrain.plan.worker FOLDER

`FOLDER` holds `module.mlirbc` (StableHLO with its source lines) and `request.json`; `program.txt` (optimized
HLO) and `result.json` are written beside them. The caller sets the environment, see `plan/aot.py`. Private
parts of JAX that compiling for absent devices needs are used here alone.
"""

from __future__ import annotations

import json
import pathlib
import re
import resource
import sys
import time
from typing import Any

import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir

from shardtrain.mesh.build import device_grid
from shardtrain.mesh.target import Target
from shardtrain.plan.options import compile_with
from shardtrain.plan.topology import devices

_MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_temp")


def compile_module(folder: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    """Compile; the program goes to `program.txt`, memory and seconds are returned."""
    target = Target(request["target"])
    platform = target.platform
    grid = device_grid(request["mesh"], devices(target))
    backend = grid.flat[0].client
    assigned = xla_client.DeviceList(tuple(grid.flat))
    with jax_mlir.make_ir_context():
        module = ir.Module.parse((folder / "module.mlirbc").read_bytes())

        def compiled(wanted: dict[str, str | bool]) -> Any:
            options = compiler.get_compile_options(
                num_replicas=1,
                num_partitions=grid.size,
                device_assignment=np.array([[d.id for d in grid.flat]]),
                env_options_overrides=wanted,  # type: ignore[arg-type]
                backend=backend if platform == "cpu" else None,
            )
            if platform == "cpu":
                return compiler.backend_compile_and_load(backend, module, assigned, options, [])
            return backend.compile(module, executable_devices=assigned, compile_options=options)

        started = time.perf_counter(), time.process_time()
        executable = compile_with(compiled, request["options"], platform, target.family)
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    stats = executable.get_compiled_memory_stats()
    (folder / "program.txt").write_text(executable.hlo_modules()[0].to_string())
    memory = {f"{name}_size_in_bytes": getattr(stats, f"{name}_size_in_bytes") for name in _MEMORY}
    # Only the TPU compiler's peak is one: it counts the arguments, and buffers that do not live together once.
    if platform == "tpu":
        for name in ("peak_memory_in_bytes", "total_allocation_bytes"):
            memory[name] = getattr(stats, name, 0)
    return {
        "memory": memory,
        "wall_seconds": seconds[0],
        "cpu_seconds": seconds[1],
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def failure(error: Exception) -> dict[str, Any]:
    """What went wrong, with the numbers where memory ran out."""
    text = str(error)
    found = re.search(r"\(?([\d.]+)([MG])\)? exceeds available HBM \(?([\d.]+)([MG])\)?", text)
    if "RESOURCE_EXHAUSTED" in text and found:
        needed, unit, available, other = found.groups()
        scale = {"M": 2**20, "G": 2**30}
        return {
            "kind": "memory",
            "needed": float(needed) * scale[unit],
            "available": float(available) * scale[other],
            "message": text[:1000],
        }
    return {"kind": type(error).__name__, "message": text[:2000]}


def main(folder: pathlib.Path) -> int:
    """Always writes `result.json`; a compiler that dies leaves none."""
    request = json.loads((folder / "request.json").read_text())
    try:
        result = compile_module(folder, request)
    except Exception as error:  # whatever a compiler raises is the caller's to explain
        result = {"error": failure(error)}
    (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
