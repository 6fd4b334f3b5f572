"""The manifest of a step: what its arrays are, where they were written, and the small JSON beside them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardtrain.checkpoint import folder
from shardtrain.errors import CheckpointError
from shardtrain.tree import path_name

FORMAT = 2  # 1 had no digests
SHOWN = 10  # differences listed before "and N more"

LeafPath = tuple[str, ...]


def paths(tree: Any) -> dict[LeafPath, Any]:
    """Path, as names from the root, to leaf."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {tuple(path_name([key]) for key in path): leaf for path, leaf in pairs}
    assert len(named) == len(pairs), "two leaves share a path"
    return named


def describe(
    state: Any,
    step: int,
    *,
    plan: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The manifest of `state`, but for the sizes of its files. Waits for the device (reads the cursor).

    Args:
        plan: `plan.describe()`, or empty; its tree is not repeated: the state is asked for its own.
    """
    high, low = np.asarray(jax.device_get(state.cursor)).tolist()
    leaves = paths(state)
    meshes = [dict(x.sharding.mesh.shape) for x in leaves.values() if hasattr(x.sharding, "mesh")]
    return {
        **{name: value for name, value in plan.items() if name not in ("tree", "versions")},
        "format": FORMAT,
        "step": step,
        "cursor": (high << 32) + low,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "mesh": max(meshes, key=len, default={}),
        "processes": jax.process_count(),
        "hardware": _hardware(leaves.values()),
        "versions": versions(),
        "parameters": sum(x.size for path, x in leaves.items() if path[0] == "params"),
        "tree": {"/".join(path): leaf_entry(x) for path, x in leaves.items()},
        "config": dict(config or {}),
        "extra": dict(extra or {}),
    }


def _hardware(leaves: Iterable[Any]) -> str:
    """Kind and number of the devices that hold the state."""
    devices = {d for x in leaves for d in getattr(getattr(x, "sharding", None), "device_set", ())}
    return f"{len(devices)} x {next(iter(devices)).device_kind}" if devices else "unknown"


def leaf_entry(leaf: Any) -> dict[str, Any]:
    """Shape, dtype and spec of an array or of its abstract form."""
    spec = getattr(leaf.sharding, "spec", None)
    axes = [list(axis) if isinstance(axis, tuple) else axis for axis in spec] if spec is not None else None
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "spec": axes}


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Of what is installed here and shapes the programs or the files."""
    names = {"orbax": "orbax-checkpoint"}
    return {name: _version(names.get(name, name)) for name in ("shardtrain", "jax", "flax", "optax", "orbax")}


def to_json(value: Any, *, where: str) -> str:
    """JSON text.

    Raises:
        CheckpointError: something in it is no JSON.
    """
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "not all of it is JSON",
            where=where,
            why=str(error),
            fix="give numbers, text, lists and dicts only",
        ) from error


def seal(content: Mapping[str, Any]) -> str:
    """The text of a manifest, its own digest last, so that it vouches for every byte of itself."""
    body = to_json(content, where="extra")
    return f'{body[:-1]}, "digest": "{_digest(body)}"}}\n'


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
        ValueError: not JSON, or not what was written.
    """
    content = json.loads(text)
    sealed = re.fullmatch(r'(.*), "digest": "([0-9a-f]{64})"}\n', text, re.DOTALL)
    if not isinstance(content, dict) or sealed is None or _digest(sealed[1] + "}") != sealed[2]:
        raise ValueError("it is not what was written: its digest differs")
    del content["digest"]
    return content


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def read(path: Path, step: int) -> dict[str, Any]:
    """The manifest of a step.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = folder.step_folder(path, step) / folder.MANIFEST
    try:
        return parse(file.read_bytes(), step, str(file.parent))
    except OSError as error:
        why = f"{file.name} cannot be read: {error.strerror or error}"
        raise damaged(path, step, why) from error
    except ValueError as error:
        raise damaged(path, step, str(error)) from error


def parse(data: bytes, step: int, where: str) -> dict[str, Any]:
    """The manifest of a step from its bytes.

    Raises:
        ValueError: damaged, in a sentence. CheckpointError: written by a newer shardtrain.
    """
    name = folder.MANIFEST
    try:
        text = data.decode()
        content = json.loads(text)
        if not isinstance(content, dict) or not {"format", "step", "tree", "files"} <= content.keys():
            raise ValueError("not a manifest")
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if content["format"] != 1:
        try:
            unseal(text)
        except ValueError:
            raise ValueError(f"{name} is not what was written: its digest differs") from None
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"format {content['format']} is newer than this shardtrain, which reads up to {FORMAT}",
            where=where,
            why=f"written by shardtrain {content.get('versions', {}).get('shardtrain', '?')}",
            fix="upgrade shardtrain",
        )
    if content["step"] != step:
        raise ValueError(f"{name} is that of step {content['step']}")
    return content


def damaged(path: Path, step: int, why: str) -> CheckpointError:
    """The error of a step that cannot be read, with the way out."""
    older = [other for other in folder.steps(path) if other < step]
    place = folder.step_folder(path, step)
    if older:
        fix = f"restore(plan, step={older[-1]}), or move {place} away: step {older[-1]} is then the newest"
    else:
        fix = f"no older step is there: copy {place} anew from where it came from, or start in another folder"
    return CheckpointError(f"step {step} is damaged", where=str(place), why=why, fix=fix)


def check_tree(
    path: Path, manifest: Mapping[str, Any], leaves: Mapping[LeafPath, Any], parts: Collection[str]
) -> None:
    """Compare the checkpoint's tree with the plan's, in the fields `parts`. Nothing is ever cast.

    Raises:
        CheckpointError: they differ; lists what does.
    """
    stored = {name: x for name, x in manifest["tree"].items() if name.split("/")[0] in parts}
    here = {"/".join(p): leaf_entry(x) for p, x in leaves.items() if p[0] in parts}
    differ: list[tuple[str, str]] = []  # name of the leaf, what is to be said
    for name in [*here, *(name for name in stored if name not in here)]:
        if name not in stored:
            differ.append((name, f"missing in the checkpoint: {name} ({_kind(here[name])})"))
        elif name not in here:
            differ.append((name, f"not in this model: {name} ({_kind(stored[name])})"))
        else:
            differ += [
                (name, f"{name}: {what} {stored[name][what]} in the checkpoint, {here[name][what]} here")
                for what in ("shape", "dtype")
                if here[name][what] != stored[name][what]
            ]
    if not differ:
        return
    lines = [line for _, line in differ[:SHOWN]]
    if len(differ) > SHOWN:
        lines.append(f"and {len(differ) - SHOWN} more")
    fix = "give the model and optimizer that wrote it, or another folder"
    if set(parts) != {"params"} and not any(name.startswith("params/") for name, _ in differ):
        fix += '; restore(plan, parts=("params",)) loads the weights alone'
    raise CheckpointError(
        f"step {manifest['step']} was written by another model or optimizer: {len(differ)} differences",
        where=str(path),
        why="\n  ".join(lines),
        fix=fix,
    )


def _kind(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"
