"""Faults as the TPU and GPU compilers show them: `python planted.py` compiles each for hardware that is not here and
stores the texts beside this file, with its lines. Needs the extras aot-tpu and aot-gpu; a change of lines here wants it
run again.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardtrain as st

HERE = pathlib.Path(__file__)
TARGETS = ("v5e:2x4", "h100:1x8")
ROWS, TIME, WIDTH = 64, 32, 512
MLP = {"up": ("embed", "mlp"), "out": ("mlp", "embed")}


def made(apply: Any, axes: Any, mesh: dict[str, int], rules: str, target: str, **more: Any) -> Any:
    shapes = more.pop("shapes", {"up": (WIDTH, WIDTH), "out": (WIDTH, WIDTH)})

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {n: jax.random.normal(key, shape) for n, shape in shapes.items()}

    return st.plan(
        (init, apply),
        lambda model, batch: jnp.square(model(batch["x"]).astype(jnp.float32)).mean(),
        optax.adam(1e-3),
        batch=st.batch_spec(x=(ROWS, TIME, WIDTH)),
        mesh=st.Target(target).mesh(**mesh),
        rules=rules,
        annotations=st.annotate(axes) if axes else None,
        **more,
    )


def mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(x.astype(p["up"].dtype) @ p["up"]) @ p["out"]


def wide(target: str, fault: bool) -> Any:
    """A float32 product that tensor sums, in a bf16 step."""

    def apply(p: Any, x: Any) -> Any:
        h = jnp.tanh(x.astype(p["up"].dtype) @ p["up"])
        dtype = jnp.float32 if fault else None
        return jnp.einsum("btf,fd->btd", h, p["out"], preferred_element_type=dtype)  # wide

    plan = made(apply, MLP, {"tensor": 8}, "tensor", target, precision="bf16")
    return plan.compile(target=target)


def split(target: str, fault: bool) -> Any:
    """q, k and v from one divided dim."""

    def fused(p: Any, x: Any) -> Any:
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)  # split
        return (jnp.tanh(q * k) * v) @ p["out"]

    def apart(p: Any, x: Any) -> Any:
        h = jnp.einsum("btd,dke->btke", x, p["qkv"])
        return (jnp.tanh(h[:, :, 0] * h[:, :, 1]) * h[:, :, 2]) @ p["out"]

    kernel = (WIDTH, 3 * WIDTH) if fault else (WIDTH, 3, WIDTH)
    axes = {"qkv": ("embed", "heads") if fault else ("embed", None, "heads"), "out": ("heads", "embed")}
    shapes = {"qkv": kernel, "out": (WIDTH, WIDTH)}
    plan = made(fused if fault else apart, axes, {"tensor": 8}, "tensor", target, shapes=shapes)
    return plan.compile(target=target)


def loop(target: str, fault: bool) -> Any:
    """Gradients of scanned layers reduced in each of four microbatches of a step of one's own; or left to the plan."""

    def layers(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["up"])[0]  # loop

    shapes = {"up": (4, WIDTH, WIDTH)}
    plan = made(layers, None, {"data": 8}, "data", target, microbatches=4, shapes=shapes)
    if not fault:
        return plan.compile(target=target)

    def step(state: Any, batch: Any) -> Any:
        rows = NamedSharding(plan.mesh, P(None, "data"))
        xs = jax.lax.with_sharding_constraint(batch["x"].reshape(4, ROWS // 4, TIME, WIDTH), rows)
        loss = lambda p, x: jnp.square(layers(p, x)).mean()
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        add = lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(state.params, x)), None)
        total = jax.lax.scan(add, zeros, xs)[0]
        return state.replace(params=jax.tree.map(lambda a, b: a - 0.1 * b, state.params, total))

    return plan.jit(step, target=target)


def kept(target: str, fault: bool) -> Any:
    """An all-reduce of which each device keeps a part, and one of which it needs all."""
    plan = made(mlp, None, {"data": 8}, "data", target)

    def local(g: Any) -> Any:
        total = jax.lax.psum(g, "data")  # kept
        n = g.shape[1] // 8
        return jax.lax.dynamic_slice_in_dim(total, jax.lax.axis_index("data") * n, n, 1) if fault else total

    def step(state: Any, batch: Any) -> Any:
        out = P(None, "data") if fault else P()
        mapped = jax.shard_map(local, mesh=plan.mesh, in_specs=P(), out_specs=out, check_vma=False)
        return mapped(state.params["up"][:, :128] * 2)

    return plan.jit(step, target=target)


CASES = {  # name -> how, kind, targets whose program shows it
    "wide": (wide, "wide-collective", TARGETS),
    "split": (split, "needless-permute", TARGETS),
    "loop": (loop, "reduced-in-loop", TARGETS),
    "hidden": (
        loop,
        "reduced-in-loop",
        TARGETS[:1],
    ),  # since the plan asks the TPU compiler for asynchronous all-reduces
    "kept": (kept, "scatter-would-do", TARGETS[:1]),  # on GPUs the compiler makes it a reduce-scatter itself
}


def place(name: str, target: str, fault: bool) -> pathlib.Path:
    return HERE.parent / f"{name}-{target.split(':')[0]}-{'fault' if fault else 'sound'}.json.gz"


def stored(step: Any) -> bytes:
    """What a compiler made, without this machine's paths."""
    program = step.executable
    text = re.sub(r'"/[^"\n]*/([^"/\n]+\.py)"', r'"/example/\1"', program.text)
    content = {
        "text": text,
        "memory": dict(program.memory),
        "stderr": program.stderr,
        "source": program.source,
    }
    return gzip.compress(json.dumps(content).encode(), 9, mtime=0)


def main(names: list[str]) -> None:
    for name, (how, kind, targets) in CASES.items():
        if names and name not in names:
            continue
        for target in targets:
            for fault in (True, False):
                step = how(target, fault)
                place(name, target, fault).write_bytes(stored(step))
                found = [f"{f.kind} {f.severity} {f.source}" for f in st.audit(step).findings]
                print(name, target, fault, kind, found, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
