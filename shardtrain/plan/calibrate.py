"""What the devices at hand reach: products by dtype, memory, collectives by axis, and what it costs to start a program.

All devices work at the same time, since those that are simulated share their cores. A collective runs four times in one
program, each on what the one before left, and the start of a program is taken off. Of several rounds the median counts;
`residual` is the median distance from it, as a share, or of a fit what `plan/latency.py` says.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.errors import ConfigError
from shardtrain.mesh import Target, chip_of
from shardtrain.plan.cost import links
from shardtrain.plan.latency import Fit, Timing, fit

ROUNDS = 5
ENOUGH = 0.05  # seconds that a product has to take to be measured
LARGEST = 8192
MEMORY = 2**25  # bytes of each device that are read, and as many written
PAYLOADS = (2**16, 2**19, 2**22, 2**24)  # bytes of the whole array, on each device
CHAIN = 4
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
OPS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu")


@dataclasses.dataclass(frozen=True)
class Value:
    """`residual`: as a share of the value."""

    value: float
    residual: float

    def as_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sending:
    """One collective over one axis of `devices`: its timings, and what they come to."""

    axis: str
    devices: int
    op: str
    timings: tuple[Timing, ...]
    fit: Fit

    def as_json(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "devices": self.devices,
            "op": self.op,
            "latency_seconds": self.fit.hop_seconds * self.timings[0].hops,
            "bytes_per_second": self.fit.bandwidth,
            "residual": self.fit.residual,
            "dropped": self.fit.dropped,
            "timings": [{"bytes": t.bytes, "seconds": t.seconds} for t in self.timings],
        }


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was measured on `target`. `flops`: FLOP/s of one device by dtype. `memory`: bytes/s. `links`: axis -> fit of all
    its collectives together. `dispatch`: seconds to start a program and see its end."""

    target: Target
    kind: str
    flops: Mapping[str, Value]
    memory: Value
    dispatch: Value
    sendings: tuple[Sending, ...]
    links: Mapping[str, Fit]
    date: str
    seconds: float

    def chip(self) -> dict[str, Any]:
        """Figures of the chip as `mesh.Chip` names them. Where public ones are known, a link has of them the share that an
        axis reached of what `cost.links` says of it."""
        public = self.target.chip
        found: dict[str, Any] = {
            "flops": {name: v.value for name, v in self.flops.items()},
            "hbm_bandwidth": self.memory.value,
        }
        for name, where in (("ici", "inside"), ("dcn", "across")):
            seen = self.links.get(where)
            if seen is None:
                continue
            bandwidth = seen.bandwidth
            if public is not None:
                mesh = _sizes(self.target, self._hosts)
                bandwidth *= getattr(public, f"{name}_bandwidth") / links(self.target, mesh)[where].bandwidth
            found |= {f"{name}_bandwidth": bandwidth, f"{name}_hop_seconds": seen.hop_seconds}
        return found

    @property
    def _hosts(self) -> int:
        return next((s.devices for s in self.sendings if s.axis == "across"), 1)

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target.name,
            "device_kind": self.kind,
            "devices": self.target.size,
            "date": self.date,
            "versions": versions(),
            "host": f"{platform.machine()}, {platform.system()}",
            "flops": {name: v.as_json() for name, v in self.flops.items()},
            "memory_bytes_per_second": self.memory.as_json(),
            "dispatch_seconds": self.dispatch.as_json(),
            "links": {axis: dataclasses.asdict(f) for axis, f in self.links.items()},
            "collectives": [s.as_json() for s in self.sendings],
            "seconds": self.seconds,
        }

    def constants(self) -> dict[str, Any]:
        """What `Constants.read` takes: the figures are what is reached, so the shares of them are 1. What hides is not
        measured, and stays as it was assumed."""
        said = f"measured on {self.target.size} x {self.kind}, {self.date}"
        shares = {"compute": 1.0, "hbm": 1.0} | ({"links": 1.0} if self.links else {})
        return {
            self.target.family: {
                **shares,
                "chip": self.chip(),
                "source": f"{said}; what hides is assumed",
                "measured": self.as_json(),
            }
        }


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def target_of(devices: Sequence[Any]) -> Target:
    """The target that these devices are.

    Raises:
        ConfigError: no figures of their kind are known, and they are no CPUs.
    """
    first, n = devices[0], len(devices)
    chip = chip_of(first)
    if first.platform == "cpu":
        return Target(f"cpu:{n}")
    if chip is None:
        raise ConfigError(
            f"'{first.device_kind}' is no family that plans are made for",
            where="devices",
            fix="--devices cpu:8",
        )
    if first.platform != "tpu":
        hosts = len({d.process_index for d in devices})
        return Target(f"{chip.name}:{hosts}x{n // hosts}")
    dims = [max(d.coords[i] for d in devices) + 1 for i in range(len(first.coords))]
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    flat = dims[:2] if chip.links == 4 else dims
    return Target(f"{slices}*{chip.name}:{'x'.join(map(str, flat))}")


