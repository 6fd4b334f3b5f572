"""The best layouts of a config for hardware that need not be here, and why the others lost. Nothing is trained.

shardtrain search configs/llama.py:b8 --target h100:8x8
shardtrain search configs/llama.py:b8 --target v5e:16x16 --objective memory --write best.json

Layouts are sketched by arithmetic, the best partitioned on paper, the best of those compiled by the target's compiler where
it is installed, and the winner certified by it. Global batch, sequence length and numerics stay as they are. Exit code 1
where no layout fits.
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell
from shardtrain.errors import ConfigError, suggestion


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="FILE.py:FUNCTION or a saved config.json")
    parser.add_argument("--target", required=True, help="hardware, present or not: v5e:16x16, h100:8x8")
    parser.add_argument("--objective", default="step_time", help="step_time (default), memory or cost")
    parser.add_argument("--axes", default="", help="meshes of these axes alone, with commas: data,fsdp")
    parser.add_argument("--top", type=int, default=5, help="layouts to show")
    parser.add_argument("--partitions", type=int, default=24, help="layouts to partition on paper")
    parser.add_argument("--compiles", type=int, default=5, help="layouts to compile; 0 leaves compilers out")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one compilation")
    parser.add_argument(
        "--constants", metavar="FILE", help="measured constants in place of assumed ones (JSON)"
    )
    parser.add_argument("--write", metavar="FILE", help="the winner as a config that train takes (.json)")
    parser.add_argument("--html", metavar="FILE", help="all layouts, and the winner, as one page")
    parser.set_defaults(takes_overrides=True)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.config import resolve
    from shardtrain.config.search import search_config, write_winner
    from shardtrain.mesh import Target
    from shardtrain.plan.cost import Constants
    from shardtrain.plan.ranking import OBJECTIVES

    if options.objective not in OBJECTIVES:
        meant = suggestion(options.objective, OBJECTIVES, "step_time")
        raise ConfigError(f"'{options.objective}'", where="--objective", fix=meant)
    least = {
        "--top": (options.top, 1),
        "--partitions": (options.partitions, 1),
        "--compiles": (options.compiles, 0),
    }
    for flag, (value, most) in least.items():
        if value < most:
            raise ConfigError(f"{value}", where=flag, fix=f"{most} or more")
    if not options.timeout > 0:
        raise ConfigError(f"{options.timeout}", where="--timeout", fix="a number of seconds over 0")
    if options.write and not options.write.endswith(".json"):
        raise ConfigError(
            "not a .json", where=f"--write {options.write}", fix=f"--write {options.write}.json"
        )
    shell.check_place(options.write, "--write")
    shell.check_place(options.html, "--html")
    target = Target(options.target)
    constants = Constants.of(target, options.constants)
    config, _ = resolve(options.config, options.overrides)
    found = search_config(
        config,
        target,
        constants,
        axes=[a for a in options.axes.split(",") if a],
        objective=options.objective,
        partitions=options.partitions,
        compiles=options.compiles,
        timeout=options.timeout,
        say=shell.say,
    )
    if not options.json:
        print(found.text(options.top))
    if options.write and found.best is not None:
        write_winner(config, found, options.write)
        shell.say(f"written: shardtrain train {options.write}")
    if options.html is not None:
        from shardtrain.plan.picture import page

        title = f"shardtrain search {options.config} --target {target}"
        shell.write(options.html, page(found.as_json(), title), "--html")
        shell.say(f"written: {options.html}")
    return shell.DONE if found.best is not None else shell.FOUND, found.as_json()
