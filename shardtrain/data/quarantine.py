"""Rows that cannot be read: left out, up to a limit, without a change in the order of the others."""

from __future__ import annotations

import logging
from typing import Any

from shardtrain.errors import DataError

log = logging.getLogger("shardtrain")


class Quarantine:
    """A random-access source in which the next row that can be read stands in for one that cannot.

    Which row that is follows from the files alone: every process, start and epoch sees the same, and all other rows keep
    their place in the order. Each bad row is logged once, with its index.

    Args:
        limit: of different bad rows that this process may meet.
    """

    def __init__(self, source: Any, limit: int):
        self._source, self._limit = source, limit
        self.found: dict[int, str] = {}  # row to what is wrong with it

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> Any:
        """Row `row`, or the first after it (the first follows the last) that can be read.

        Raises:
            DataError: more bad rows than the limit, or no other.
        """
        row, count = int(row), len(self)
        for at in (*range(row, count), *range(row)):
            if at in self.found:
                continue
            try:
                return self._source[at]
            except (DataError, OSError) as error:
                self._put_aside(at, error)
        raise DataError(
            f"none of the {count} rows can be read", where="data.quarantine", fix="look at the file"
        )

    def _put_aside(self, row: int, error: Exception) -> None:
        why = f"{error.where}: {error.message}" if isinstance(error, DataError) else str(error)
        self.found[row] = why
        if len(self.found) > self._limit:
            raise DataError(
                f"{len(self.found)} rows cannot be read, {self._limit} may be left out",
                where="data.quarantine",
                why="; ".join(f"row {at}: {said}" for at, said in list(self.found.items())[:4]),
                fix=error.fix if isinstance(error, DataError) else "look at the file, or a higher limit",
            ) from error
        log.warning("row %d is left out, the next that can be read stands in for it: %s", row, why)
