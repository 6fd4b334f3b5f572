"""The cost model by hand, on numbers that divide."""

import dataclasses
import json

import pytest

import shardtrain as st
from shardtrain.mesh import CHIPS
from shardtrain.plan.cost import Constants, Sent, cost, links
from shardtrain.plan.paper import Work

ALL = Constants(compute=1.0, hbm=1.0, links=1.0, hidden=0.0)
H100, V5P = CHIPS["h100"], CHIPS["v5p"]


def seconds(target, mesh, *sent, work=(), bubble=0.0, constants=ALL):
    return cost(st.Target(target), mesh, work, sent, bubble, constants, "by hand")


def test_links_of_hosts():
    """An axis inside a host has NVLink; one that leaves it the adapters of its members in a host, 1 to 8.

    Failed once with one adapter for all that leave.
    """
    found = links(st.Target("h100:8x8"), {"data": 2, "fsdp": 16, "tensor": 2})
    assert {a: (link.name, link.bandwidth) for a, link in found.items()} == {
        "tensor": ("NVLink", H100.ici_bandwidth),
        "fsdp": ("network", 4 * H100.dcn_bandwidth),
        "data": ("network", H100.dcn_bandwidth),
    }
    alone = links(st.Target("h100:8x8"), {"fsdp": 64})["fsdp"]
    assert alone.bandwidth == 8 * H100.dcn_bandwidth


def test_links_of_a_torus():
    """Two links along each dim that closes. Failed once with an axis over one dim that had all six links."""
    one = V5P.ici_bandwidth / 6
    found = links(st.Target("v5p:4x4x8"), {"fsdp": 16, "tensor": 8})
    assert found["tensor"].bandwidth == 2 * one and found["fsdp"].bandwidth == 4 * one
    assert links(st.Target("v5p:4x4x8"), {"fsdp": 128})["fsdp"].bandwidth == V5P.ici_bandwidth
    # 4 of 16 chips of a v5e:4x4: no ring closes there
    assert links(st.Target("v5e:4x4"), {"fsdp": 4, "tensor": 4})["tensor"].bandwidth == 50e9
    slices = links(st.Target("2*v5e:16x16"), {"slice": 2, "fsdp": 256})
    assert slices["slice"].name == "DCN" and slices["fsdp"].name == "ICI"


def test_seconds_by_hand():
    """Each term alone. Failed once with the latency of an all-reduce counted for one ring."""
    product = Work("bf16", H100.flops["bf16"], 0.0, 2.0)
    assert seconds("h100:1x8", {"tensor": 8}, work=[product]).total == pytest.approx(2)
    moved = Work("f32", 0.0, H100.hbm_bandwidth, 3.0)
    found = seconds("h100:1x8", {"tensor": 8}, work=[product, moved])
    assert (found.compute, found.hbm) == pytest.approx((2, 3))
    sent = Sent("all-reduce", ("tensor",), H100.ici_bandwidth, 10)
    found = seconds("h100:1x8", {"tensor": 8}, sent)
    assert found.total == pytest.approx(1 + 10 * 2 * 7 * H100.ici_hop_seconds)
    found = seconds("h100:1x8", {"stage": 8}, work=[product], bubble=0.2)
    assert found.bubble == pytest.approx(0.5) and found.total * 0.8 == pytest.approx(2)


def test_what_hides():
    """Bytes of batch axes hide behind compute as far as there is any; those of tensor are waited for.

    Failed once with more hidden than there was compute.
    """
    hidden = dataclasses.replace(ALL, hidden=0.5)
    product = Work("bf16", H100.flops["bf16"], 0.0, 1.0)
    fsdp = Sent("all-gather", ("fsdp",), H100.ici_bandwidth, 0)
    tensor = Sent("all-reduce", ("tensor",), H100.ici_bandwidth, 0)
    mesh = {"fsdp": 4, "tensor": 2}
    found = seconds("h100:1x8", mesh, fsdp, tensor, work=[product], constants=hidden)
    assert found.waited == pytest.approx({"fsdp": 0.5, "tensor": 1.0}) and found.total == pytest.approx(2.5)
    much = dataclasses.replace(fsdp, bytes=4 * fsdp.bytes)
    assert seconds("h100:1x8", mesh, much, work=[product], constants=hidden).waited["fsdp"] == pytest.approx(
        3.0
    )


def test_measured_constants(tmp_path):
    """A file replaces what it names and is named as the source; one of another family, or what is no share, is refused."""
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"h100": {"compute": 0.5}}))
    found = Constants.of(st.Target("h100:1x8"), file)
    assert found.compute == 0.5 and found.hbm == Constants().hbm and "measured" in found.source
    with pytest.raises(st.errors.ConfigError, match="is of h100, not of a100"):
        Constants.of(st.Target("a100:1x8"), file)
    for bad in ({"h100": {"compute": 7}}, {"h100": {"speed": 1}}, {"h100": 3}, []):
        file.write_text(json.dumps(bad))
        with pytest.raises(st.errors.ConfigError, match="constants"):
            Constants.of(st.Target("h100:1x8"), file)
    file.write_text("{")
    with pytest.raises(st.errors.ConfigError, match="cannot be read"):
        Constants.of(st.Target("h100:1x8"), file)


def test_no_figures_no_seconds():
    """The fault in mind: a CPU priced as some chip."""
    assert seconds("cpu:8", {"data": 8}) is None
