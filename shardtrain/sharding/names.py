"""Which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """The way out of an unknown name: the closest known one, or all of them, and another way."""
    names = sorted(k for k in known if k != "*")
    close = difflib.get_close_matches(name, names, n=1)
    first = f"'{close[0]}'" if close else f"one of {', '.join(names)}"
    return f"{first}, or {otherwise}"
