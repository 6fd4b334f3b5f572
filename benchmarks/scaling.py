"""Strong and weak scaling over processes and over simulated devices, in CPU seconds and bytes. Prints JSON.

    python benchmarks/scaling.py [--steps 6]

Wall time means nothing where all devices share the same cores; CPU seconds show the work that distributing
adds, and the compiled program shows what every device sends.

- `processes`: 1, 2 and 4 processes of equal parts of 4 devices in all, joined over loopback, data parallel.
  Strong: the same global batch. Every process checks that its loss equals that of the others.
- `devices`: 1, 2, 4, 8 simulated devices in one process, data, fsdp and tensor. Strong: the same global batch;
  weak: the same rows per device (data and fsdp).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from typing import Any

VOCAB, EMBED, HEADS, LAYERS, SEQUENCE, ROWS = 512, 128, 8, 4, 128, 32


def measure(sizes: dict[str, int], rows: int, steps: int) -> dict[str, Any]:
    """CPU seconds per step of this process (minimum over steps), and bytes, for one mesh."""
    import jax
    import numpy as np
    import optax

    import shardtrain as st
    from shardtrain.models import GPTConfig, build_model, language_model_loss

    config = GPTConfig(vocab=VOCAB, sequence=SEQUENCE, embed=EMBED, layers=LAYERS, heads=HEADS)
    shape = (rows, SEQUENCE)
    count = int(np.prod(list(sizes.values())))
    plan = st.plan(
        lambda rngs: build_model(config, rngs),
        language_model_loss,
        optax.adamw(1e-3),
        batch=st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape),
        mesh=st.make_mesh(devices=jax.devices()[:count], **sizes),
    )
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, SEQUENCE + 1))[plan.rows]
    ones = np.ones((len(plan.rows), SEQUENCE), np.float32)
    batch = plan.put(
        {"tokens": tokens[:, :-1].astype("i"), "targets": tokens[:, 1:].astype("i"), "weights": ones}
    )
    step, state = plan.compile(), plan.init(0)
    seconds, losses = [], []
    for _ in range(steps + 1):
        start = time.process_time()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.process_time() - start)
    return {
        "mesh": sizes,
        "global_batch": rows,
        "cpu_seconds": min(seconds[1:]),
        "sent_bytes_per_device": step.collectives().wire_bytes,
        "temporaries_per_device": step.memory()["temporaries"],
        "first_losses": losses[:3],
    }


def in_processes(count: int, steps: int) -> dict[str, Any]:
    """`count` processes of 4 / count devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for index in range(count):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, __file__, "--worker", "--steps", str(steps)]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    results = [json.loads(w.communicate(timeout=600)[0].strip().splitlines()[-1]) for w in workers]
    assert all(r["first_losses"] == results[0]["first_losses"] for r in results), "processes disagree"
    return {
        "processes": count,
        **results[0],
        "cpu_seconds": sum(r["cpu_seconds"] for r in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.worker:
        import shardtrain as st

        st.init_distributed()
        print(json.dumps(measure({"data": 4}, ROWS, options.steps)))
        return
    processes = [in_processes(n, options.steps) for n in (1, 2, 4)]
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax

    devices = []
    for axis in ("data", "fsdp", "tensor"):
        for count in (1, 2, 4, 8):
            devices.append({"kind": "strong", **measure({axis: count}, ROWS, options.steps)})
            if axis != "tensor":
                devices.append({"kind": "weak", **measure({axis: count}, 4 * count, options.steps)})
    one = {d["kind"]: d["cpu_seconds"] / d["global_batch"] for d in devices if d["mesh"] == {"data": 1}}
    for d in devices:
        d["cpu_per_row_against_one_device"] = d["cpu_seconds"] / d["global_batch"] / one[d["kind"]]
    for p in processes:
        p["cpu_against_one_process"] = p["cpu_seconds"] / processes[0]["cpu_seconds"]
    result = {
        "benchmark": "scaling",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, simulated devices",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "dtype": "float32",
        "shapes": {"layers": LAYERS, "embed": EMBED, "heads": HEADS, "vocab": VOCAB, "sequence": SEQUENCE},
        "formula": "cpu_seconds: minimum over steps of process_time, added up over processes; "
        "sent_bytes_per_device: ring wire bytes of all collectives of the compiled step",
        "processes": processes,
        "devices": devices,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
