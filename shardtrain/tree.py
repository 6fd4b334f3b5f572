"""Pytree paths and plain-text tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """`blocks/mlp/up/kernel` for a JAX key path."""
    parts = []
    for key in path:
        for field in ("key", "name", "idx"):
            if hasattr(key, field):
                parts.append(str(getattr(key, field)))
                break
        else:
            parts.append(str(key))
    return "/".join(parts)


def flatten(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Path name to leaf, in tree order. Two leaves with one name are our own mistake."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named = {path_name(path): leaf for path, leaf in pairs}
    assert len(named) == len(pairs), "two leaves share a path name"
    return named


def bytes_text(count: float) -> str:
    """`1.5 MiB`; binary units, as device memory is counted."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Left-aligned columns with a rule under the header; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [bool(cells) and all(row[i][:1].isdigit() for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), "  ".join("-" * w for w in widths), *map(line, cells)])
