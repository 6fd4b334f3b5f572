"""All programs, by name."""

import products  # noqa: F401
import single  # noqa: F401
import spellings  # noqa: F401
from hand import PROGRAMS, Program, Row

__all__ = ["PROGRAMS", "Program", "Row"]
