"""A run that goes on: its own config on the devices that are left, and what that keeps exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardtrain.checkpoint import inspect, newest_durable, newest_intact, versions
from shardtrain.config.build import build, build_mesh, make_plan
from shardtrain.config.devices import use_no_devices
from shardtrain.config.load import load_config
from shardtrain.config.resolve import device_count, resolve
from shardtrain.config.run import resume_config, stored
from shardtrain.config.schema import MeshSizes, RunConfig
from shardtrain.errors import CheckpointError, ConfigError
from shardtrain.mesh import Target
from shardtrain.plan.plan import Plan

REDUCTIONS: Mapping[str, str] = {
    "slice": "gradients are summed over it, across the slow network",
    "slice_fsdp": "gradients are summed over it, across the slow network",
    "data": "gradients are summed over it (all-reduce)",
    "fsdp": "gradients are summed over it (reduce-scatter)",
    "expert": "gradients are summed over it, and experts' products run on other numbers of rows",
    "tensor": "products of divided matrices are partial sums that are added over it (all-reduce)",
    "context": "attention adds its parts over it, and gradients are summed over it",
    "stage": "gradients of what lies outside the stack are summed over it",
}
"""Mesh axis -> what is added up over it, in an order that depends on its size."""


def resumed(run: str, flags: Sequence[str], devices: str = "") -> tuple[RunConfig, list[str]]:
    """The config of a run with flags laid over it, on the devices that are left, and lines to say. Of a run that has no
    folder here yet, from the store that `--durable` names.

    Args:
        devices: a number of them, or what `RunConfig.devices` takes; default: as the run had.

    Raises:
        ConfigError: not a run, or the flags change what is trained. And what a store raises that cannot be read.
    """
    path = pathlib.Path(run)
    old = _config(path, _flag(flags, "--durable"))
    count = re.fullmatch(r"(?:cpu:)?(\d+)", devices)
    if devices.isdigit():
        devices = f"cpu:{devices}" if old.devices.startswith("cpu") else old.devices
    given = [*flags, *(["--devices", devices] if devices else []), "--output", run]
    named = any(flag.startswith("--mesh.") for flag in flags)
    new, notes = resolve(old, given, int(count[1]) if count else None)
    if count and not named and device_count(new) != int(count[1]):
        new = fit_devices(new, int(count[1]))
        sizes = " ".join(f"{a}={n}" for a, n in dataclasses.asdict(new.mesh).items() if n > 1) or "one device"
        notes.append(f"mesh: {sizes} for {count[1]} devices; --mesh.AXIS N decides otherwise")
    return resume_config(old, new, path), notes


def _config(path: pathlib.Path, url: str) -> RunConfig:
    if (path / "config.json").is_file():
        return load_config(str(path))
    if not url or (old := stored(url)) is None:
        raise ConfigError(
            "no config.json here, so no run",
            where=str(path),
            why=f"and no checkpoint in {url}" if url else "",
            fix="the --output of a run; or --durable URL, where its checkpoints are",
        )
    return old


def _flag(flags: Sequence[str], name: str) -> str:
    """The value of a flag among others; empty without."""
    joined = [flag.partition("=")[2] for flag in flags if flag.startswith(f"{name}=")]
    apart = [value for flag, value in itertools.pairwise(flags) if flag == name]
    return (joined + apart or [""])[-1]


def fit_devices(config: RunConfig, count: int) -> RunConfig:
    """The mesh on another number of devices: inner axes keep what they can, data takes the rest."""
    if count < 1:
        raise ConfigError(f"{count} devices", where="--devices", fix="1 or more")
    left, slow, sizes = count, {}, {}
    for axis, size in dataclasses.asdict(config.dcn).items():
        slow[axis] = math.gcd(size, left)
        left //= slow[axis]
    for axis, size in reversed(dataclasses.asdict(config.mesh).items()):
        if axis != "data":
            sizes[axis] = math.gcd(size, left)
            left //= sizes[axis]
    return dataclasses.replace(config, mesh=MeshSizes(**sizes, data=left), dcn=type(config.dcn)(**slow))


def dry_run(run: str, new: RunConfig) -> dict[str, Any]:
    """What would go on, from where, and what of it is exact. Starts no device but this process's CPU. Of a step that a store
    alone has, only the manifest is read.

    Returns:
        `run, step, damaged, cursor, mesh, groups, microbatches, global_batch, identical, close, bit_for_bit`;
        `identical` and `close` list `what` and `why`.

    Raises:
        CheckpointError: no step, or none that is intact. And what the plan raises on that mesh.
    """
    use_no_devices()
    place = pathlib.Path(run).absolute() / "checkpoints"
    step, damaged = newest_intact(place)
    there = newest_durable(new.durable) if new.durable else None
    if step is None and there is None:
        raise CheckpointError(
            "no checkpoint yet", where=str(place), fix="the run starts at step 0: without --dry-run"
        )
    old = _config(pathlib.Path(run), new.durable)
    if there is None or (step is not None and step >= there["step"]):
        found = inspect(place, step)
    else:
        found, step = there, there["step"]
    if (count := device_count(new)) is None:
        raise ConfigError("the mesh has a free axis", where=run, fix="--devices N")
    made = make_plan(new, build(new, build_mesh(new, Target(f"cpu:{count}"))), found["groups"])
    identical, close = going_on(found, old, new, made)
    return {
        "run": run,
        "step": step,
        "damaged": {str(other): why for other, why in damaged.items()},
        "cursor": found["cursor"],
        "mesh": dict(made.mesh.shape),
        "groups": made.groups,
        "microbatches": made.microbatches,
        "global_batch": made.global_batch,
        "identical": [{"what": what, "why": why} for what, why in identical],
        "close": [{"what": what, "why": why} for what, why in close],
        "bit_for_bit": not close,
        "hardware": found.get("hardware"),
    }


Lines = list[tuple[str, str]]


def going_on(found: Mapping[str, Any], old: RunConfig, new: RunConfig, made: Plan) -> tuple[Lines, Lines]:
    """What stays identical and what only close to rounding, each with why, when the step `found` goes on with `made`."""
    groups, cursor = found["groups"], found["cursor"]
    before = {a: n for a, n in found["mesh"].items() if n > 1}
    after = {a: n for a, n in made.mesh.shape.items() if n > 1}
    calls = found["microbatches"], made.microbatches
    identical = [
        ("parameters and optimizer state", f"step {found['step']}, every byte checked, nothing cast"),
        ("rows", f"row {cursor:,} is next; {made.global_batch} a step in the same order, on any mesh"),
        ("groups", f"{groups}, the run's own: rows g, g+{groups}, ... are one call of the loss on any mesh"),
        ("keys", "made of the run's key, the step and the group; no device has one of its own"),
        ("schedule", "the learning rate follows the optimizer's count, which is in the state"),
    ]
    if calls[0] != calls[1]:
        identical.append(
            ("global batch", f"a device takes {calls[1]} microbatches a step, it took {calls[0]}")
        )
    close = [
        (f"sums over {axis}", f"{axis}={before.get(axis, 1)} was, {axis}={after.get(axis, 1)} is: {why}")
        for axis, why in REDUCTIONS.items()
        if before.get(axis, 1) != after.get(axis, 1)
    ]
    if calls[0] != calls[1]:
        close.append(
            ("sums over groups", "a device adds up its own groups first, and has another number of them")
        )
    for name in ("rules", "attention", "schedule", "guard"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now and (name != "schedule" or "stage" in {**before, **after}):
            close.append((name, f"{was} was, {now} is: another program, which adds up in another order"))
    for name, now in versions().items():
        if (was := found["versions"].get(name, "?")) != now and name != "orbax":
            close.append((name, f"{was} wrote it, {now} is here and may compile another program"))
    return identical, close
