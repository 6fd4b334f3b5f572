"""Named device meshes, distributed start-up, and what the hardware can do."""

from shardtrain.mesh.build import AXES, AnyMesh, make_mesh, simulate_devices
from shardtrain.mesh.distributed import init_distributed, leave, processes_expected, wait_for_all
from shardtrain.mesh.hardware import CHIPS, Chip, chip_of, device_of
from shardtrain.mesh.target import Target

__all__ = [
    "AXES",
    "CHIPS",
    "AnyMesh",
    "Chip",
    "Target",
    "chip_of",
    "device_of",
    "init_distributed",
    "leave",
    "make_mesh",
    "processes_expected",
    "simulate_devices",
    "wait_for_all",
]
