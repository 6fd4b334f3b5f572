"""What a Plan tells the model while it is being traced.

The layout travels in a JAX user context, which is part of the key of JAX's trace caches: an inner
`jit`, `checkpoint` or `scan` that was traced under one layout is traced again under another.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from shardtrain.mesh.build import AnyMesh

_layout = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Mesh and rules as one trace sees them. Compared by identity, so it can be part of a cache key.

    `mesh`: None in the first abstract trace, which needs no devices and only watches the model.
    `sizes`: of its mesh axes then, so that constraints are checked all the same.
    `activations`: logical axis -> mesh axes. `manual`: mesh axes that an enclosing `shard_map` holds.
    `params`: path of a parameter leaf -> how `gather` makes it whole (see `parallel/fsdp.py`).
    `sequence`: those of them that divide the sequence, in zig-zag (see `parallel/sequence.py`); `attention`: how
    its parts see each other. `attentions`: filled by `attention` in the first trace.
    `quant`: what products of weights are rounded to (see `parallel/quantised.py`); `products`: filled by them in the first
    trace.
    `exchanged`: paths of tables whose rows are exchanged. `lookups`: filled by `lookup` in the first trace.
    `gathered`: filled by `gather` with the path prefixes that the model makes whole itself.
    `met`: filled by `meet` with the paths of those that it makes whole where they are used; `late`: which of them it does.
    """

    mesh: AnyMesh | None
    activations: Mapping[str, tuple[str, ...]]
    manual: frozenset[str] = frozenset()
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exchanged: frozenset[str] = frozenset()
    lookups: list[Any] = dataclasses.field(default_factory=list)
    gathered: set[str] = dataclasses.field(default_factory=set)
    met: set[str] = dataclasses.field(default_factory=set)
    late: frozenset[str] = frozenset()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sequence: tuple[str, ...] = ()
    attention: str = "ring"
    quant: str | None = None
    products: list[str] = dataclasses.field(default_factory=list)
    attentions: list[Any] = dataclasses.field(default_factory=list)


def current() -> Layout | None:
    """The layout of the trace under way, or None outside a Plan."""
    return _layout.value


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[Layout]:
    with _layout(layout):
        yield layout
