"""Meshes, simulated devices, joining processes, hardware facts."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

import shardtrain as st
from shardtrain.errors import MeshError
from shardtrain.mesh import AXES, CHIPS, chip_of, distributed
from shardtrain.mesh.build import across_slices, device_grid, named_sizes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tensor": 2, "data": 2, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({}, {"data": 8}),
        ({"data": 2, "dcn": {"data": 2}, "tensor": 2}, {"slice": 2, "data": 2, "tensor": 2}),
        ({"fsdp": 2, "dcn": {"fsdp": 2}, "tensor": 2}, {"slice_fsdp": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 4, "dcn": {"stage": 2}}, {"stage": 2, "data": 4}),
        ({"stage": 2, "data": 2, "dcn": {"stage": 2}}, {"stage": 4, "data": 2}),
        ({"mine": 2, "data": 4}, {"data": 4, "mine": 2}),
        ({"data": 8, "tensor": 1}, {"data": 8, "tensor": 1}),
    ],
)
def test_sizes_and_order(sizes, expected):
    """Failed once with axes in the order of the call."""
    mesh = st.make_mesh(**sizes)
    assert type(mesh) is jax.sharding.Mesh
    assert list(mesh.shape.items()) == list(expected.items())
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)
    assert [d.id for d in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, ["data=3", "3 positions", "8 devices", "cpu:3"]),
        ({"data": 4, "tensor": 4}, ["16 positions", "8 devices", "tensor=2"]),
        ({"data": -1, "fsdp": -1}, ["data, fsdp"]),
        ({"data": -1, "tensor": 3}, ["8 devices", "3"]),
        ({"data": 0}, ["0", "data"]),
        ({"data": 2.0}, ["2.0"]),
        ({"tensor": 4, "dcn": {"tensor": 2}}, ["tensor", "slice=2"]),
        ({"stage": -1, "dcn": {"stage": 2}}, ["stage=-1", "a size"]),
        ({"slice": 2, "data": 2, "dcn": {"data": 2}}, ["dcn", "slice"]),
    ],
)
def test_wrong_sizes(sizes, words):
    """The fault in mind: JAX's own error."""
    with pytest.raises(st.MeshError) as caught:
        st.make_mesh(**sizes)
    assert all(word in str(caught.value) for word in [*words, "try: "]), str(caught.value)


def test_some_devices():
    """The fault in mind: the order given was lost."""
    chosen = [jax.devices()[i] for i in (3, 1)]
    assert list(st.make_mesh(devices=chosen, data=2).devices.flat) == chosen


def run(code):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


def test_simulated_devices():
    """Works first; says why not when it is too late; is content when it is so already."""
    code = """
import jax, shardtrain as st
st.simulate_devices(4); print(len(jax.devices()))
st.simulate_devices(4)
try: st.simulate_devices(8)
except st.MeshError as error: print(error)
"""
    done = run(code)
    assert done.stdout.startswith("4\n") and "already started with 4 cpu" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "restart" in done.stdout


@pytest.fixture
def joined(monkeypatch):
    calls = []
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "OMPI_", "JAX_NUM", "JAX_COORD", "TPU_", "MEGASCALE", "JOB_", "CUDA_VIS")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("shardtrain.mesh.distributed._until_it_listens", lambda *_: None)
    return calls


def test_one_process_does_nothing(joined):
    """The fault in mind: calling initialize."""
    assert "one process" in st.init_distributed() and not joined
    assert "one process" in st.init_distributed("h:1", 1, 0) and not joined


@pytest.mark.parametrize(
    ("tasks", "local", "expected"), [("1", "0", list(range(8))), ("8(x2)", "3", [3]), ("4", "1", [2, 3])]
)
def test_gpus_are_divided(joined, monkeypatch, tasks, local, expected):
    """One task per 8-GPU node sees all eight; JAX alone would see one."""
    environment = {
        "SLURM_NTASKS": "16", "SLURM_LOCALID": local, "SLURM_STEP_TASKS_PER_NODE": tasks,
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "SLURM" in st.init_distributed()
    assert joined[0][1]["local_device_ids"] == expected


def test_explicit_and_environment(joined, monkeypatch):
    """The fault in mind: the process id of the environment ignored."""
    st.init_distributed("10.0.0.1:1234", 4, 2)
    assert joined[0][0] == ("10.0.0.1:1234", 4, 2)
    for name, value in {
        "JAX_COORDINATOR_ADDRESS": "h:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    st.init_distributed()
    assert joined[1][0] == ("h:1", 2, 1)


@pytest.mark.parametrize("arguments", [(None, 2, 0), ("h:1", 2, 2), ("h:1", 2, None), ("host", 2, 0)])
def test_incomplete_arguments(joined, arguments):
    """The fault in mind: a hang, or JAX's own error."""
    with pytest.raises(st.LaunchError, match="try: "):
        st.init_distributed(*arguments)
    assert not joined


def test_gpus_that_do_not_divide(joined, monkeypatch):
    """The fault in mind: giving the rest to nobody."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    with pytest.raises(st.LaunchError, match="3 GPUs"):
        distributed.init_distributed()


def test_who_has_joined_leaves_at_once(monkeypatch, capfd):
    """JAX's own exit waits for the others, and they for this process. Failed once by leaving with sys.exit."""
    from shardtrain.cli import main

    left = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    assert main(["train", "nothing.py:tiny"]) == 2 and left == []
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    assert main(["train", "nothing.py:tiny"]) == 2 and left == [2]
    assert main(["config", "configs/gpt.py:tiny"]) == 0 and left == [2]  # who is done waits for the others
    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(distributed.sys, "excepthook", lambda *_: print("trace"))
        distributed._leave_at_once()
        for error in (KeyError("planted"), st.ConfigError("wrong"), st.RunError("failed")):
            distributed.sys.excepthook(type(error), error, None)
    assert left[1:] == [3, 2, 3] and capfd.readouterr().out.split() == ["trace"] * 3


def test_hardware_facts():
    """Every figure has a source and the size it should: a typing slip of 1000 fails."""
    assert set(CHIPS) == {"v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200"}
    for chip in CHIPS.values():
        assert chip.source and 1e14 < chip.flops["bf16"] < 1e16
        assert 10e9 < chip.hbm_bytes < 2e11 and 5e11 < chip.hbm_bandwidth < 1e13
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
        assert 0.9 * chip.hbm_bytes < chip.usable_bytes < chip.hbm_bytes
        assert chip.ici_hop_seconds < chip.dcn_hop_seconds < 1e-4

    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    names = {
        "TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H200": "h200", "NVIDIA B200": "b200", "TPU7x": "tpu7x",
    }  # fmt: skip
    assert {k: chip_of(Device(k)).name for k in names} == names
    assert chip_of(jax.devices()[0]) is None
    assert AXES == ("slice", "slice_fsdp", "stage", "data", "fsdp", "expert", "context", "tensor")


@pytest.mark.parametrize(
    ("shape", "slices", "wanted"),
    [
        ({"slice": 2, "data": 4}, 2, {"slice": 2, "data": 1}),
        ({"slice_fsdp": 2, "fsdp": 4}, 2, {"slice_fsdp": 2, "fsdp": 1}),
        ({"stage": 4, "data": 4}, 2, {"stage": 2, "data": 1}),
        ({"slice": 2, "stage": 4, "data": 2}, 4, {"slice": 2, "stage": 2, "data": 1}),
    ],
)
def test_across_slices(shape, slices, wanted):
    """Stages go across where no axis of the slow network does. The fault in mind: stages within a slice, rows across."""
    assert across_slices(shape, slices) == wanted


@pytest.mark.parametrize("shape", [{"data": 8}, {"slice": 4, "data": 2}, {"stage": 3, "data": 2}])
def test_slices_that_no_axis_crosses(shape):
    with pytest.raises(MeshError, match="2 slices"):
        across_slices(shape, 2)


def test_stages_are_placed_across_slices():
    """TPU slices of 4 chips: the first two stages of four in one, the others in the other."""

    @dataclasses.dataclass(frozen=True)
    class Chip:
        id: int
        slice_index: int
        coords: tuple
        platform: str = "tpu"
        device_kind: str = "TPU v5 lite"
        core_on_chip: int = 0
        process_index: int = 0

    chips = [Chip(4 * s + i, s, (i % 2, i // 2, 0)) for s in (0, 1) for i in range(4)]
    grid = device_grid(named_sizes(8, stage=2, data=2, dcn={"stage": 2}), chips)
    assert grid.shape == (4, 2)
    assert [[c.slice_index for c in row] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
