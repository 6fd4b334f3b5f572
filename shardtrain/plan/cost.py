"""How long a step takes: a closed formula over what a device computes and sends.

compute      sum over operations of max(FLOPs / (peak x efficiency), bytes / (HBM bandwidth x its efficiency)): a roofline
             for each. `hbm` is what the second adds to the first.
an axis      bytes sent over it / bandwidth of the links that it crosses, and one hop's latency per step of the rings
             (n-1, for an all-reduce 2(n-1)). On a torus an axis has two links along each dim that it spans, one where no
             wrap-around closes the ring; all-to-alls share links with those between, n/4 fold. On GPUs an axis that
             leaves a host has the host's adapters of its members: k of them, for k members a host.
overlap      a share of what batch axes and a ring over context send hides behind compute: the gathers and reductions of
             one layer run beside the products of another. What tensor, expert and stage send is waited for.
host         bytes that wait in the host's memory, there and back, over PCIe; hides as they do.
bubble       of the schedule as our program runs it (`parallel/timeline.py`), of compute and what is waited for.

The shares are assumptions until they are measured: a file of constants (`Constants.read`, made by `plan/calibrate.py`)
replaces any of them, and the chip's own figures too.
Sources: Austin et al., How to Scale Your Model; Williams et al., Roofline (2009); figures of chips: `mesh/hardware.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from shardtrain.errors import ConfigError, suggestion
from shardtrain.mesh import Chip, Target
from shardtrain.mesh.build import SLOW, across_slices
from shardtrain.parallel.stages import STAGE
from shardtrain.plan.paper import Work

HOST = "host"  # stands for an axis in a cost
HIDDEN_AXES = (*SLOW, "data", "fsdp", "context", HOST)  # what runs beside compute, if anything does
_FITTED = "compute fitted to published steps on {}"
REACHED = {
    **dict.fromkeys(("h100", "h200", "b200"), (0.39, _FITTED.format("H100 of 500 W"))),
    "a100": (0.605, _FITTED.format("A100")),
    "v6e": (0.62, _FITTED.format("v6e")),
    **dict.fromkeys(("v5e", "v5p", "tpu7x"), (0.815, _FITTED.format("v5p"))),
}
"""Family -> the share of its peak that products reach in training, and whence: `benchmarks/published.py`, which publishes what
the other reports make of it."""
_DTYPES = {"f8E4M3FN": "fp8", "f8E5M2": "fp8", "i8": "int8"}


@dataclasses.dataclass(frozen=True)
class Constants:
    """Shares of a chip's peaks that programs reach.

    `compute`: of peak FLOP/s in large products. `hbm`, `links`: of bandwidths. `hidden`: of what can hide, the share that
    does. `source`: where they come from; see `REACHED` for `compute` of known chips. `chip`: measured figures
    in place of the public ones.
    """

    compute: float = 0.75
    hbm: float = 0.8
    links: float = 0.8
    hidden: float = 0.8
    source: str = "assumed"
    chip: Chip | None = None

    @classmethod
    def of(cls, target: Target, file: str | os.PathLike[str] | None = None) -> Constants:
        """Of a target: those of its family in the file, or without a file ours.

        Raises:
            ConfigError: the file cannot be read, is of other hardware, or holds something that is no constant.
        """
        start = cls()
        if target.family in REACHED:
            share, of = REACHED[target.family]
            start = cls(compute=share, source=f"{of}; the other shares assumed")
        return start if file is None else start.read(file, target)

    def read(self, file: str | os.PathLike[str], target: Target) -> Constants:
        """With what a file of measured constants says: `{"h100": {"compute": 0.71, "source": "..."}}`, or what
        `shardtrain calibrate` wrote."""
        where = f"constants {file}"
        try:
            data = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read: {error}", where=where, fix="a JSON file") from error
        family = target.family
        if not isinstance(data, dict) or not all(isinstance(each, dict) for each in data.values()):
            raise ConfigError(
                "not an object of objects", where=where, fix='{"h100": {"compute": 0.7}}, family by family'
            )
        if family not in data:
            raise ConfigError(
                f"is of {', '.join(_named(*pair) for pair in data.items()) or 'no hardware'}, not of {family}",
                where=where,
                fix=f"shardtrain calibrate on a {family}, or no --constants",
            )
        given = {
            name: value for name, value in data[family].items() if name != "measured"
        }  # how it was found
        figures = given.pop("chip", None)
        chip = None if figures is None else _measured_chip(figures, target, where)
        fields = [f.name for f in dataclasses.fields(self)]
        for name, value in given.items():
            if name not in fields:
                raise ConfigError(
                    f"no constant '{name}'", where=where, fix=suggestion(name, fields, "compute")
                )
            share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
            if name != "source" and (not share or (name != "hidden" and value == 0)):
                raise ConfigError(f"{name} = {value!r}", where=where, fix="a share from 0 to 1, such as 0.7")
        source = given.pop("source", "measured")
        if not isinstance(source, str):
            raise ConfigError(f"source = {source!r}", where=where, fix="a text")
        said = source if source.startswith("measured") else f"measured: {source}"
        return dataclasses.replace(self, **given, chip=chip, source=f"{said}, {file}")


_FIGURES = ("hbm_bandwidth", "ici_bandwidth", "ici_hop_seconds", "dcn_bandwidth", "dcn_hop_seconds")


def _named(family: str, given: Mapping[str, Any]) -> str:
    measured = given.get("measured")
    kind = measured.get("device_kind") if isinstance(measured, dict) else None
    return f"{family} ({kind})" if kind and kind != family else family


def _measured_chip(figures: Any, target: Target, where: str) -> Chip:
    """The public figures with measured ones in their place; of a CPU there are no public ones, so all must be there."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf  # noqa: E731
    rates = figures.get("flops", {}) if isinstance(figures, dict) else None
    if not isinstance(rates, dict) or not all(map(number, rates.values())):
        raise ConfigError(
            "'chip' is no object of figures", where=where, fix="shardtrain calibrate --out FILE"
        )
    given = {name: value for name, value in figures.items() if name != "flops"}
    for name, value in given.items():
        if name not in _FIGURES:
            raise ConfigError(
                f"no figure '{name}'", where=where, fix=suggestion(name, _FIGURES, "ici_bandwidth")
            )
        if not number(value) or (not value and not name.endswith("seconds")):
            raise ConfigError(f"chip: {name} = {value!r}", where=where, fix="a number over 0")
    # JAX's own choice for products in float32 is what was timed, so they stand for the public figure of that choice.
    rates = rates | ({"tf32": rates["f32"]} if "f32" in rates else {})
    public = target.chip
    if public is None:
        alone = {"dcn_bandwidth": given.get("ici_bandwidth"), "dcn_hop_seconds": given.get("ici_hop_seconds")}
        given = {**alone, **given}
        lacking = [name for name in _FIGURES if given.get(name) is None] + ["flops.bf16"] * (
            "bf16" not in rates
        )
        if lacking:
            raise ConfigError(
                f"lacks {', '.join(lacking)} of {target.family}",
                where=where,
                why="no public figures are known",
                fix="shardtrain calibrate --out FILE",
            )
        return Chip(target.family, rates, hbm_bytes=0.0, source=where, **given)
    return dataclasses.replace(public, flops={**public.flops, **rates}, source=where, **given)


