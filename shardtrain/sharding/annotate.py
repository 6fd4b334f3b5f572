"""Logical axes for other people's models, by path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from shardtrain.errors import ShardingError


def annotate(patterns: Mapping[str, Sequence[str | None]]) -> Annotations:
    """Logical axes by parameter path, for a model whose parameters carry none.

    Args:
        patterns: regular expression for the whole path (`".*/up/kernel"`) -> one logical axis or
            None per dim. The first match wins.

    Returns:
        A value for `st.plan(annotations=...)`.

    Raises:
        ShardingError: (when a plan is made) a pattern that matches nothing; a number of axes that is
            not the number of dims.
    """
    return Annotations(patterns)


class Annotations:
    """What `annotate` returns."""

    def __init__(self, patterns: Mapping[str, Sequence[str | None]]):
        self.patterns: list[tuple[re.Pattern[str], tuple[str | None, ...]]] = []
        for pattern, axes in patterns.items():
            try:
                self.patterns.append((re.compile(pattern), tuple(axes)))
            except re.error as error:
                raise ShardingError(
                    f"not a regular expression: {error}",
                    where=f"annotate pattern '{pattern}'",
                    fix="escape it",
                ) from error

    def apply(
        self, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[str | None, ...] | None]
    ) -> dict[str, tuple[str | None, ...] | None]:
        """Path -> logical axes, with the patterns laid over what the model says itself."""
        result = dict(axes)
        hit = [False] * len(self.patterns)
        for path, shape in shapes.items():
            for index, (pattern, names) in enumerate(self.patterns):
                # A leading slash, so that ".*/up/kernel" also names a leaf at the top.
                if not (pattern.fullmatch(path) or pattern.fullmatch(f"/{path}")):
                    continue
                hit[index] = True
                if len(names) != len(shape):
                    raise ShardingError(
                        f"{len(names)} logical axes {names} for {len(shape)} dims {shape}",
                        where=path,
                        why=f"matched by annotate pattern '{pattern.pattern}'",
                        fix="one logical axis, or None, per dim (a stack of layers has 'layers' first)",
                    )
                result[path] = names
                break
        for found, (pattern, _) in zip(hit, self.patterns, strict=True):
            if not found:
                paths = list(shapes)
                shown = ", ".join(paths[:8]) + (f", and {len(paths) - 8} more" if len(paths) > 8 else "")
                raise ShardingError(
                    "matches no parameter (or an earlier pattern took all it matches)",
                    where=f"annotate pattern '{pattern.pattern}'",
                    why=f"paths: {shown}",
                    fix="a pattern for the whole path, such as '.*/kernel'",
                )
        return result
