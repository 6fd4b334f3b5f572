"""The Plan and what is asked of it: compile, fit, read the program."""

import inspect
import sys
import types
from typing import Any

from shardtrain.plan.make import plan as _make


class _Room(types.ModuleType):
    """`shardtrain.plan` is this room, and `st.plan(...)` makes a Plan: one name, so the room is callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _make(*args, **kwargs)


_room = sys.modules[__name__]
_room.__class__ = _Room
_room.__doc__ = _make.__doc__
_room.__signature__ = inspect.signature(_make)  # type: ignore[attr-defined]
