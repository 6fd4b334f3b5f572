"""The HLO reader, the only one: what a compiled program sends, computes and asks of the host.

Reads the optimized text of the CPU, TPU and GPU compilers. Ids in replica groups are positions in the mesh.
"""

from shardtrain.plan.hlo.collectives import KINDS, Collective, Collectives
from shardtrain.plan.hlo.groups import mesh_axes, replica_groups
from shardtrain.plan.hlo.program import Program, collectives, host_transfers, read
from shardtrain.plan.hlo.text import HloError, Instruction, size

__all__ = [
    "KINDS",
    "Collective",
    "Collectives",
    "HloError",
    "Instruction",
    "Program",
    "collectives",
    "host_transfers",
    "mesh_axes",
    "read",
    "replica_groups",
    "size",
]
