"""Named device meshes, distributed start-up, and what the hardware can do."""

from shardtrain.mesh.build import AXES, make_mesh, simulate_devices
from shardtrain.mesh.distributed import init_distributed
from shardtrain.mesh.hardware import CHIPS, Chip, chip_of

__all__ = ["AXES", "CHIPS", "Chip", "chip_of", "init_distributed", "make_mesh", "simulate_devices"]
