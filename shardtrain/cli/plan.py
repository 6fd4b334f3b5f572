"""Where every array of a config lives, what each device holds and sends. Nothing is trained or allocated.

shardtrain plan configs/gpt.py:tiny --mesh.tensor 8
shardtrain plan configs/llama.py:b8 --target h100:8x8 --price 2.5
shardtrain plan configs/llama.py:b8 --target h100:1x8,h100:2x8,h100:4x8
shardtrain plan configs/llama.py:b8 --target h100:8x8 --html plan.html

Without a target the step is compiled for the devices that the config asks for. With one it is partitioned on paper for
hardware that need not be here: memory, FLOPs, bytes, predicted seconds; and compiled by the target's compiler where
that is installed (--compile no leaves it). Several targets make a table of scaling. Exit code 1 where it does not fit.
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell
from shardtrain.errors import ConfigError, suggestion

LEVELS = ("no", "fast", "full")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.add_argument("--target", help="hardware, present or not: v5e:16x16, h100:8x8; several with commas")
    parser.add_argument(
        "--compile", default="fast", help="by the target's compiler: no, fast (default) or full"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for that compiler")
    parser.add_argument("--price", type=float, help="of a device and hour, for the cost of a billion tokens")
    parser.add_argument(
        "--constants", metavar="FILE", help="measured constants in place of assumed ones (JSON)"
    )
    parser.add_argument("--html", metavar="FILE", help="the same as one page: placement, memory, seconds")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    if options.compile not in LEVELS:
        raise ConfigError(
            f"'{options.compile}'", where="--compile", fix=suggestion(options.compile, LEVELS, "fast")
        )
    for flag, value in (("--price", options.price), ("--timeout", options.timeout)):
        if value is not None and not value > 0:
            raise ConfigError(f"{value}", where=flag, fix="a number over 0")
    shell.check_place(options.html, "--html")
    code, found = _found(options)
    if options.html is not None:
        from shardtrain.plan.picture import page

        shell.write(options.html, page(found, f"shardtrain plan {options.config}"), "--html")
        shell.say(f"written: {options.html}")
    return code, found


def _found(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    if options.target is None:
        if options.price is not None or options.constants is not None:
            raise ConfigError("no target", where="--price, --constants", fix="--target h100:8x8")
        return _here(options)
    return _there(options, [t for t in options.target.split(",") if t.strip()])


def _there(options: argparse.Namespace, targets: list[str]) -> tuple[int, dict[str, Any]]:
    from shardtrain.config.planning import forecasts, ways_to_fit
    from shardtrain.plan.cost import Constants

    if not targets:
        raise ConfigError("no target", where="--target", fix="--target h100:8x8")
    results, weak, code = [], [], shell.DONE
    for config, made, found, notes in forecasts(
        options.config, options.overrides, targets, options.constants, options.compile, options.timeout
    ):
        for note in notes:
            shell.say(note)
        ways = []
        if found.fits is False:
            code = shell.FOUND
            shares = Constants.of(found.target, options.constants)
            ways = ways_to_fit(
                config, found.target, shares, found, compile=options.compile, timeout=options.timeout
            )
        result = {
            **found.as_json(),
            "pipeline": _pipeline(made),
            "layout": made.describe()["tree"],
            "ways_to_fit": [way.as_json() for way in ways],
        }
        if options.price is not None:
            result["price_per_billion_tokens"] = found.price_per_billion(options.price)
        results.append(result)
        weak.append(
            _weak(config, found, results[0]["target"], options.constants) if len(targets) > 1 else None
        )
        if not options.json:
            if len(targets) == 1:
                print(f"{made}\n")
            print(found)
            if options.price is not None and result["price_per_billion_tokens"]:
                print(f"a billion tokens cost {result['price_per_billion_tokens']:,.2f}")
            for way in ways:
                print(f"{'to make it fit' if way.forecast.fits else _NONE}: {way.change}: {_way(way)}")
            print()
    if len(results) == 1:
        return code, results[0]
    scaling = _scaling(results, weak)
    if not options.json:
        from shardtrain.tree import table

        shown = [
            (r["target"], str(r["devices"]), *(f"{r[k]:,.4g}" if r[k] else "-" for k in _SCALING))
            for r in scaling
        ]
        print(table(("target", "devices", "step s", "tokens/s", "MFU", "strong", "weak"), shown))
        print(
            "strong: tokens/s per device against the first target. weak: the same at the first target's rows a device"
        )
    return code, {"targets": results, "scaling": scaling}


_NONE = "no one or two changes of layout make it fit: more devices, or another model; nearest"
_SCALING = ("step_seconds", "tokens_per_second", "mfu", "strong", "weak")


def _weak(config: Any, found: Any, first: str, constants: str | None) -> float | None:
    """Tokens per second and device with the first target's rows a device, on paper; None where they do not divide."""
    import dataclasses

    from shardtrain.config.planning import forecast_config
    from shardtrain.errors import ShardTrainError
    from shardtrain.mesh import Target
    from shardtrain.plan.cost import Constants

    rows, rest = divmod(config.global_batch * found.target.size, Target(first).size)
    if rest or not rows:
        return None
    grown = dataclasses.replace(config, global_batch=rows)
    try:
        _, seen = forecast_config(grown, found.target, Constants.of(found.target, constants))
    except ShardTrainError:
        return None
    return seen.tokens_per_second / found.target.size if seen.tokens_per_second else None


