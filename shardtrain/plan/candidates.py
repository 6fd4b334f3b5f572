"""Layouts to choose from: mesh axis sizes, rules, microbatches, attention, schedule; their names, and all that fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shardtrain.errors import ConfigError, suggestion
from shardtrain.mesh.build import AXES, SLOW, named_sizes
from shardtrain.parallel.attention import MODES
from shardtrain.parallel.presets import PRESETS

SCHEDULES = ("1f1b", "gpipe", "zb", "interleaved:2")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout. Its name says it all: `data2-fsdp4`, `tensor8+tensor_sequence`, `context8+ulysses`, `stage4-data2+gpipe`,
    `data8+x4` (four microbatches)."""

    sizes: tuple[tuple[str, int], ...]
    rules: str = "fsdp_tensor"
    microbatches: int = 1
    attention: str = "ring"
    schedule: str = "1f1b"

    @classmethod
    def of(cls, sizes: Mapping[str, int], **options: Any) -> Candidate:
        """From mesh sizes, in the order of a mesh, axes of one device left out."""
        kept = {a: sizes[a] for a in AXES if sizes.get(a, 1) > 1}
        return cls(tuple((kept or {"data": 1}).items()), **options)

    @property
    def mesh(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def options(self) -> dict[str, Any]:
        """For `st.plan`, besides the mesh."""
        return {
            "rules": self.rules,
            "microbatches": self.microbatches,
            "attention": self.attention,
            "schedule": self.schedule,
        }

    @property
    def name(self) -> str:
        words = [self.rules] if self.rules != "fsdp_tensor" else []
        words += [self.attention] if self.attention != "ring" else []
        words += [self.schedule] if self.schedule != "1f1b" else []
        words += [f"x{self.microbatches}"] if self.microbatches > 1 else []
        return "+".join(["-".join(f"{a}{n}" for a, n in self.sizes), *words])

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """The layout that a name says.

        Raises:
            ConfigError: a word that is no mesh axis with its size, rules, kind of attention, schedule or `xN`.
        """
        first, *words = name.strip().split("+")
        sizes: dict[str, Any] = {}
        for part in first.split("-"):
            match = re.fullmatch(r"([a-z_]+)(\d+)", part)
            if match is None or match[1] not in AXES or match[1] in sizes:
                raise ConfigError(
                    f"'{part}' is not a mesh axis with its size",
                    where=f"layout '{name}'",
                    fix=f"such as data2-fsdp4; axes: {', '.join(AXES)}",
                )
            sizes[match[1]] = int(match[2])
        named_sizes(math.prod(sizes.values()), **sizes)
        options: dict[str, Any] = {}
        for word in words:
            kinds = {"rules": PRESETS, "attention": MODES, "schedule": SCHEDULES}
            kind = next((k for k, known in kinds.items() if word in known), None)
            if kind is None and re.fullmatch(r"interleaved:\d+", word):
                kind = "schedule"
            if kind is not None:
                options[kind] = word
            elif re.fullmatch(r"x\d+", word):
                options["microbatches"] = int(word[1:])
            else:
                known = [*PRESETS, *MODES, *SCHEDULES]
                raise ConfigError(f"'{word}'", where=f"layout '{name}'", fix=suggestion(word, known, "x4"))
        return cls.of(sizes, **options)


def candidates(devices: int, axes: Iterable[str]) -> list[Candidate]:
    """Layouts of so many devices: every axis alone, every pair in every division, every three; the rules, kinds of
    attention and schedules that go with them; once across a slow network, once with four microbatches.

    Args:
        axes: those that the model can use, of `AXES` but for `slice`.
    """
    axes = [a for a in AXES if a in set(axes)]
    found: list[Candidate] = []

    def add(sizes: Mapping[str, int], **options: Any) -> None:
        candidate = Candidate.of(sizes, **options)
        if candidate not in found:
            found.append(candidate)

    for count in (1, 2, 3):
        for together in itertools.combinations(axes, count):
            for split in _splits(devices, count):
                add(dict(zip(together, split, strict=True)))
    has = lambda *names: all(a in axes for a in names)  # noqa: E731
    half = devices // 2
    if has("data"):
        add({"data": devices}, rules="data")
        add({"data": devices}, rules="zero1")
        add({"data": devices}, microbatches=4)
        add({"data": devices}, rules="zero1", microbatches=4)
    for axis in ("fsdp", "tensor"):
        if has(axis):
            add({axis: devices}, microbatches=4)
    if has("tensor"):
        add({"tensor": devices}, rules="tensor_sequence")
        add({"data": half, "tensor": 2}, rules="zero1_tensor")
        add({"fsdp": half, "tensor": 2}, rules="fsdp_tensor_sequence")
        add({"fsdp": half, "tensor": 2}, rules="fsdp_tensor_sequence", microbatches=4)
    if has("context"):
        for mode in MODES[1:]:
            add({"context": devices}, attention=mode)
            add({"fsdp": half, "context": 2}, attention=mode)
        if has("tensor"):
            add({"context": 2, "tensor": half}, rules="tensor_sequence")
    if has("stage"):
        for schedule in SCHEDULES:
            add({"data": half, "stage": 2}, schedule=schedule)
            add({"data": 2, "stage": half}, schedule=schedule, microbatches=4)
    # Across the slow network.
    for inner in ("data", "fsdp", "tensor", "expert", "context", "stage"):
        if has(inner):
            add({"slice": 2, inner: half})
    if has("fsdp"):
        for inner in ("data", "fsdp", "tensor", "expert", "context", "stage"):
            if has(inner):
                add({"slice_fsdp": 2, inner: half})
    return found


MOST = {"tensor": 16, "context": 4, "stage": 8, "expert": 64}
"""Devices along an axis beyond which a search does not look."""


def space(devices: int, slices: int, axes: Iterable[str], rows: int, host: int) -> list[Candidate]:
    """What a search looks at, plain layouts first: data and fsdp in every division, with at most two of tensor, expert,
    stage and context beside them; the rules that go with them; microbatches as far as rows allow.

    Args:
        devices: of one slice. slices: joined by the slow network, over which data goes, or fsdp, or stage. axes: those
            that the model can use. rows: of the global batch. host: devices that share the fastest links, the most
            along tensor.
    """
    axes = set(axes)
    found: dict[Candidate, None] = {}
    extra = [a for a in ("tensor", "expert", "stage", "context") if a in axes]
    for count in (0, 1, 2):
        for chosen in itertools.combinations(extra, count):
            most = [min(MOST[a], host) if a == "tensor" else MOST[a] for a in chosen]
            for split in itertools.product(*([n for n in _divisors(devices) if 1 < n <= m] for m in most)):
                rest, over = divmod(devices, math.prod(split))
                if over:
                    continue
                for fsdp in sorted(_divisors(rest), reverse=True):
                    sizes = dict(zip(("data", "fsdp", *chosen), (rest // fsdp, fsdp, *split), strict=True))
                    for outer in _across(sizes, slices, axes):
                        found |= dict.fromkeys(_with_options(sizes | outer, rows))
    return list(found)


def _across(sizes: Mapping[str, int], slices: int, axes: set[str]) -> list[dict[str, int]]:
    """What may cross the slow network."""
    if slices == 1:
        return [{}]
    found = [{"slice": slices}]
    if "fsdp" in axes and sizes["data"] == 1:
        found.append({"slice_fsdp": slices})
    if "stage" in axes:
        found.append({"stage": slices * sizes.get("stage", 1)})
    return found


def _with_options(sizes: dict[str, int], rows: int) -> list[Candidate]:
    tensor, stage, fsdp = (sizes.get(a, 1) for a in ("tensor", "stage", "fsdp"))
    rules = ["fsdp_tensor"]
    if tensor > 1:
        rules.append("fsdp_tensor_sequence")
    if fsdp == 1 and sizes["data"] > 1 and "slice_fsdp" not in sizes:
        rules.append("zero1_tensor" if tensor > 1 else "zero1")
    shards = math.prod(sizes.get(a, 1) for a in (*SLOW, "data", "fsdp", "expert"))
    each = rows // shards
    times = [m for m in ([4 * stage, 2 * stage] if stage > 1 else [1, 4, 16]) if m <= each and each % m == 0]
    modes = MODES[:1] if sizes.get("context", 1) == 1 else (MODES[0], MODES[2])
    schedules = ("1f1b", "interleaved:2") if stage > 1 else ("1f1b",)
    return [
        Candidate.of(sizes, rules=r, microbatches=m, attention=a, schedule=s)
        for r, m, a, s in itertools.product(rules, times, modes, schedules)
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _splits(devices: int, count: int) -> list[tuple[int, ...]]:
    """Ordered factors of at least 2."""
    if count == 1:
        return [(devices,)] if devices > 1 else []
    return [
        (n, *rest) for n in range(2, devices) if devices % n == 0 for rest in _splits(devices // n, count - 1)
    ]


def covering(found: list[Candidate]) -> list[Candidate]:
    """Few of them in which every pair of choices that occurs together in one of them still does (greedy)."""

    def choices(c: Candidate) -> set[Any]:
        words = [*(f"{a}" for a, _ in c.sizes), c.rules, c.attention, c.schedule, f"x{c.microbatches}"]
        return set(itertools.combinations(sorted(set(words)), 2))

    left = set().union(*(choices(c) for c in found))
    chosen: list[Candidate] = []
    while left:
        best = max(found, key=lambda c: len(choices(c) & left))
        chosen.append(best)
        left -= choices(best)
    return chosen
