"""Flags over a config: every leaf of the tree is one, and environment variables come between."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
from collections.abc import Mapping, Sequence

from shardtrain.config.load import check, flat
from shardtrain.config.schema import MeshSizes, RunConfig
from shardtrain.errors import ConfigError, suggestion

PREFIX = "SHARDTRAIN_"


def apply_overrides(
    config: RunConfig, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[RunConfig, list[str]]:
    """The config with environment variables and then flags laid over it.

    Args:
        flags: `--optimizer.learning-rate 1e-3` or `=`; underscores and dashes are the same.
        environment: `SHARDTRAIN_OPTIMIZER__LEARNING_RATE=1e-3`; default `os.environ`.

    Returns:
        The new config, and the leaves that were named (for messages).

    Raises:
        ConfigError: an unknown flag (with the one that was meant), or a value of the wrong type.
    """
    known = flat(config)
    arguments: list[str] = []
    named: list[str] = []
    for variable, value in sorted((os.environ if environment is None else environment).items()):
        if variable.startswith(PREFIX):
            leaf = variable.removeprefix(PREFIX).lower().replace("__", ".")
            if leaf in known:
                arguments += [_flag(leaf), value]
                named.append(leaf)
    for flag, given in _pairs(flags):
        leaf = flag.replace("-", "_")
        if leaf not in known:
            if leaf.startswith("model.options."):
                known[leaf] = None
            else:
                meant = suggestion(leaf, known, "see `shardtrain config`")
                raise ConfigError(f"no such field: --{flag}", where="flags", fix=meant)
        if isinstance(known[leaf], bool):
            arguments.append(_boolean(leaf, given))
        elif given is None:
            raise ConfigError("needs a value", where=f"--{flag}", fix=f"--{flag} {known[leaf]}")
        else:
            arguments += [_flag(leaf), given]
        named.append(leaf)
    return check(_parse(config, arguments)), named


def _pairs(flags: Sequence[str]) -> list[tuple[str, str | None]]:
    pairs: list[tuple[str, str | None]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument '{flag}'", where="flags", fix="--NAME VALUE")
        name, equals, value = flag[2:].partition("=")
        if equals:
            pairs.append((name, value))
        elif rest and not re.match(r"--[a-zA-Z]", rest[0]):
            pairs.append((name, rest.pop(0)))
        else:
            pairs.append((name, None))
    return pairs


def _flag(leaf: str) -> str:
    return "--" + leaf.replace("_", "-")


def _boolean(leaf: str, value: str | None) -> str:
    if value is not None and value.lower() not in ("true", "false"):
        raise ConfigError(f"'{value}'", where=_flag(leaf), fix="true or false")
    head, _, tail = leaf.rpartition(".")
    prefix = f"{head}.".replace("_", "-") if head else ""
    return f"--{prefix}{'' if value is None or value.lower() == 'true' else 'no-'}{tail.replace('_', '-')}"


def _parse(config: RunConfig, arguments: list[str]) -> RunConfig:
    if not arguments:
        return config
    import tyro

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[RunConfig],
                default=config,
                args=arguments,
                prog="shardtrain",
                use_underscores=False,
            )
    except SystemExit as error:
        text = re.sub(r"[╭╮╰╯│─-]{2,}|[╭╮╰╯│─]", " ", re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()))
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [
            line for line in lines if line and not line.startswith(("Parsing error", "For full helptext"))
        ]
        raise ConfigError(
            " ".join(lines[:6]) or "cannot be parsed", where="flags", fix="see `shardtrain config`"
        ) from error


def fit_mesh(config: RunConfig, named: Sequence[str], devices: int) -> tuple[RunConfig, str]:
    """Axes named on the command line replace the config's; the others stay, if that can be.

    Where the axes that were named already use every device, the others become 1, and the second
    value says so in one line.
    """
    sizes = dataclasses.asdict(config.mesh)
    given = {n.removeprefix("mesh."): sizes[n.removeprefix("mesh.")] for n in named if n.startswith("mesh.")}
    slow = math.prod(config.dcn.named.values())
    product = slow
    for size in sizes.values():
        product *= size
    if not given or product == devices or product < 0:
        return config, ""
    alone = slow
    for size in given.values():
        alone *= size
    kept = {a: n for a, n in sizes.items() if a not in given and n != 1}
    if alone != devices or not kept:
        return config, ""
    dropped = " ".join(f"{a}={n}" for a, n in kept.items())
    line = f"mesh: {' '.join(f'{a}={n}' for a, n in given.items())} uses all {devices} devices; the config's {dropped} is 1 here"
    return dataclasses.replace(config, mesh=MeshSizes(**given)), line
