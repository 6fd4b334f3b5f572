"""Checkpoints: written asynchronously and atomically, every byte digested, restored onto any mesh.

Importing this package does not import Orbax; only `arrays` does, when the first array is moved.
"""

from shardtrain.checkpoint.checkpointer import Checkpointer
from shardtrain.checkpoint.intact import newest as newest_intact
from shardtrain.checkpoint.intact import verify
from shardtrain.checkpoint.listing import inspect, list_steps
from shardtrain.checkpoint.lock import refuse_if_held
from shardtrain.checkpoint.manifest import versions
from shardtrain.checkpoint.remote import newest as newest_durable
from shardtrain.checkpoint.remote import refuse_if_taken
from shardtrain.checkpoint.restore import restore

__all__ = [
    "Checkpointer",
    "inspect",
    "list_steps",
    "newest_durable",
    "newest_intact",
    "refuse_if_held",
    "refuse_if_taken",
    "restore",
    "verify",
    "versions",
]