def _scaling(results: list[dict[str, Any]], weak: list[float | None]) -> list[dict[str, Any]]:
    """Tokens per second and device against the first target: strong scaling, of one global batch."""
    rows = []
    for r in results:
        devices, speed = 1, r["tokens_per_second"]
        for n in r["mesh"].values():
            devices *= n
        rows.append(
            {
                "target": r["target"],
                "devices": devices,
                "step_seconds": r["step_seconds"]["total"] if r["step_seconds"] else None,
                "tokens_per_second": speed,
                "mfu": r["mfu"],
                "per_device": speed / devices if speed else None,
                "fits": r["fits"],
            }
        )
    first = rows[0]["per_device"]
    for row, grown in zip(rows, weak, strict=True):
        row["strong"] = row["per_device"] / first if first and row["per_device"] else None
        row["weak"] = grown / first if first and grown else None
    return rows


def _way(way: Any) -> str:
    from shardtrain.tree import bytes_text

    more = "" if way.costs is None else f" ({way.costs:+.3g})"
    seconds = f", step {way.forecast.seconds:.4g} s{more}" if way.forecast.seconds else ""
    saved = f" ({bytes_text(way.saves)} less)" if way.saves > 0 else ""
    return f"{bytes_text(way.forecast.bill.peak)}{saved}{seconds}, {way.forecast.source}"


def _here(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config import resolve
    from shardtrain.config.devices import start_devices

    config, notes = resolve(options.config, options.overrides)
    line = start_devices(config.devices)
    for note in [*notes, *([line] if line else [])]:
        shell.say(note)

    from shardtrain.config.build import build, make_plan
    from shardtrain.mesh import Target, chip_of
    from shardtrain.plan.bill import bill
    from shardtrain.plan.layout import placement

    pieces = build(config)
    made = make_plan(config, pieces)
    step = made.compile()
    memory, collectives = step.memory(), step.collectives()
    device = made.mesh.devices.flat[0]
    chip = chip_of(device)
    name = chip.name if chip else device.platform
    source = f"counted in the program compiled by XLA for {device.platform}"
    if not options.json:
        print(made)
        print(f"\n{memory}\n\n{collectives}\n\nmemory and collectives: {source}")
        if made.pipeline is not None:
            print(
                f"\n{made.pipeline.timeline()}\n\non paper: a backward is a forward again and as much for each of its halves"
            )
    held = bill(made, Target(f"cpu:{made.mesh.size}"), None, source)
    flops = pieces.flops_per_row * made.global_batch if pieces.flops_per_row else None
    return shell.DONE, {
        "target": f"{name}:{made.mesh.size}",
        "mesh": dict(made.mesh.shape),
        "rules": made.rules.name,
        "groups": made.groups,
        "pipeline": _pipeline(made),
        "parameters": made.parameter_count,
        "fits": memory["peak"] <= chip.hbm_bytes if chip else None,
        "memory": {
            **{part: getattr(held, part) for part in ("parameters", "optimizer", "other", "batch", "held")},
            "arguments": memory["arguments"],
            "temporaries": memory["temporaries"],
            "peak": memory["peak"],
            "usable": chip.hbm_bytes if chip else None,
            "by_module": held.by_module,
        },
        "flops": flops,
        "collectives": collectives.as_json(),
        "layout": made.describe()["tree"],
        "placement": placement(made.leaves, made.mesh),
        "step_seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "source": source,
    }


def _pipeline(made: Any) -> dict[str, Any] | None:
    """Schedule and bubble as the program runs it, on paper; None without stages."""
    if made.pipeline is None:
        return None
    timeline, deal = made.pipeline.timeline(), made.pipeline.deal
    return {
        "schedule": made.pipeline.schedule.name,
        "stages": deal.stages,
        "microbatches": made.microbatches,
        "bubble": timeline.bubble,
        "inputs_kept": max(timeline.in_flight),
        "layers_per_piece": deal.longest,
    }
