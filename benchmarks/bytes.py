"""What each layout sends on hardware that is not here, against the least it has to send. Prints JSON.

    python benchmarks/bytes.py                        every case that is not in the results yet
    python benchmarks/bytes.py --only h100 --again    those cases anew
    python benchmarks/bytes.py --draw                 table and picture from the results alone

Needs the extras `aot-tpu` and `aot-gpu`. A case is a model, a layout and a target; its step is compiled by the
target's own compiler (default options of `plan.compile`) and every collective of the program is counted:

    ratio = wire bytes per device and step / minimum of the layout (shardtrain/plan/minimum.py)

`alone` is the same model, state shardings and microbatches with everything left to the partitioner: plain
`value_and_grad` of the whole batch under `jit`, held against the minimum with bf16 gradients, in which plain JAX
reduces them. Precision bf16: bf16 on the wire; ours reduces gradients in float32. Results go to
`benchmarks/results/bytes.json` after every case; a table and a picture stand beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import html
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from other_models import Sizes
from other_models import loss as other_loss
from other_models import model as other_model

import shardtrain as st
from shardtrain.errors import CompileError
from shardtrain.models import GPTConfig, LlamaConfig, MoEConfig, build_model, language_model_loss
from shardtrain.plan.compiled import Compiled
from shardtrain.plan.minimum import minimum

RESULTS = pathlib.Path(__file__).parent / "results"
SIZES = Sizes(vocab=32768, embed=4096, heads=32, mlp=16384, layers=2, sequence=1024)
ROWS = 2  # of the global batch, per device
TARGETS = ("v5e:2x4", "v5e:4x4", "2*v5e:2x4", "h100:1x8", "h100:2x8")


class Layout(NamedTuple):
    """`sizes`: mesh axes as shares of the devices: 0 is the rest. `slices`: also divided over dcn."""

    rules: str
    sizes: dict[str, int]
    microbatches: int = 1
    slices: bool = False
    attention: str = "ring"
    layers: int = SIZES.layers


LAYOUTS: dict[str, Layout] = {
    "data": Layout("data", {"data": 0}),
    "data, 8 microbatches": Layout("data", {"data": 0}, 8),
    "zero1": Layout("zero1", {"data": 0}),
    "zero1, 8 microbatches": Layout("zero1", {"data": 0}, 8),
    "fsdp": Layout("fsdp", {"fsdp": 0}),
    "tensor": Layout("tensor", {"tensor": 0}),
    "tensor_sequence": Layout("tensor_sequence", {"tensor": 0}),
    "data x fsdp": Layout("fsdp", {"data": 2, "fsdp": 0}),
    "data x tensor": Layout("tensor", {"data": 2, "tensor": 0}),
    "zero1 x tensor": Layout("zero1_tensor", {"data": 2, "tensor": 0}),
    "fsdp x tensor": Layout("fsdp_tensor", {"fsdp": 2, "tensor": 0}),
    "fsdp x tensor_sequence": Layout("fsdp_tensor_sequence", {"fsdp": 2, "tensor": 0}),
    "data x fsdp x tensor": Layout("fsdp_tensor", {"data": 2, "fsdp": 2, "tensor": 0}),
    "context, ring": Layout("fsdp_tensor", {"context": 0}),
    "context, gather": Layout("fsdp_tensor", {"context": 0}, attention="gather"),
    "context, ulysses": Layout("fsdp_tensor", {"context": 0}, attention="ulysses"),
    "data x context": Layout("fsdp_tensor", {"data": 2, "context": 0}),
    "fsdp x context x tensor": Layout("fsdp_tensor", {"fsdp": 2, "context": 0, "tensor": 2}),
    "expert": Layout("fsdp_tensor", {"expert": 0}),
    "data x expert": Layout("fsdp_tensor", {"data": 2, "expert": 0}),
    "fsdp x expert x tensor": Layout("fsdp_tensor", {"fsdp": 2, "expert": 0, "tensor": 2}),
    "pipeline": Layout("data", {"stage": 0}, 8, layers=8),
    "data x pipeline": Layout("data", {"stage": 2, "data": 0}, 4),
    # Two layers a stage: of one, the compiler merges the gather of the forward that is run again with the backward's.
    "fsdp x pipeline": Layout("fsdp_tensor", {"stage": 2, "fsdp": 0}, 4, layers=4),
    "fsdp x pipeline x tensor": Layout("fsdp_tensor", {"stage": 2, "fsdp": 0, "tensor": 2}, 4, layers=4),
    "slice x data": Layout("data", {"data": 0}, slices=True),
    "slice x zero1": Layout("zero1", {"data": 0}, slices=True),
    "slice x fsdp": Layout("fsdp", {"fsdp": 0}, slices=True),
    "slice x fsdp x tensor": Layout("fsdp_tensor", {"fsdp": 2, "tensor": 0}, slices=True),
}
SMALL_ONLY = ("data, 8 microbatches", "zero1, 8 microbatches", "data x tensor", "zero1 x tensor")  # 8 devices
NEW = "context", "expert", "stage"  # on eight TPU chips, and for what has experts
OTHERS = ("data", "zero1", "fsdp", "tensor", "fsdp x tensor")  # of models that are not ours
ALONE = ("data", "data, 8 microbatches", "zero1", "fsdp", "tensor", "fsdp x tensor")


class Case(NamedTuple):
    target: str
    model: str
    layout: str
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.target} | {self.model} | {self.layout}{' | alone' if self.alone else ''}"


def cases() -> list[Case]:
    found = []
    for target in TARGETS:
        slices = target.startswith(("2*", "h100:2"))
        for name, layout in LAYOUTS.items():
            if (layout.slices and not slices) or (target.startswith("2*") and not layout.slices):
                continue
            if name in SMALL_ONLY and target not in ("v5e:2x4", "h100:1x8"):
                continue
            if any(axis in layout.sizes for axis in NEW) and target != "v5e:2x4":
                continue
            if "expert" in layout.sizes:
                found.append(Case(target, "moe", name))
                continue
            if "stage" in layout.sizes:
                found.append(Case(target, "gpt", name))
                continue
            found += [Case(target, model, name) for model in ("gpt", "llama")]
            if name in OTHERS and (target in ("v5e:2x4", "h100:1x8") or name == "fsdp"):
                found += [Case(target, model, name) for model in ("nnx", "linen")]
            if name in ALONE and target in ("v5e:2x4", "h100:1x8"):
                found.append(Case(target, "gpt", name, True))
    return found


def planned(case: Case) -> tuple[st.Target, st.Plan]:
    target, layout, c = st.Target(case.target), LAYOUTS[case.layout], SIZES
    inside = target.size // (2 if layout.slices else 1)
    fixed = 1
    for n in layout.sizes.values():
        fixed *= n or 1
    sizes = {axis: n or inside // fixed for axis, n in layout.sizes.items()}
    shape = (ROWS * target.size * layout.microbatches, c.sequence)
    batch = st.batch_spec(tokens=(shape, "int32"), targets=(shape, "int32"), weights=shape)
    annotations: Any = None
    if case.model == "gpt":
        config: Any = GPTConfig(c.vocab, c.sequence, c.embed, layout.layers, c.heads, c.mlp, remat="dots")
    if case.model == "llama":
        config = LlamaConfig(c.vocab, c.sequence, c.embed, c.layers, c.heads, 16, 0, 12288, remat="dots")
    if case.model == "moe":  # each expert an eighth of an MLP, so that all of them are as large as one
        config = MoEConfig(
            c.vocab, c.sequence, c.embed, c.layers, c.heads, 16, experts=16, expert_mlp=2048, remat="dots"
        )
    model: Any = lambda rngs: build_model(config, rngs)
    if case.model in ("nnx", "linen"):
        model, axes = other_model(case.model, c)
        # Names of dims for the rules that need some.
        annotations = st.annotate(axes) if "tensor" in layout.rules else None
    return target, st.plan(
        model,
        other_loss if case.model in ("nnx", "linen") else language_model_loss,
        optax.adamw(3e-4),
        batch=batch,
        mesh=target.mesh(dcn={"data": 2} if layout.slices else None, **sizes),
        rules=layout.rules,
        attention=layout.attention,
        microbatches=layout.microbatches,
        precision="bf16",
        reduce_dtype=jnp.bfloat16 if case.alone else jnp.float32,  # what plain JAX reduces gradients in
        annotations=annotations,
    )


def alone(plan: st.Plan, state: Any, batch: Any) -> Any:
    """The step as one writes it without us: the partitioner decides what is sent."""

    def objective(params: Any, rows: Any) -> Any:
        cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        loss = plan.loss_fn(plan.adapter.bind(cast, {}, jax.random.key(0), True), rows, None)
        return loss.sum / loss.weight

    count = plan.microbatches
    if count == 1:
        grads = jax.grad(objective)(state.params, batch)
    else:
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0), batch
        )
        add = lambda total, rows: (
            jax.tree.map(jnp.add, total, jax.grad(objective)(state.params, rows)),
            None,
        )
        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), parts)
    updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
    return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def measure(case: Case) -> dict[str, Any]:
    target, plan = planned(case)
    row: dict[str, Any] = {**case._asdict(), "mesh": dict(plan.mesh.shape), "rules": plan.rules.name}
    row |= {"microbatches": plan.microbatches, "parameters": plan.parameter_count}
    try:
        if case.alone:
            there = plan.on(target.mesh(**plan.mesh.shape))
            step: Any = Compiled(there, lambda s, b: alone(there, s, b), donate=True, target=target)
        else:
            step = plan.compile(target=target)
        found, least = st.audit(step), minimum(step.plan)
    except CompileError as error:
        return {**row, "error": str(error)}
    return {
        **row,
        "bytes": round(found.bytes),
        "minimum": round(least.bytes),
        "ratio": round(found.bytes / least.bytes, 4),
        "async_share": round(found.async_share, 4) if found.async_share is not None else None,
        "collectives": {
            f"{op} over {axis}": [count, round(wire)]
            for (op, axis), (count, wire) in sorted(found.collectives.by_axis().items())
        },
        "findings": sorted({f"{f.severity}: {f.kind}: {f.path}" for f in found.findings}),
        "peak_memory": found.memory["peak"],
        "program_lines": found.lines,
        "flops": found.flops,
        "compile_cpu_seconds": round(step.executable.cpu_seconds, 1),
        "source": found.source,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a layout, a column a target. GPT / Llama with alone in brackets, then nnx / linen, and experts."""
    values = {(r["target"], r["model"], r["layout"], r["alone"]): r.get("ratio") for r in rows}
    lines = []
    kinds = (("GPT / Llama", ("gpt", "llama")), ("nnx / linen", ("nnx", "linen")), ("experts", ("moe",)))
    for title, models in kinds:
        targets = [t for t in TARGETS if any(k[0] == t and k[1] in models for k in values)]
        lines += [f"| {title} | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
        for layout in LAYOUTS:
            cells = []
            for target in targets:
                ours = [values.get((target, model, layout, False)) for model in models]
                bare = values.get((target, models[0], layout, True))
                cells.append(" / ".join(f"{v:.3f}" for v in ours if v) + (f" ({bare:.2f})" if bare else ""))
            if any(cells):
                lines.append(f"| {layout} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).strip()


def picture(rows: list[dict[str, Any]]) -> str:
    """Bytes over the minimum, on a log scale: propagation alone, and ours, per layout and target."""
    import math

    values = {(r["target"], r["layout"], r["alone"]): r.get("ratio") for r in rows if r["model"] == "gpt"}
    targets = [t for t in TARGETS if any(k[0] == t and k[2] for k in values)]
    left, width, parts, y = 170, 520, [], 54
    most = max([v for v in values.values() if v] + [2.0])
    at = lambda v: left + width * max(0.0, math.log(v)) / math.log(most * 1.1)
    for target in targets:
        parts.append(f'<text x="12" y="{y}" font-weight="600">{html.escape(target)}</text>')
        y += 12
        for layout in ALONE:
            for bare, color in ((True, "#c2410c"), (False, "#2563eb")):
                value = values.get((target, layout, bare))
                if not value:
                    continue
                if bare:
                    parts.append(f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{layout}</text>')
                top = y + (0 if bare else 13)
                bar = f'x="{left}" y="{top}" width="{max(2.0, at(value) - left):.1f}" height="11"'
                parts.append(f'<rect {bar} fill="{color}" rx="2"/>')
                parts.append(
                    f'<text x="{max(at(value), left + 2) + 6:.1f}" y="{top + 10}" class="v">{value:.2f}</text>'
                )
            y += 34
        y += 22
    legend = (
        "orange: propagation alone, blue: shardtrain; bytes sent / least bytes of the layout, log scale, GPT"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" height="{y + 16}" '
        'font-family="system-ui, sans-serif" font-size="13" style="background:#fff">'
        "<style>.v{font-size:11px;fill:#475569}</style>"
        '<text x="12" y="24" font-size="15" font-weight="600">What a step sends, over what it must</text>'
        f'{"".join(parts)}<text x="12" y="{y + 4}" class="v">{legend}</text></svg>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it (words, all of them)")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=1, help="compilers at once")
    options = parser.parse_args()
    file = RESULTS / "bytes.json"
    kept: dict[str, Any] = json.loads(file.read_text())["cases"] if file.is_file() else {}
    words = options.only.split()
    names = {case.name: case for case in cases()}
    kept = {name: row for name, row in kept.items() if name in names}
    todo = [c for n, c in names.items() if all(w in n for w in words) and (options.again or n not in kept)]

    def one(case: Case) -> None:
        started = time.monotonic()
        kept[case.name] = row = measure(case)
        save(file, {n: kept[n] for n in names if n in kept})
        seconds = time.monotonic() - started
        said = row.get("ratio") or row.get("error", "")[:80]
        print(f"{seconds:6.1f} s  {case.name}: {said} {row.get('findings', '')}", file=sys.stderr, flush=True)

    if not options.draw:
        with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
            list(pool.map(one, todo))
    rows = [kept[n] for n in names if n in kept]
    (RESULTS / "bytes.svg").write_text(picture(rows))
    (RESULTS / "bytes.md").write_text(table(rows) + "\n")
    print(json.dumps({"cases": {n: kept[n] for n in names if n in kept}}))


def save(file: pathlib.Path, kept: dict[str, Any]) -> None:
    shapes = {**SIZES._asdict()} if hasattr(SIZES, "_asdict") else vars(SIZES)
    content = {
        "formula": "ratio = wire bytes per device and step / minimum of the layout",
        "dtype": "bf16 weights and activations on the wire, float32 reduction of gradients",
        "shapes": {**shapes, "rows_per_device": ROWS},
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "hardware": "compiled without devices; see the source of each case",
        "cases": kept,
    }
    staged = file.with_suffix(".new")
    staged.write_text(json.dumps(content, indent=1) + "\n")
    staged.replace(file)


if __name__ == "__main__":
    main()
