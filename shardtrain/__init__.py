"""shardtrain: shard any JAX model over any named mesh.

Names are imported when first used, so that programs that never touch JAX do not load it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "shardtrain.checkpoint": ("Checkpointer",),
    "shardtrain.data": ("ArrayLoader", "TokenLoader"),
    "shardtrain.errors": (
        "CheckpointError",
        "CompileError",
        "ConfigError",
        "DataError",
        "DependencyError",
        "LaunchError",
        "MeshError",
        "RunError",
        "ShardTrainError",
        "ShardingError",
    ),
    "shardtrain.mesh": ("Target", "init_distributed", "make_mesh", "simulate_devices"),
    "shardtrain.parallel.attention": ("attention",),
    "shardtrain.parallel.fsdp": ("gather",),
    "shardtrain.parallel.groups": ("Loss",),
    "shardtrain.parallel.lookup": ("lookup",),
    "shardtrain.parallel.sequence": ("positions",),
    "shardtrain.parallel.stages": ("Stages",),
    "shardtrain.plan.audit": ("audit",),
    "shardtrain.plan.expected": ("assert_collectives",),
    "shardtrain.plan.fit": ("Run", "fit"),
    "shardtrain.plan.model": ("linen",),
    "shardtrain.plan.given": ("batch_spec",),
    "shardtrain.plan.plan": ("Plan",),
    "shardtrain.plan.verify": ("verify",),
    "shardtrain.sharding": ("Rules", "annotate", "constrain", "logical"),
    "shardtrain.train.guard": ("Guard",),
    "shardtrain.train.state": ("TrainState",),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {
    "plan": "shardtrain.plan",
    "rules": "shardtrain.parallel.presets",
    "schedules": "shardtrain.parallel.schedules",
    "timeline": "shardtrain.parallel.timeline",
}

__all__ = ["__version__", *sorted([*_MODULES, *_WHERE])]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'shardtrain' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
