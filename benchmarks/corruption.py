"""Damage to every file of a checkpoint: is it seen, and is the step before it used? Prints JSON.

    python benchmarks/corruption.py [--faults 2000] [--restores 40] [--seed 0]

A small state is written twice, on eight simulated devices. Each fault hits one or two files of the newer step, chosen
evenly among all of them: one flipped bit, a truncation, a deletion, a range of zeros, two files swapped, a
file of the older step in place of the newer's. `verify` must find it. For every so many of them the newer step is
also restored by name, which must refuse, and the run started, which must go on from the older step, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

KINDS = ("flip", "truncate", "delete", "zero", "swap", "stale")


def fault(newer: Path, older: Path, rng: random.Random) -> tuple[str, str, dict[Path, bytes]]:
    """Damage the step `newer`; kind, file, and what was there before. Never a change that changes nothing."""
    names = sorted(f.relative_to(newer).as_posix() for f in newer.rglob("*") if f.is_file())
    while True:
        kind, name = rng.choice(KINDS), rng.choice(names)
        other = rng.choice(names)
        file = newer / name
        before = file.read_bytes()
        if kind == "flip" and before:
            at, bit = rng.randrange(len(before)), rng.randrange(8)
            file.write_bytes(before[:at] + bytes([before[at] ^ 1 << bit]) + before[at + 1 :])
        elif kind == "truncate" and before:
            os.truncate(file, rng.randrange(len(before)))
        elif kind == "delete":
            file.unlink()
        elif kind == "zero" and before:
            at = rng.randrange(len(before))
            end = min(len(before), at + rng.choice([1, 16, 512, 4096]))
            if not any(before[at:end]):
                continue
            file.write_bytes(before[:at] + bytes(end - at) + before[end:])
        elif kind == "swap" and (second := (newer / other).read_bytes()) != before:
            file.write_bytes(second)
            (newer / other).write_bytes(before)
            return kind, f"{name} and {other}", {file: before, newer / other: second}
        elif kind == "stale" and (older / name).is_file() and (older / name).read_bytes() != before:
            shutil.copyfile(older / name, file)
        else:
            continue
        return kind, name, {file: before}


def two_steps(place: Path) -> tuple[Any, dict[int, Any]]:
    """Steps 1 and 2 of a small run under `place`: the plan, and what each step holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import shardtrain as st

    model = (
        lambda key: {"w": jax.random.normal(key, (64, 64)), "v": jnp.ones(64)},
        lambda p, x: x @ p["w"] * p["v"],
    )
    plan = st.plan(
        model,
        lambda model, batch: jnp.square(model(batch["x"])).mean(),
        optax.adamw(1e-2),
        batch=st.batch_spec(x=(16, 64)),
        mesh=st.make_mesh(fsdp=8),
        annotations=st.annotate({"w": ("embed", "mlp")}),
    )
    step = plan.compile()
    batch = plan.put({"x": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)})
    held = {}
    with st.Checkpointer(place, every=1) as checkpointer:
        state = checkpointer.restore_or_init(plan, 0)
        for number in (1, 2):
            state, _ = step(state, batch)
            checkpointer.save(state)
            held[number] = jax.tree.map(np.asarray, state)
    return plan, held


def same(state: Any, held: Any) -> bool:
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(held), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def restored(plan: Any, place: Path, held: dict[int, Any]) -> str:
    """What became of a folder whose newest step is damaged: `older`, or what went wrong."""
    import shardtrain as st
    from shardtrain.errors import CheckpointError

    try:
        st.checkpoint.restore(place, plan, 2)
        return "restored the damaged step by name"
    except CheckpointError:
        pass
    with st.Checkpointer(place) as checkpointer:
        state = checkpointer.restore_or_init(plan, 0)
    if not same(state, held[1]):
        return "restored something else"
    return "older" if (place / "2.damaged").is_dir() else "not set aside"


def run(faults: int, restores: int, seed: int) -> dict[str, Any]:
    from shardtrain.checkpoint import verify

    rng = random.Random(seed)
    tried: collections.Counter[str] = collections.Counter()
    files: collections.Counter[str] = collections.Counter()
    missed, outcomes = [], collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        place, copy = Path(folder, "run"), Path(folder, "copy")
        plan, held = two_steps(place)
        assert all(entry["intact"] for entry in verify(place)["steps"])
        for number in range(faults):
            kind, name, before = fault(place / "2", place / "1", rng)
            tried[kind] += 1
            files[Path(name.split(" and ")[0]).name[:24]] += 1
            if verify(place, 2)["steps"][0]["intact"]:
                missed.append(f"{kind} of {name}")
            if restores and number % max(1, faults // restores) == 0:
                shutil.copytree(place, copy)
                outcomes[restored(plan, copy, held)] += 1
                shutil.rmtree(copy)
            for file, content in before.items():
                file.write_bytes(content)
        assert all(entry["intact"] for entry in verify(place)["steps"]), "an undo left damage"
    return {
        "faults": faults,
        "by_kind": dict(tried),
        "by_file": dict(files),
        "detected": faults - len(missed),
        "missed": missed,
        "restores": sum(outcomes.values()),
        "restored_older_bit_for_bit": outcomes["older"],
        "outcomes": dict(outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=2000)
    parser.add_argument("--restores", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    import logging

    import jax

    logging.getLogger("shardtrain").setLevel(logging.CRITICAL)
    found = run(options.faults, options.restores, options.seed)
    result = {
        "benchmark": "corruption",
        "formula": "detected = faults that `shardtrain.checkpoint.verify` finds; older = the step before was restored",
        "seed": options.seed,
        **found,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, local disk, simulated devices",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
