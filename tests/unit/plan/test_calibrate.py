"""Latency and bandwidth out of timings that are known, and the file that plans read."""

import dataclasses
import itertools
import json
import math

import jax
import pytest

import shardtrain as st
from shardtrain.mesh import CHIPS
from shardtrain.plan import calibrate as room
from shardtrain.plan.calibrate import Calibration, Sending, Value, calibrate
from shardtrain.plan.cost import Constants, Sent, cost
from shardtrain.plan.latency import Fit, Timing, fit
from shardtrain.plan.paper import Work

SIZES = [2.0**16, 2.0**19, 2.0**22, 2.0**24]
CASES = list(itertools.product([0.0, 1e-6, 2e-4], [1e8, 4.5e11]))


def timings(latency, bandwidth, hops=(7.0,)):
    return [Timing(h, s, h * latency + s / bandwidth) for h in hops for s in SIZES]


@pytest.mark.parametrize(("latency", "bandwidth"), CASES)
@pytest.mark.parametrize("hops", [(7.0,), (1.0, 7.0, 14.0)])
def test_what_follows_the_formula_is_found(latency, bandwidth, hops):
    """Latency and bandwidth come back as they were put in. Failed once with latency a run in place of a hop."""
    found = fit(timings(latency, bandwidth, hops))
    assert found.hop_seconds == pytest.approx(latency, rel=1e-6, abs=1e-12)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-6)
    assert found.residual < 1e-9 and found.dropped == 0


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("factor", [0.2, 1.7, 30.0])
@pytest.mark.parametrize(("latency", "bandwidth"), [(2e-4, 1e9), (1e-6, 4.5e11)])
def test_one_of_four_may_be_anything(place, factor, latency, bandwidth):
    """The other three give the constants exactly, the largest size among those that may be wrong. Failed once as least
    squares; a median of slopes would fail too, of which three in six are wrong.
    """
    points = timings(latency, bandwidth)
    points[place] = points[place]._replace(seconds=factor * points[place].seconds)
    found = fit(points)
    assert found.hop_seconds == pytest.approx(latency, rel=1e-6)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-6) and found.dropped == 1


def test_noise_is_not_dropped():
    """A few per cent up and down: nothing is left out, and the residual says how much. The fault in mind: a fit through
    two points that calls the others wrong."""
    points = [
        t._replace(seconds=t.seconds * (1.03 if i % 2 else 0.97))
        for i, t in enumerate(timings(1e-4, 1e9, (1.0, 7.0)))
    ]
    found = fit(points)
    assert found.dropped == 0 and 0.01 < found.residual < 0.05
    assert found.bandwidth == pytest.approx(1e9, rel=0.1) and found.hop_seconds == pytest.approx(
        1e-4, rel=0.1
    )
    with pytest.raises(ValueError, match="2 timings"):
        fit(points[:2])


def measured(target="h100:1x8", bandwidth=3e11):
    """A calibration by hand."""
    value = Value(5e14, 0.01)
    link = Fit(3e-6, bandwidth, 0.02, 0)
    points = tuple(timings(3e-6, bandwidth))
    return Calibration(
        target=st.Target(target), kind="some kind", flops={"bf16": value, "f32": Value(2e14, 0.01)},
        memory=Value(2e12, 0.03), dispatch=Value(1e-5, 0.1), sendings=(Sending("inside", 8, "all-gather", points, link),),
        links={"inside": link}, date="2026-01-01", seconds=1.0,
    )  # fmt: skip


def read(calibration, tmp_path, target=None):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps(calibration.constants()))
    return Constants.of(st.Target(target or calibration.target), file)


def test_what_was_measured_is_what_a_step_takes(tmp_path):
    """A second's worth of each by the measured figures takes a second, also of a chip whose public ones are known, and of
    a CPU, where none are. Failed once with the public share of a peak on top of the measured rate.
    """
    mesh = {"data": 8}
    for target in ("h100:1x8", "cpu:8"):
        constants = dataclasses.replace(read(measured(target), tmp_path), hidden=0.0)

        def one(work=(), sent=(), target=target, constants=constants):
            return cost(st.Target(target), mesh, work, sent, 0.0, constants, "by hand")

        assert one([Work("bf16", 5e14, 0.0, 1.0)]).total == pytest.approx(1)
        assert one([Work("f32", 2e14, 0.0, 1.0)]).total == pytest.approx(1)
        assert one([Work("f32", 0.0, 2e12, 1.0)]).total == pytest.approx(1)
        sent = one(sent=[Sent("all-gather", ("data",), 3e11, 10)])
        assert sent.total == pytest.approx(1 + 10 * 7 * 3e-6)
        assert "measured on 8 x some kind, 2026-01-01" in sent.source
    assert cost(st.Target("cpu:8"), mesh, [Work("f32", 1.0, 0.0, 1.0)], (), 0.0, Constants(), "") is None


