"""What shardtrain's step costs beyond the same step written by hand in bare JAX. Prints JSON.

    python benchmarks/overhead.py [--rounds 12]

Two parts, both alternating within one process, so that a noisy machine hits both sides alike:

- `dispatch`: host CPU time (`time.thread_time`) of calling the step, for 10, 100 and 1,000 leaves; median
  of the per-round ratios, on new buffers in each. `ratio_same_program` is against a bare call of the very
  same jitted function over the same flat leaves: what our objects around it cost. `ratio` is against the
  same update written by hand, whose program is another one (small programs run partly on the calling
  thread, so this compares arithmetic too).
- `step`: wall and CPU seconds of a whole training step of a small decoder (scan over layers, AdamW,
  clipping), on several meshes, in rounds of ours / bare / bare again. `ratio_wall` is the median of
  the per-round ratios ours / bare, `control_wall` that of bare again / bare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import shardtrain as st

VOCAB, EMBED, HEADS, LAYERS, ROWS, SEQUENCE = 512, 256, 8, 4, 32, 128


def init(key: jax.Array) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * 0.02
    return {
        "table": draw(VOCAB, EMBED),
        "layers": {
            "qkv": draw(LAYERS, EMBED, 3, HEADS, EMBED // HEADS),
            "out": draw(LAYERS, HEADS, EMBED // HEADS, EMBED),
            "up": draw(LAYERS, EMBED, 4 * EMBED),
            "down": draw(LAYERS, 4 * EMBED, EMBED),
            "scale": jnp.ones((LAYERS, 2, EMBED)),
        },
    }


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def apply(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["table"][tokens]

    def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        w = st.gather(w, "layers")
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", norm(x, w["scale"][0]), w["qkv"]), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, w["out"])
        return x + jax.nn.gelu(norm(x, w["scale"][1]) @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(block, x, params["layers"])
    return x @ params["table"].T


def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def ours_loss(model: Any, batch: Any) -> st.Loss:
    each = loss(model(batch["tokens"]), batch["targets"])
    return st.Loss(each.sum(), jnp.float32(each.size))


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))


def bare_step(plan: st.Plan) -> Callable[..., Any]:
    """By hand: one jit over flat leaves, donated, with the plan's own shardings."""
    abstract = plan.abstract_state
    structure = jax.tree.structure((abstract.params, abstract.opt_state))
    leaves = jax.tree.leaves((abstract.params, abstract.opt_state))
    shardings = tuple(leaf.sharding for leaf in leaves)
    whole = NamedSharding(plan.mesh, PartitionSpec())

    def step(tokens: jax.Array, targets: jax.Array, *flat: jax.Array) -> Any:
        params, opt_state = jax.tree.unflatten(structure, flat)
        value, grads = jax.value_and_grad(lambda p: loss(apply(p, tokens), targets).mean())(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics = (value, optax.global_norm(grads), optax.global_norm(params))
        return tuple(jax.tree.leaves((params, opt_state))), metrics

    return jax.jit(
        step,
        in_shardings=(plan.batch_sharding,) * 2 + shardings,
        out_shardings=(shardings, whole),
        donate_argnums=tuple(range(2, 2 + len(leaves))),
    )


def timed(call: Callable[[], Any], steps: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def steps(sizes: dict[str, int], rounds: int, inner: int = 3) -> dict[str, Any]:
    count = int(np.prod(list(sizes.values())))
    mesh = st.make_mesh(devices=jax.devices()[:count], **sizes)
    shape = ((ROWS, SEQUENCE), "int32")
    plan = st.plan(
        (init, apply),
        ours_loss,
        OPTIMIZER,
        batch=st.batch_spec(tokens=shape, targets=shape),
        mesh=mesh,
        annotations={
            "table": ("vocab", "embed"),
            "layers/qkv": ("layers", "embed", None, "heads", "head_dim"),
            "layers/out": ("layers", "heads", "head_dim", "embed"),
            "layers/up": ("layers", "embed", "mlp"),
            "layers/down": ("layers", "mlp", "embed"),
        },
    )
    generator = np.random.default_rng(0)
    batch = {k: generator.integers(0, VOCAB, (ROWS, SEQUENCE), np.int32) for k in ("tokens", "targets")}
    device_batch = plan.put(batch)
    step = plan.compile()
    mine = [plan.init(0)]

    def ours() -> Any:
        mine[0], metrics = step(mine[0], device_batch)
        return metrics

    bare = bare_step(plan)

    def make_bare() -> Callable[[], Any]:
        state = plan.init(0)
        flat = [tuple(jax.tree.leaves((state.params, state.opt_state)))]

        def call() -> Any:
            flat[0], metrics = bare(device_batch["tokens"], device_batch["targets"], *flat[0])
            return metrics

        return call

    first, second = make_bare(), make_bare()
    sides = {"ours": ours, "bare": first, "again": second}
    for call in sides.values():
        timed(call, 2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            times[name].append(timed(sides[name], inner))
    ratio = lambda name, index: statistics.median(
        a[index] / b[index] for a, b in zip(times[name], times["bare"], strict=True)
    )
    return {
        "mesh": sizes,
        "bare_wall_seconds": statistics.median(t[0] for t in times["bare"]),
        "ratio_wall": ratio("ours", 0),
        "control_wall": ratio("again", 0),
        "ratio_cpu": ratio("ours", 1),
        "control_cpu": ratio("again", 1),
        "loss_difference": abs(float(ours()["loss"]) - float(first()[0])),
    }


def dispatch(leaves: int, devices: int, rounds: int) -> dict[str, Any]:
    mesh = st.make_mesh(devices=jax.devices()[:devices], data=devices)
    count = max(1, (leaves - 5) // 1)
    plan = st.plan(
        (
            lambda key: {f"w{i}": jnp.ones((8,)) for i in range(count)},
            lambda p, x: sum(p.values()).sum() + x.sum(),
        ),
        lambda model, batch: model(batch["x"]),
        optax.sgd(1e-3),
        batch=st.batch_spec(x=(8,)),
        mesh=mesh,
        rules=st.rules.data,
    )
    step = plan.compile()
    batch = plan.put({"x": np.zeros(8, np.float32)})
    start = plan.init(0)
    shardings = tuple(x.sharding for x in start.leaves)
    abstract = plan.abstract_state
    whole = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.sgd(1e-3)

    def by_hand_step(*leaves: jax.Array) -> Any:
        state, x = jax.tree.unflatten(jax.tree.structure(abstract), leaves[:-1]), leaves[-1]
        value, grads = jax.value_and_grad(lambda p: sum(p.values()).sum() + x.sum())(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, cursor=state.cursor + 8)
        return new.leaves, (value, optax.global_norm(grads), optax.global_norm(params), jnp.float32(8))

    bare = jax.jit(
        by_hand_step,
        in_shardings=(*shardings, plan.batch_sharding),
        out_shardings=(shardings, whole),
        donate_argnums=tuple(range(len(start.leaves))),
    )

    def ours(state: Any, times: int) -> None:
        for _ in range(times):
            state, _ = step(state, batch)

    def over(call: Callable[..., Any]) -> Callable[[Any, int], None]:
        def repeat(state: Any, times: int) -> None:
            flat = state.leaves
            for _ in range(times):
                flat, _ = call(*flat, batch["x"])

        return repeat

    def measure(call: Callable[[Any, int], None], inner: int) -> float:
        # Donated buffers stay where they are: without new ones, one unlucky placement in memory would be
        # measured in every round.
        state = jax.tree.map(jnp.copy, start)
        jax.block_until_ready(state.leaves)
        begin = time.thread_time()
        call(state, inner)
        return (time.thread_time() - begin) / inner

    inner = 20 if leaves < 1000 else 10
    calls = {"ours": ours, "same": over(step._jitted), "bare": over(bare), "again": over(bare)}
    for call in calls.values():
        measure(call, 3)
    sides: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 else reversed(calls):
            sides[name].append(measure(calls[name], inner))
    count, middle = len(start.leaves), {name: statistics.median(values) for name, values in sides.items()}
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(sides[a], sides[b], strict=True))
    return {
        "leaves": count,
        "devices": devices,
        "ours_microseconds_per_leaf": middle["ours"] / count * 1e6,
        "bare_microseconds_per_leaf": middle["bare"] / count * 1e6,
        "ratio": ratio("ours", "bare"),
        "ratio_same_program": ratio("ours", "same"),
        "control": ratio("again", "bare"),
    }


def told(measured: dict[str, Any]) -> dict[str, Any]:
    """A long run says on stderr how far it is."""
    print(json.dumps(measured), file=sys.stderr, flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=["dispatch", "step"])
    arguments = parser.parse_args()
    rounds, parts = arguments.rounds, [arguments.only] if arguments.only else ["dispatch", "step"]
    meshes: list[dict[str, int]] = [
        {"data": 1},
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ]
    result = {
        "benchmark": "overhead",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, simulated devices",
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "python": platform.python_version()},
        "dtype": "float32",
        "shapes": {
            "layers": LAYERS,
            "embed": EMBED,
            "heads": HEADS,
            "vocab": VOCAB,
            "rows": ROWS,
            "sequence": SEQUENCE,
        },
        "formula": "step: median over rounds of ours/bare; dispatch: median over rounds of ours / the other",
        "dispatch": [told(dispatch(n, d, 5 * rounds)) for n in (10, 100, 1000) for d in (1, 8)]
        if "dispatch" in parts
        else [],
        "step": [told(steps(sizes, rounds)) for sizes in meshes] if "step" in parts else [],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
