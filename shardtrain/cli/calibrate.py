"""What this machine's devices reach, measured, for plan and search. Under a minute; nothing else should run meanwhile.

shardtrain calibrate --devices cpu:8 --out here.json
shardtrain plan configs/gpt.py:tiny --target cpu:8 --constants here.json

Products by dtype, memory, collectives at four sizes, and what it takes to start a program; each with the spread of its rounds or
the error of its fit. Where several processes were joined, between hosts too.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", default="auto", help="auto, gpu, tpu or cpu:N")
    parser.add_argument("--out", metavar="FILE", help="constants for --constants of plan and search (JSON)")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config.devices import start_devices

    shell.check_place(options.out, "--out")
    line = start_devices(options.devices)
    if line:
        shell.say(line)
    import jax

    from shardtrain.plan.calibrate import calibrate

    first = jax.process_index() == 0  # of several that were joined, all measure and one says what
    found = calibrate(jax.devices(), say=shell.say if first else lambda line: None)
    if not options.json and first:
        print(_text(found))
    if options.out is not None and first:
        shell.write(options.out, json.dumps(found.constants(), indent=1) + "\n", "--out")
        shell.say(f"written: shardtrain plan CONFIG --target {found.target} --constants {options.out}")
    return shell.DONE, {**found.as_json(), "file": options.out}


def _text(found: Any) -> str:
    from shardtrain.tree import table

    rows = [(f"products in {n}", f"{v.value / 1e9:,.1f} GFLOP/s", v.residual) for n, v in found.flops.items()]
    rows.append(("memory", f"{found.memory.value / 1e9:,.2f} GB/s", found.memory.residual))
    rows.append(("start of a program", f"{found.dispatch.value * 1e6:,.0f} µs", found.dispatch.residual))
    for s in found.sendings:
        reached = f"{s.fit.bandwidth / 1e9:,.2f} GB/s, {s.fit.hop_seconds * s.timings[0].hops * 1e6:,.0f} µs"
        rows.append((f"{s.op} {s.axis}, {s.devices} devices", reached, s.fit.residual))
    for axis, f in found.links.items():
        reached = f"{f.bandwidth / 1e9:,.2f} GB/s, {f.hop_seconds * 1e6:,.0f} µs a hop"
        rows.append((f"all of them {axis}, as plans take it", reached, f.residual))
    head = f"{found.target.size} x {found.kind}, {found.date}, each device while all work, in {found.seconds:.0f} s"
    return f"{head}\n{table(('what', 'reached', 'residual'), [(a, b, f'{r:.1%}') for a, b, r in rows])}"