def _sizes(target: Target, hosts: int) -> dict[str, int]:
    return {"across": hosts, "inside": target.size // hosts}


def calibrate(devices: Sequence[Any], say: Callable[[str], None] = lambda line: None) -> Calibration:
    """Measure; under a minute on eight simulated devices. Sends what the collectives of `OPS` do, at the sizes of `PAYLOADS`.

    Raises:
        ConfigError: devices of an unknown kind.
    """
    started = time.monotonic()
    target = target_of(devices)
    hosts = len({d.process_index for d in devices})
    mesh = Mesh(
        np.asarray(devices).reshape(tuple(_sizes(target, hosts).values())),
        ("across", "inside"),
        axis_types=(AxisType.Auto,) * 2,
    )
    everywhere = NamedSharding(mesh, PartitionSpec(("across", "inside")))
    dispatch = _median(_times(lambda x: x + 1, [jnp.zeros(len(devices))], everywhere, ROUNDS * 4))
    flops = {}
    for name, dtype in DTYPES.items():
        flops[name] = _product(mesh, everywhere, dtype, dispatch.value)
        say(f"products in {name}: {flops[name].value:.3g} FLOP/s a device")
    memory = _memory(mesh, everywhere, dispatch.value)
    say(f"memory: {memory.value:.3g} bytes/s a device")
    sendings = []
    for axis, size in mesh.shape.items():
        if size > 1:
            sendings += [_sending(mesh, axis, op, dispatch.value) for op in OPS]
            say(f"{len(OPS)} collectives over {size} devices {axis}, {time.monotonic() - started:.0f} s")
    together = {
        axis: fit([t for s in sendings if s.axis == axis for t in s.timings])
        for axis in dict.fromkeys(s.axis for s in sendings)
    }
    return Calibration(
        target=target,
        kind=devices[0].device_kind,
        flops=flops,
        memory=memory,
        dispatch=dispatch,
        sendings=tuple(sendings),
        links=together,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=time.monotonic() - started,
    )


def _times(function: Callable[..., Any], values: Sequence[Any], sharding: Any, rounds: int) -> list[float]:
    """Seconds of each run of a program on values that are placed before; compiled and run once first.

    One of a single value gets its own result again, in the same memory: new pages would cost more than what is measured.
    """
    placed = [jax.device_put(v, sharding) for v in values]
    again = len(values) == 1
    run = jax.jit(function, donate_argnums=0 if again else (), out_shardings=sharding)
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        made = jax.block_until_ready(run(*placed))
        found.append(time.perf_counter() - start)
        placed = [made] if again else placed
    return found[1:]


def _median(times: Sequence[float]) -> Value:
    middle = statistics.median(times)
    return Value(middle, statistics.median(abs(t - middle) for t in times) / middle)


def _rate(amount: float, times: Sequence[float], dispatch: float) -> Value:
    middle = _median(times)
    return Value(amount / max(middle.value - dispatch, 0.1 * middle.value), middle.residual)


def _alone(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """On every device by itself; its part comes with a leading 1."""
    spec = PartitionSpec(("across", "inside"))
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _product(mesh: Mesh, everywhere: Any, dtype: Any, dispatch: float) -> Value:
    """A square product on every device, twice as wide until it takes long enough."""
    width = 256
    while True:
        x = jnp.ones((mesh.size, width, width), dtype)
        times = _times(_alone(mesh, lambda a, b: (a[0] @ b[0])[None]), [x, x], everywhere, ROUNDS)
        if statistics.median(times) >= ENOUGH or width >= LARGEST:
            return _rate(2 * width**3, times, dispatch)
        width *= 2


def _memory(mesh: Mesh, everywhere: Any, dispatch: float) -> Value:
    """Reads and writes of a large array."""
    x = jnp.ones((mesh.size, MEMORY // 4), jnp.float32)
    times = _times(_alone(mesh, lambda a: a + 1), [x], everywhere, ROUNDS)
    return _rate(2 * MEMORY, times, dispatch)


def _sending(mesh: Mesh, axis: str, op: str, dispatch: float) -> Sending:
    n = mesh.shape[axis]
    sent = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(op, (n - 1) / n)
    hops = {"all-reduce": 2 * (n - 1), "collective-permute": 1, "all-to-all": 1}.get(op, n - 1)
    everywhere = NamedSharding(mesh, PartitionSpec(("across", "inside")))
    timings = []
    for payload in PAYLOADS:
        length = payload // 4 // n * n
        x = jnp.ones((mesh.size, length), jnp.float32)
        middle = _median(_times(_alone(mesh, _chain(op, axis, n)), [x], everywhere, ROUNDS)).value
        one = max(middle - dispatch, 0.1 * middle) / CHAIN
        timings.append(Timing(hops, sent * 4 * length, one))
    return Sending(axis, n, op, tuple(timings), fit(timings))


def _chain(op: str, axis: str, n: int) -> Callable[[Any], Any]:
    """The collective over and over, each on what the one before left: a barrier keeps the compiler from seeing that."""

    def one(x: Any) -> Any:
        part = x.shape[0] // n
        if op == "all-gather":
            return lax.all_gather(x[:part], axis, tiled=True)
        if op == "reduce-scatter":
            return lax.dynamic_update_slice(x, lax.psum_scatter(x, axis, tiled=True) / n, (0,))
        if op == "all-reduce":
            return lax.psum(x, axis) / n
        if op == "all-to-all":
            return lax.all_to_all(x, axis, 0, 0, tiled=True)
        return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])

    def chained(x: Any) -> Any:
        x = x[0]
        for _ in range(CHAIN):
            x = lax.optimization_barrier(one(x))
        return x[None]

    return chained
