"""Named device meshes, distributed start-up, and what the hardware can do."""

from shardtrain.mesh.board import service_board
from shardtrain.mesh.build import AXES, AnyMesh, make_mesh, simulate_devices
from shardtrain.mesh.distributed import gathered, init_distributed, leave, processes_expected, wait_for_all
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
    "gathered",
    "init_distributed",
    "leave",
    "make_mesh",
    "processes_expected",
    "service_board",
    "simulate_devices",
    "wait_for_all",
]
