"""From the name of a config and flags to the config that runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from shardtrain.config.load import load_config
from shardtrain.config.overrides import apply_overrides, fit_mesh
from shardtrain.config.schema import RunConfig


def resolve(
    name: str | RunConfig, flags: Sequence[str], devices: int | None = None
) -> tuple[RunConfig, list[str]]:
    """The config `name`, or the one given, with environment variables and flags laid over it.

    Args:
        devices: how many there are; default: those that the config simulates.

    Returns:
        The config, and lines to say about what was decided.
    """
    config, named = apply_overrides(load_config(name) if isinstance(name, str) else name, flags)
    simulated = re.fullmatch(r"cpu:(\d+)", config.devices)
    notes = []
    count = devices or (int(simulated.group(1)) if simulated else None)
    if count is not None:
        config, note = fit_mesh(config, named, count)
        notes = [note] if note else []
    return config, notes


def device_count(config: RunConfig) -> int | None:
    """Devices that the mesh asks for; None if an axis is free."""
    sizes = list(vars(config.mesh).values())
    return None if -1 in sizes else math.prod(sizes) * math.prod(config.dcn.named.values())
