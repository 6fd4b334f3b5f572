"""One face for every kind of model: nnx modules, linen modules, pairs of functions.

A model is written for one device. What the Plan needs of it: its parameters and other state as
pytrees, and a way to put values back for one call of the loss.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import ShardTrainError
from shardtrain.tree import flatten, path_name

Logical = tuple[str | None, ...] | None
FROZEN, VARIABLES = "frozen", "variables"


class Model(abc.ABC):
    """What a Plan knows of a model. `axes`: path of a parameter (trained or frozen) -> logical axes."""

    axes: dict[str, Logical]
    merges: dict[str, str]

    @abc.abstractmethod
    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        """Parameters and model state (`frozen`, `variables`); pure, may be traced."""

    @abc.abstractmethod
    def bind(self, params: Any, model_state: Mapping[str, Any], key: jax.Array | None, train: bool) -> Any:
        """The object that the loss gets, for one call."""

    @abc.abstractmethod
    def variables(self, bound: Any) -> Any:
        """`model_state["variables"]` after the call."""


def initial(model: Model, key: jax.Array, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """`model.init(key)`, with parameters in `dtype` where one is given. Other variables follow only to float64, where
    everything is; a running mean in 16 bits would stand still."""
    params, state = model.init(key)
    if dtype is None:
        return params, state
    to = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    follow = {FROZEN, VARIABLES} if dtype == jnp.float64 else {FROZEN}
    return jax.tree.map(to, params), {k: jax.tree.map(to, v) if k in follow else v for k, v in state.items()}


def as_model(model: Any, batch: Any, trainable: Any) -> Model:
    """Any of the accepted kinds, behind one face. Allocates nothing but what an instance holds already."""
    from flax import nnx

    if isinstance(model, Linen):
        return dataclasses.replace(model, batch=batch).prepare()
    if isinstance(model, nnx.Module):
        return Nnx(None, model, trainable)
    if isinstance(model, tuple) and len(model) == 2 and all(callable(f) for f in model):
        return Functions(*model)
    if _is_linen(model):
        raise ShardTrainError(
            "a linen module needs to know its inputs",
            where="model",
            fix="st.linen(module, inputs=lambda batch: (batch['x'],))",
        )
    if callable(model):
        return Nnx(model, None, trainable)
    raise ShardTrainError(
        f"cannot use a {type(model).__name__} as a model",
        where="model",
        fix="a factory rngs -> nnx.Module, an nnx.Module, st.linen(...), or a pair (init, apply)",
    )


def _is_linen(model: Any) -> bool:
    return any(c.__module__.startswith("flax.linen") for c in type(model).__mro__)


def _state_dict(state: Any) -> dict[str, Any]:
    """Nested plain dict of an `nnx.State`, with names as keys (lists become "0", "1", ...)."""
    from flax import nnx

    result: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        here = result
        for part in path[:-1]:
            here = here.setdefault(str(part), {})
        here[str(path[-1])] = variable.get_value() if hasattr(variable, "get_value") else variable
    return result


def _fill(state: Any, values: Any) -> Any:
    """`state` with the leaves of the nested dict `values`, by path."""
    from flax import nnx

    flat = []
    for path, variable in nnx.to_flat_state(state):
        leaf = values
        for part in path:
            leaf = leaf[str(part)]
        flat.append((path, variable.replace(leaf)))
    return nnx.from_flat_state(flat)


class Nnx(Model):
    """A factory of an `nnx.Module`, or an instance that already has weights."""

    def __init__(self, factory: Callable[..., Any] | None, instance: Any, trainable: Any):
        from flax import nnx

        self.nnx = nnx
        filters: Any = [trainable if trainable is not None else nnx.Param, nnx.RngState, nnx.Param, ...]

        def parts() -> tuple[Any, ...]:
            module = instance if factory is None else factory(nnx.Rngs(0))
            if not isinstance(module, nnx.Module):
                raise ShardTrainError(
                    f"the factory returned a {type(module).__name__}, not an nnx.Module",
                    where="model",
                    fix="lambda rngs: MyModule(..., rngs=rngs)",
                )
            split: Any = nnx.split(module, *filters)
            self.graph = split[0]
            return tuple(split[1:])

        with nnx.use_eager_sharding(False):
            # Not nnx.eval_shape, which reads logical axes as mesh axes where the caller has set a mesh.
            params, rngs, frozen, rest = jax.eval_shape(parts)
        self.factory, self.instance, self.filters = factory, instance, filters
        self.templates = (params, frozen, rest)
        self.rngs = rngs
        if not nnx.to_flat_state(params):
            raise ShardTrainError(
                "nothing to train", where="model", fix="a trainable= filter that matches parameters"
            )
        self.axes, self.merges = {}, {}
        for state in (params, frozen):
            for path, variable in nnx.to_flat_state(state):
                self.axes["/".join(map(str, path))] = self._names(variable)
        for path, variable in nnx.to_flat_state(rest):
            if "merge" in variable.get_metadata():
                self.merges["/".join(map(str, path))] = variable.get_metadata()["merge"]

    @staticmethod
    def _names(variable: Any) -> Logical:
        metadata = variable.get_metadata()
        names = next(
            (
                metadata[k]
                for k in ("out_sharding", "sharding_names", "sharding")
                if metadata.get(k) is not None
            ),
            None,
        )
        return None if names is None else tuple(names)

    def _module(self, key: jax.Array) -> Any:
        with self.nnx.use_eager_sharding(False):
            return self.instance if self.factory is None else self.factory(self.nnx.Rngs(key))

    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        split: Any = self.nnx.split(self._module(key), *self.filters)
        _, params, _, frozen, rest = split
        return _state_dict(params), _sections(_state_dict(frozen), _state_dict(rest))

    def bind(self, params: Any, model_state: Mapping[str, Any], key: jax.Array | None, train: bool) -> Any:
        values = (params, model_state.get(FROZEN, {}), model_state.get(VARIABLES, {}))
        states = [_fill(t, v) for t, v in zip(self.templates, values, strict=True)]
        with self.nnx.use_eager_sharding(False):
            module = self.nnx.merge(self.graph, states[0], self._streams(key), *states[1:])
        (module.train if train else module.eval)()
        return module

    def _streams(self, key: jax.Array | None) -> Any:
        """The module's own random streams, as a function of the group's key alone."""
        base = jax.random.key(0) if key is None else key
        flat = []
        for index, (path, variable) in enumerate(self.nnx.to_flat_state(self.rngs)):
            old = variable.get_value()
            if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
                new = jax.random.fold_in(base, 1 + index)
                new = jax.random.split(new, old.shape) if old.shape else new
            else:
                new = jnp.zeros(old.shape, old.dtype)
            flat.append((path, variable.replace(new)))
        return self.nnx.from_flat_state(flat)

    def variables(self, bound: Any) -> Any:
        split: Any = self.nnx.split(bound, *self.filters)
        return _state_dict(split[4])


@dataclasses.dataclass(frozen=True, eq=False)
class Linen(Model):
    """See `linen`."""

    module: Any
    inputs: Callable[[Any], tuple[Any, ...]]
    merge: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: Any = None
    axes: dict[str, Logical] = dataclasses.field(default_factory=dict)
    merges: dict[str, str] = dataclasses.field(default_factory=dict)

    def prepare(self) -> Linen:
        from flax.core import meta

        boxed = jax.eval_shape(self._init, jax.random.key(0))
        is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
        axes: dict[str, Logical] = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(boxed["params"], is_leaf=is_box)[0]:
            axes[path_name(path)] = tuple(leaf.names) if is_box(leaf) else None
        rest = {k: v for k, v in boxed.items() if k != "params"}
        merges = {p: self.merge[p.split("/")[0]] for p in flatten(rest) if p.split("/")[0] in self.merge}
        return dataclasses.replace(self, axes=axes, merges=merges)

    def _init(self, key: jax.Array) -> Any:
        rows = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.batch)
        streams = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        return self.module.init(streams, *self.inputs(rows), **self.kwargs)

    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        from flax.core import meta

        variables = dict(meta.unbox(self._init(key)))
        return variables.pop("params"), _sections({}, variables)

    def bind(self, params: Any, model_state: Mapping[str, Any], key: jax.Array | None, train: bool) -> Any:
        return BoundLinen(self.module, params, model_state.get(VARIABLES, {}), key)

    def variables(self, bound: Any) -> Any:
        return bound.variables


class BoundLinen:
    """A linen module with its variables: call it as `module.apply` without the variables.

    Changed collections (batch statistics) are kept from call to call. Random streams `dropout` and
    `default` are those of the group unless `rngs=` is given.
    """

    def __init__(self, module: Any, params: Any, variables: Any, key: jax.Array | None):
        self.module, self.params, self.variables, self.key = module, params, variables, key
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variables = {"params": self.params, **self.variables}
        if "rngs" not in kwargs and self.key is not None:
            key = jax.random.fold_in(self.key, self._calls)
            kwargs["rngs"] = {"dropout": key, "default": jax.random.fold_in(key, 0)}
            self._calls += 1
        if self.variables:
            out, new = self.module.apply(variables, *args, mutable=list(self.variables), **kwargs)
            self.variables = {**self.variables, **new}
            return out
        return self.module.apply(variables, *args, **kwargs)


def linen(
    module: Any,
    inputs: Callable[[Any], tuple[Any, ...]],
    *,
    merge: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Linen:
    """A `flax.linen` module as a model.

    Args:
        module: the module, not initialised.
        inputs: batch -> the positional arguments of the module's call, for its initialisation.
        merge: collection -> how the copies of the groups become one: "mean" (default for floats),
            "sum" of the changes, or "last".
        kwargs: keyword arguments of the call during initialisation (`train=False`).
    """
    return Linen(module, inputs, dict(merge or {}), dict(kwargs))


class Functions(Model):
    """A pair of plain functions: `init(key) -> params` and `apply(params, *args)`."""

    def __init__(self, init: Callable[..., Any], apply: Callable[..., Any]):
        self._init, self.apply = init, apply
        shapes = jax.eval_shape(init, jax.random.key(0))
        self.axes = dict.fromkeys(flatten(shapes))
        self.merges = {}

    def init(self, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        return self._init(key), {}

    def bind(self, params: Any, model_state: Mapping[str, Any], key: jax.Array | None, train: bool) -> Any:
        return BoundFunction(self.apply, params)

    def variables(self, bound: Any) -> Any:
        return {}


@dataclasses.dataclass(frozen=True)
class BoundFunction:
    """`apply` with its parameters: `model(x)` is `apply(params, x)`."""

    apply: Callable[..., Any]
    params: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(self.params, *args, **kwargs)


def _sections(frozen: Any, variables: Any) -> dict[str, Any]:
    return {k: v for k, v in ((FROZEN, frozen), (VARIABLES, variables)) if v}
