"""Targets: hardware by name, present or not."""

import pytest

import shardtrain as st


@pytest.mark.parametrize(
    ("name", "size", "platform", "slices"),
    [
        ("v5e:2x4", 8, "tpu", 1),
        ("V5E:16x16", 256, "tpu", 1),
        ("2*v5e:16x16", 512, "tpu", 2),
        ("v5p:4x4x8", 128, "tpu", 1),
        ("tpu7x:4x4x4", 128, "tpu", 1),
        ("h100:2x8", 16, "cuda", 1),
        ("cpu:64", 64, "cpu", 1),
    ],
)
def test_names(name, size, platform, slices):
    """Two devices a chip on tpu7x: failed once when chips were counted as devices."""
    target = st.Target(name)
    assert (target.size, target.platform, target.slices) == (size, platform, slices)
    assert st.Target(str(target)) == target and st.Target(target) == target


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e", "not a target"),
        ("v5p-128", "not a target"),
        ("v5:2x4", "'v5p', or"),
        ("v5e:2x4x4", "a shape of 3 dims, v5e has 2"),
        ("v5e:0x4", "1 or more"),
        ("h100:0x8", "1 or more"),
        ("v5e:32x32", "v5e:1x1, 2x2, 2x4"),
        ("v6e:4x2", "v6e:2x4"),
        ("v5p:3x3x3", "v5p:2x2x1, 2x2x2"),
        ("v5p:8x8x4", "v5p:4x8x8"),
        ("v5p:16x24x24", "4x4x4, and multiples of 4"),
        ("2*h100:1x8", "h100:2x8"),
        ("cpu:8; rm -rf /", "not a target"),
    ],
)
def test_wrong_names_say_the_way_out(name, says):
    """Each message names what was given and something that works."""
    with pytest.raises(st.MeshError, match="target") as caught:
        st.Target(name)
    assert says in str(caught.value)


def test_a_mesh_of_a_target_is_checked_as_any_other():
    """The fault in mind: an abstract mesh of another size than the hardware."""
    mesh = st.Target("v5e:4x4").mesh(data=2, tensor=-1)
    assert dict(mesh.shape) == {"data": 2, "tensor": 8}
    assert mesh.abstract_device.platform == "tpu"
    with pytest.raises(st.MeshError, match="16 devices"):
        st.Target("v5e:4x4").mesh(data=3)
    with pytest.raises(st.MeshError, match="2 slices, the mesh says slice=1"):
        st.Target("2*v5e:4x4").mesh(data=-1)
    assert dict(st.Target("2*v5e:4x4").mesh(fsdp=-1, dcn={"data": 2}).shape) == {"slice": 2, "fsdp": 16}
    assert dict(st.Target("2*v5e:4x4").mesh(data=-1, dcn={"stage": 2}).shape) == {"stage": 2, "data": 16}