def test_links_of_a_torus_keep_their_share(tmp_path):
    """On eight v5e an axis reaches half of what its links have: so does any other axis. Failed once with the rate of one
    axis taken for that of all four links."""
    target = st.Target("v5e:2x4")
    whole = room.links(target, {"across": 1, "inside": 8})["inside"].bandwidth
    found = read(measured("v5e:2x4", bandwidth=whole / 2), tmp_path, "v5e:16x16")
    assert found.chip.ici_bandwidth == pytest.approx(CHIPS["v5e"].ici_bandwidth / 2)
    assert found.chip.dcn_bandwidth == CHIPS["v5e"].dcn_bandwidth and found.links == 1.0


def test_other_hardware_is_refused_by_name(tmp_path):
    """Failed once with the assumed constants in their place, without a word."""
    with pytest.raises(st.errors.ConfigError, match=r"is of h100 \(some kind\), not of a100"):
        read(measured(), tmp_path, "a100:1x8")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chip": 3}, "chip"),
        ({"chip": {"flops": {"bf16": "fast"}}}, "chip"),
        ({"chip": {"flops": {"bf16": math.inf}}}, "chip"),
        ({"chip": {"ici_bandwith": 1.0}}, "ici_bandwidth"),
        ({"chip": {"hbm_bandwidth": 0}}, "hbm_bandwidth = 0"),
        ({"chip": {"flops": {"bf16": 1.0}, "hbm_bandwidth": 1.0}}, "lacks ici_bandwidth"),
        ({"compute": True}, "compute"),
        ({"source": 7}, "source"),
    ],
)
def test_what_is_no_constant_is_refused(change, says, tmp_path):
    """Each names what is wrong. The fault in mind: a division by a rate of 0, minutes later."""
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"cpu": measured("cpu:8").constants()["cpu"] | change}))
    with pytest.raises(st.errors.ConfigError, match=says):
        Constants.of(st.Target("cpu:8"), file)


def test_eight_devices(monkeypatch, tmp_path):
    """Every rate is there, over 0 and finite; what each collective sends and how many steps it takes follow from its kind;
    the file is read back. Small, so that it is quick: the numbers mean nothing here.
    """
    monkeypatch.setattr(room, "PAYLOADS", (2**13, 2**15, 2**17))
    monkeypatch.setattr(room, "MEMORY", 2**16)
    monkeypatch.setattr(room, "ENOUGH", 0.0)
    monkeypatch.setattr(room, "ROUNDS", 2)
    found = calibrate(jax.devices())
    assert found.target.name == "cpu:8" and {s.op for s in found.sendings} == set(room.OPS)
    rates = [*found.flops.values(), found.memory, found.dispatch]
    assert all(0 < v.value < math.inf and 0 <= v.residual < 10 for v in rates)
    for s in found.sendings:
        sent = {"all-reduce": 14 / 8, "collective-permute": 1}.get(s.op, 7 / 8)
        hops = {"all-reduce": 14, "collective-permute": 1, "all-to-all": 1}.get(s.op, 7)
        assert [(t.hops, t.bytes) for t in s.timings] == [(hops, sent * p) for p in room.PAYLOADS]
        assert s.fit.bandwidth > 0 and all(t.seconds > 0 for t in s.timings)
    constants = read(found, tmp_path)
    assert constants.chip.flops["bf16"] == found.flops["bf16"].value
    assert constants.chip.ici_bandwidth == found.links["inside"].bandwidth
    assert constants.chip.ici_hop_seconds == found.links["inside"].hop_seconds


@pytest.mark.parametrize("op", room.OPS)
def test_each_chain_is_the_collective_that_it_is_called(op):
    """As many of its kind in the compiled program as the chain is long, over all eight devices: none merged or left out.

    The fault in mind: a compiler that sees that a sum of sums is one sum.
    """
    from jax.sharding import PartitionSpec

    from shardtrain.plan import hlo

    mesh = st.make_mesh(data=8)
    spec = PartitionSpec("data")
    run = jax.jit(
        jax.shard_map(room._chain(op, "data", 8), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    text = run.lower(jax.ShapeDtypeStruct((8, 1024), "float32")).compile().as_text()
    sent = [(c.op, c.axes, c.count) for c in hlo.collectives(text, mesh) if c.axes]
    kind = {"reduce-scatter": ("reduce-scatter", "all-reduce")}.get(op, (op,))
    assert sum(n for found, axes, n in sent if found in kind and axes == ("data",)) == room.CHAIN