@dataclasses.dataclass(frozen=True)
class Link:
    """What an axis crosses: `name` (ICI, NVLink, network, DCN), bytes/s one way out of a device, seconds a hop; `hops`:
    how much further all-to-alls go than neighbours."""

    name: str
    bandwidth: float
    hop_seconds: float
    spread: float = 1.0


def links(target: Target, mesh: Mapping[str, int], chip: Chip | None = None) -> dict[str, Link]:
    """Axis -> what it crosses, for axes of more than one device. Axes are laid out as the mesh has them, inner ones on
    neighbours. `chip`: in place of the target's. Without figures of either: empty."""
    chip = chip or target.chip
    if chip is None:
        return {}
    return _torus(target, chip, mesh) if chip.links else _hosts(target, chip, mesh)


def _hosts(target: Target, chip: Chip, mesh: Mapping[str, int]) -> dict[str, Link]:
    found, stride, host = {}, 1, target.topology[-1]
    for axis, n in reversed(list(mesh.items())):
        inside = max(1, min(n, host // stride)) if stride < host else 1  # members in one host
        if n > 1 and inside == n:
            name = "NVLink" if target.platform == "cuda" else "memory"
            found[axis] = Link(name, chip.ici_bandwidth, chip.ici_hop_seconds)
        elif n > 1:
            bandwidth = min(chip.ici_bandwidth, inside * chip.dcn_bandwidth)
            found[axis] = Link("network", bandwidth, chip.dcn_hop_seconds)
        stride *= n
    return found


def _torus(target: Target, chip: Chip, mesh: Mapping[str, int]) -> dict[str, Link]:
    """Each axis takes whole dims of the torus where some multiply to it, inner axes first; else parts, without a ring."""
    one = chip.ici_bandwidth / chip.links
    left = {d: n for d, n in enumerate(target.topology)}
    cores = target.size // target.slices // math.prod(target.topology)
    outer = across_slices(mesh, target.slices) if target.slices > 1 else {}
    found = {}
    for axis, size in reversed(list(mesh.items())):
        n = size // outer.get(axis, 1)
        if n != size:  # the slowest of its links is what it waits for
            found[axis] = Link("DCN", chip.dcn_bandwidth, chip.dcn_hop_seconds)
        if n == 1:
            continue
        rest, bandwidth = n, 0.0
        shared = math.gcd(rest, cores)
        rest, cores = rest // shared, cores // shared
        whole = next(
            (c for k in (3, 2, 1) for c in _subsets(left, k) if math.prod(left[d] for d in c) == rest), ()
        )
        for d in whole:
            bandwidth += one * (2 if _closed(target, d) else 1)
            del left[d]
        if not whole:
            for d in sorted(left, key=lambda d: -math.gcd(left[d], rest)):
                part = math.gcd(left[d], rest)
                if part > 1:
                    rest, left[d], bandwidth = rest // part, left[d] // part, bandwidth + one
        if axis not in found:
            found[axis] = Link("ICI", bandwidth or 2 * one, chip.ici_hop_seconds, max(1.0, n / 4))
    return found


def _subsets(left: Mapping[int, int], count: int) -> Iterable[tuple[int, ...]]:
    return itertools.combinations([d for d, n in left.items() if n > 1], count)


def _closed(target: Target, dim: int) -> bool:
    """Whether links wrap around: on 3-D tori in multiples of four chips, on v5e and v6e along all sixteen."""
    n = target.topology[dim]
    return n % 4 == 0 if len(target.topology) == 3 else n == 16


@dataclasses.dataclass(frozen=True)
class Sent:
    """`bytes` over `axes` in a step, by `op`, in `count` runs. `asynchronous`: those of them that something may run beside, as
    the compiler scheduled it; None where no compiler has."""

    op: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    asynchronous: float | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one step. `axes`: axis -> seconds in all; `waited`: those of them that nothing hides.

    total = compute + hbm + sum(waited) + bubble. `links`: axis -> what it crosses. `taken`: (op, axis) -> seconds of `axes`.
    """

    compute: float
    hbm: float
    axes: Mapping[str, float]
    waited: Mapping[str, float]
    bubble: float
    links: Mapping[str, str]
    taken: Mapping[tuple[str, str], float]
    source: str

    @property
    def total(self) -> float:
        return self.compute + self.hbm + sum(self.waited.values()) + self.bubble

    @property
    def limit(self) -> str:
        """The largest term."""
        terms = {"compute": self.compute, "hbm": self.hbm, "bubble": self.bubble, **self.waited}
        return max(terms, key=lambda name: terms[name])

    def as_json(self) -> dict[str, Any]:
        """Seconds; an axis by its name, all that it takes, and what of it is waited for."""
        return {
            "compute": self.compute,
            "hbm": self.hbm,
            **self.axes,
            "bubble": self.bubble,
            "total": self.total,
            "waited": dict(self.waited),
        }


def cost(
    target: Target,
    mesh: Mapping[str, int],
    work: Iterable[Work],
    sent: Iterable[Sent],
    bubble: float,
    constants: Constants,
    source: str,
    hosted: float = 0.0,
    known: tuple[float, float] = (0.0, 0.0),
) -> Cost | None:
    """Seconds of a step; None where no figures of the chip are known.

    Args:
        work: of one device. sent: by one device. bubble: share of the stages' time in which they wait.
        source: of `work` and `sent`. hosted: bytes to the host's memory and back. known: seconds of `compute` and `hbm` of
            work besides.
    """
    chip = constants.chip or target.chip
    if chip is None:
        return None
    compute, hbm = known
    for products, memory in rooflines(work, target, constants):
        compute, hbm = compute + products, hbm + max(0.0, memory - products)
    crossed = links(target, mesh, chip)
    seconds: dict[str, float] = {}
    by_op: dict[tuple[str, str], float] = {}
    for s in sent:
        axes = [a for a in s.axes if a in crossed]
        if not axes or not s.bytes:
            continue
        link = min((crossed[a] for a in axes), key=lambda found: found.bandwidth)
        steps = sum(mesh[a] - 1 for a in axes) * (2 if s.op == "all-reduce" else 1)
        steps = 1 if s.op in ("collective-permute", "all-to-all") else steps
        far = link.spread if "all-to-all" in s.op else 1.0
        taken = s.bytes * far / (link.bandwidth * constants.links) + s.count * steps * link.hop_seconds
        name = "+".join(s.axes)
        seconds[name] = seconds.get(name, 0.0) + taken
        by_op[s.op, name] = by_op.get((s.op, name), 0.0) + taken
    if hosted:
        seconds[HOST] = by_op["copy", HOST] = hosted / (chip.host_bandwidth * constants.links)
    busy = compute + hbm
    may_hide = {a: t for a, t in seconds.items() if set(a.split("+")) <= set(HIDDEN_AXES)}
    wanted = constants.hidden * sum(may_hide.values())
    share = constants.hidden * min(1.0, busy / wanted) if wanted else 0.0
    waited = {a: t * (1 - share) if a in may_hide else t for a, t in seconds.items()}
    inside = busy + sum(t for a, t in waited.items() if a != STAGE)
    return Cost(
        compute=compute,
        hbm=hbm,
        axes=seconds,
        waited=waited,
        bubble=inside * bubble / (1 - bubble),
        links={a: link.name for a, link in crossed.items()} | ({HOST: "PCIe"} if hosted else {}),
        taken=by_op,
        source=f"estimated: {source}; constants of {chip.name} ({constants.source})",
    )


def rooflines(work: Iterable[Work], target: Target, constants: Constants) -> Iterable[tuple[float, float]]:
    """Of each, seconds of its products and of its bytes; 0 without figures of the chip."""
    chip = constants.chip or target.chip
    for w in work:
        if chip is None:
            yield 0.0, 0.0
            continue
        products = w.times * w.flops / (_peak(chip, w.dtype) * constants.compute)
        yield products, w.times * w.bytes / (chip.hbm_bandwidth * constants.hbm)


def _peak(chip: Chip, dtype: str) -> float:
    known = _DTYPES.get(dtype, dtype)
    if known == "f32":  # by JAX's default its products run in tf32 on GPUs, in one pass of bf16 on TPUs
        return chip.flops.get("tf32", chip.flops["bf16"])
    return chip.flops.get(known, chip.flops["bf16"])
