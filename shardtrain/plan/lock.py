"""`plan.lock`: what a layout was when somebody looked, so that a change shows."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardtrain.errors import ConfigError
from shardtrain.plan.layout import spec_text
from shardtrain.tree import bytes_text, flatten

if TYPE_CHECKING:
    from shardtrain.plan.audit import Audit
    from shardtrain.plan.plan import Plan

FORMAT = 1
CLOSE = 0.02  # peak memory moves a little between compilers
_VERSIONS = ("jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Lock:
    """Shardings of the state, collectives by axis with their bytes, peak memory, versions.

    lock = Lock.of(plan, st.audit(plan.compile(target="v5e:2x4")))
    changes = lock.changes_from(Lock.read("plan.lock"))
    """

    content: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, audit: Audit) -> Lock:
        """Of a plan and the audit of its step."""
        return cls(
            {
                "format": FORMAT,
                "target": audit.target,
                "compiler": audit.source,
                "mesh": dict(audit.mesh),
                "rules": plan.rules.name,
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
                "state": {
                    path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] {spec_text(leaf.sharding.spec)}"
                    for path, leaf in flatten(plan.abstract_state).items()
                },
                "collectives": {
                    f"{op} over {axis}": {"count": count, "wire_bytes": wire}
                    for (op, axis), (count, wire) in sorted(audit.collectives.by_axis().items())
                },
                "bytes": audit.bytes,
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
        if not isinstance(content, dict) or content.get("format") != FORMAT or _kinds(content) != _KINDS:
            raise ConfigError(
                "not a plan.lock of this version", where=str(file), fix="--update writes it anew"
            )
        return cls(content)

    def text(self) -> str:
        """JSON, one entry a line, made to be read in a diff."""
        return json.dumps(self.content, indent=1, sort_keys=True) + "\n"

    def changes_from(self, old: Lock) -> list[str]:
        """What is different, a line each; versions and the compiler are named only beside another change."""
        before, now = old.content, self.content
        lines = [f"{k}: {_short(before[k])} -> {_short(now[k])}" for k in _WHOLE if before[k] != now[k]]
        lines += _state(before["state"], now["state"])
        lines += _changed("collectives", before["collectives"], now["collectives"], _collective)
        for key, what, close in (("bytes", "sent per device", 0.0), ("peak_bytes", "peak memory", CLOSE)):
            if abs(now[key] - before[key]) > close * max(before[key], 1):
                lines.append(
                    f"{what}: {bytes_text(before[key])} -> {bytes_text(now[key])}{_percent(before[key], now[key])}"
                )
        if lines:
            lines += _changed("versions", before["versions"], now["versions"], str)
            if before["compiler"] != now["compiler"]:
                lines.append(f"compiler: {before['compiler']} -> {now['compiler']}")
        return lines


_WHOLE = ("target", "mesh", "rules")
_KINDS = {
    "target": str, "compiler": str, "mesh": dict, "rules": str, "versions": dict, "state": dict, "collectives": dict,
}  # fmt: skip


def _kinds(content: Mapping[str, Any]) -> dict[str, type]:
    return {key: type(content.get(key)) for key in _KINDS}


def _short(value: Any) -> str:
    return " ".join(f"{a}={n}" for a, n in value.items()) if isinstance(value, dict) else str(value)


def _collective(c: Mapping[str, Any]) -> str:
    return f"{c['count']} x, {bytes_text(c['wire_bytes'])}"


def _percent(before: float, now: float) -> str:
    return f" ({100 * (now - before) / before:+.1f}%)" if before else ""


def _state(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Changes of leaves. An optimizer's copies that change as their parameter does are counted, not listed."""
    parameters = {p.removeprefix("params/") for p in {**old, **new} if p.startswith("params/")}

    def owner(path: str) -> str | None:
        if not path.startswith("opt_state/"):
            return None
        return next((p for p in parameters if path.endswith(f"/{p}")), None)

    copies: dict[str, int] = {}
    own: dict[str, tuple[str | None, str | None]] = {}
    for path in {**old, **new}:
        change, parameter = (old.get(path), new.get(path)), owner(path)
        if change[0] == change[1]:
            continue
        if parameter and change == (old.get(f"params/{parameter}"), new.get(f"params/{parameter}")):
            copies[f"params/{parameter}"] = copies.get(f"params/{parameter}", 0) + 1
        else:
            own[path] = change
    lines = []
    for path, (before, now) in own.items():
        also = f" (and {copies[path]} copies in the optimizer)" if path in copies else ""
        text = (
            f"- {path}: {before}"
            if now is None
            else f"+ {path}: {now}"
            if before is None
            else f"{path}: {before} -> {now}"
        )
        lines.append(f"state: {text}{also}")
    return lines


def _changed(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any], show: Callable[[Any], str]
) -> list[str]:
    lines = [f"{what}: - {name}: {show(old[name])}" for name in old if name not in new]
    lines += [f"{what}: + {name}: {show(new[name])}" for name in new if name not in old]
    return lines + [
        f"{what}: {name}: {show(old[name])} -> {show(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    ]
