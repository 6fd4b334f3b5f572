"""What a plan's step needs of one device's memory, part by part."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from shardtrain.mesh import Target
from shardtrain.plan.partitioned import Partitioned
from shardtrain.tree import bytes_text, flatten, table

if TYPE_CHECKING:
    from shardtrain.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Bill:
    """Bytes of one device. `parameters`, `optimizer`, `other` (keys, counters, variables) and `batch` are exact.

    `gradients`: as accumulated. `saved`: activations that the backward waits for. `temporaries`: all that is made during
    a step, gradients and saved activations included. `host`: what waits in the host's memory, counted nowhere else. `peak`: the
    most at one time, by `source`. `usable`: of the chip, None where it is not known. `largest`: what is live then, on paper.
    The state by module (`by_module`), and by the parameter to which it belongs (`held`: part -> path -> bytes).
    """

    parameters: float
    optimizer: float
    other: float
    batch: float
    gradients: float
    saved: float | None
    temporaries: float | None
    peak: float
    usable: float | None
    held: Mapping[str, Mapping[str, float]]
    by_module: Mapping[str, float]
    largest: tuple[tuple[str, float], ...]
    source: str
    host: float = 0.0

    @property
    def arguments(self) -> float:
        return self.parameters + self.optimizer + self.other + self.batch

    @property
    def fits(self) -> bool | None:
        """None where nobody can tell: no figures of the chip, or only state was counted and that fits."""
        if self.usable is None or (self.temporaries is None and self.peak <= self.usable):
            return None
        return self.peak <= self.usable

    def as_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {**data, "arguments": self.arguments, "largest": [list(pair) for pair in self.largest]}

    def __str__(self) -> str:
        rows = [
            (name, bytes_text(value))
            for name in ("parameters", "optimizer", "other", "batch", "gradients", "saved", "temporaries")
            if (value := getattr(self, name)) is not None
        ]
        rows += [("peak", bytes_text(self.peak))]
        rows += [("usable", bytes_text(self.usable))] if self.usable is not None else []
        rows += [("on the host", bytes_text(self.host))] if self.host else []
        return table(("memory", "per device"), rows)


def bill(plan: Plan, target: Target, paper: Partitioned | None, source: str) -> Bill:
    """State exactly, from its specs; what a step makes from the partitioned program."""
    kinds: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    held: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for path, leaf in flatten(plan.abstract_state).items():
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        owner = max((p for p in plan.leaves if f"/{path}".endswith(f"/{p}")), key=len, default="")
        kind = {"params": "parameters", "opt_state": "optimizer"}.get(path.split("/")[0], "other")
        kinds[kind] += size
        held[kind][owner or path] += size
        modules[owner.split("/")[0] or "other"] += size
    gradients = 0.0
    for path in flatten(plan.abstract_state.params):
        leaf = plan.leaves[path]
        spec = jax.sharding.NamedSharding(plan.mesh, leaf.gradient)
        gradients += math.prod(spec.shard_shape(leaf.shape)) * 4
    fields = jax.tree.leaves(plan.batch)
    batch = sum(
        math.prod(plan.field_sharding(x.ndim).shard_shape(x.shape)) * x.dtype.itemsize for x in fields
    )
    state = sum(kinds.values()) + batch
    chip = target.chip
    return Bill(
        parameters=kinds["parameters"],
        optimizer=kinds["optimizer"],
        other=kinds["other"],
        batch=batch,
        gradients=gradients,
        saved=None if paper is None else paper.live.saved,
        temporaries=None if paper is None else paper.temporaries,
        peak=state + gradients if paper is None else state + paper.temporaries,
        usable=None if chip is None else chip.usable_bytes,
        held={part: dict(sizes) for part, sizes in held.items()},
        by_module=dict(modules),
        largest=()
        if paper is None
        else tuple((f"{b.what} {b.source}".strip(), b.bytes) for b in paper.live.buffers[:12]),
        source=source,
        host=0.0 if paper is None else paper.live.host,
    )
