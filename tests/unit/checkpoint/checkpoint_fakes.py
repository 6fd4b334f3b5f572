"""A state and a plan as small as a checkpoint can have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.checkpoint import commit, folder, manifest

FIELDS = ["step", "params", "model_state", "opt_state", "grad_state", "key", "cursor"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    grad_state: Any
    key: Any
    cursor: Any


def mesh_of(**axes: int) -> Mesh:
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


class FakePlan:
    """Dims of two and more go to `fsdp` and `tensor` where the mesh has them."""

    def __init__(self, mesh: Mesh, *, width: int = 16, optimizer: Any = None, dtype: Any = jnp.float32):
        self.mesh, self.width, self.dtype = mesh, width, dtype
        self.optimizer = optimizer or optax.adamw(1e-3)
        self.inits = 0
        shapes = jax.eval_shape(self._make, 0)
        self.abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding(x)), shapes
        )

    def _sharding(self, x: Any) -> NamedSharding:
        axes = [name if name in self.mesh.shape else None for name in ("fsdp", "tensor")]
        return NamedSharding(self.mesh, PartitionSpec(*axes) if x.ndim == 2 else PartitionSpec())

    def _make(self, seed: Any) -> State:
        key = jax.random.key(seed)
        params = {
            "blocks": [
                {"w": jax.random.normal(jax.random.fold_in(key, i), (16, self.width))} for i in range(2)
            ],
            "bias": jax.random.normal(key, (self.width,)),
        }
        params = jax.tree.map(lambda x: x.astype(self.dtype), params)
        opt_state = jax.tree.map(  # moments of zeros would hide a mix-up
            lambda x: jax.random.normal(key, x.shape, x.dtype) if x.ndim else x, self.optimizer.init(params)
        )
        return State(
            step=jnp.int32(0),
            params=params,
            model_state={
                "half": jax.random.normal(key, (16, 8), jnp.bfloat16),
                "none": jnp.zeros((0, 4)),
                "a/b": jnp.arange(3, dtype=jnp.int8),
            },
            opt_state=opt_state,
            grad_state={},
            key=jax.random.key_data(key),
            cursor=jnp.array([1, 5], jnp.uint32),
        )

    def init(self, seed: int) -> State:
        self.inits += 1
        return jax.jit(self._make, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state))(
            seed
        )

    def describe(self) -> dict[str, Any]:
        return {"mesh": dict(self.mesh.shape), "rules": "fake", "groups": 8, "tree": {}}


def at_step(state: State, step: int) -> State:
    """The same state at another step."""
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))


def make_step(path: Path, step: int, *, seed: int = 0) -> Path:
    """A committed step whose arrays are noise: what a store sees of one, without the work of a save."""
    place, noise = folder.saving_folder(path, step), np.random.default_rng((seed, step))
    for name, size in {"d/data": 3000, "ocdbt.process_0/d": 1001, "_METADATA": 1, "empty": 0}.items():
        file = place / folder.ARRAYS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise.bytes(size))
    content = {"format": manifest.FORMAT, "step": step, "tree": {}, "time": "2026-01-01T00:00:00Z"}
    commit.seal(place, content, 1)
    folder.publish(path, step)
    return folder.step_folder(path, step)


def files(path: Path) -> dict[str, bytes]:
    """Relative name to content of all that is under `path`."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, dtype and shape included."""
    a, b = jax.tree.leaves(one), jax.tree.leaves(other)
    same_form = jax.tree.structure(one) == jax.tree.structure(other)
    return same_form and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )
