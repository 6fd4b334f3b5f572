"""`plan.lock`: what a layout was when somebody looked, so that a change shows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from shardtrain.errors import ConfigError
from shardtrain.plan.layout import spec_text
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.audit import Audit
    from shardtrain.plan.plan import Plan

FORMAT = 1
CLOSE = 0.02  # peak memory moves a little between compilers


@dataclasses.dataclass(frozen=True)
class Lock:
    """Shardings of the state, collectives by axis with their bytes, peak memory, versions."""

    content: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan, audit: Audit) -> Lock:
        """Of a plan and the audit of its step."""
        leaves = flatten(plan.abstract_state)
        return cls(
            {
                "format": FORMAT,
                "target": audit.target,
                "mesh": dict(audit.mesh),
                "rules": plan.rules.name,
                "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
                "state": {
                    path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] {spec_text(leaf.sharding.spec)}"
                    for path, leaf in leaves.items()
                },
                "collectives": {
                    f"{op} over {axis}": {"count": count, "wire_bytes": wire}
                    for (op, axis), (count, wire) in sorted(audit.collectives.by_axis().items())
                },
                "peak_bytes": audit.memory["peak"],
            }
        )

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Lock:
        """Raises ConfigError for a file that is none."""
        try:
            content = json.loads(pathlib.Path(file).read_text())
        except OSError as error:
            raise ConfigError(
                f"cannot be read: {error.strerror}", where=str(file), fix="--update writes it"
            ) from error
        except ValueError as error:
            raise ConfigError("not JSON", where=str(file), fix="--update writes it anew") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ConfigError(
                "not a plan.lock of this version", where=str(file), fix="--update writes it anew"
            )
        return cls(content)

    def text(self) -> str:
        """JSON, one entry a line, made to be read in a diff."""
        return json.dumps(self.content, indent=1, sort_keys=True) + "\n"

    def changes_from(self, old: Lock) -> list[str]:
        """What is different, a line each; versions are named only beside another change."""
        lines = []
        for key in ("target", "mesh", "rules"):
            if self.content[key] != old.content.get(key):
                lines.append(f"{key}: {old.content.get(key)} -> {self.content[key]}")
        lines += _changed("state", old.content.get("state", {}), self.content["state"], str)
        lines += _changed(
            "collectives",
            old.content.get("collectives", {}),
            self.content["collectives"],
            lambda c: f"{c['count']} x, {bytes_text(c['wire_bytes'])}",
        )
        before, now = old.content.get("peak_bytes", 0), self.content["peak_bytes"]
        if abs(now - before) > CLOSE * max(before, 1):
            lines.append(f"peak memory: {bytes_text(before)} -> {bytes_text(now)}")
        if lines:
            lines += _changed("versions", old.content.get("versions", {}), self.content["versions"], str)
        return lines


def _changed(what: str, old: dict[str, Any], new: dict[str, Any], show: Any) -> list[str]:
    lines = [f"{what}: - {name}: {show(old[name])}" for name in old if name not in new]
    lines += [f"{what}: + {name}: {show(new[name])}" for name in new if name not in old]
    return lines + [
        f"{what}: {name}: {show(old[name])} -> {show(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    ]
