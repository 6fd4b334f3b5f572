"""Reading ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

from shardtrain.errors import DataError

_END = object()


def prefetch(iterator: Iterator[Any], depth: int = 2) -> Generator[Any, None, None]:
    """The items of `iterator`, read up to `depth` ahead by a thread.

    An exception of the iterator is raised where its item would have come. Closing the generator (or
    leaving the loop and dropping it) stops the thread.

    Raises:
        DataError: a `depth` below 1, which would read without bound.
    """
    if depth < 1:
        raise DataError(f"depth={depth}", where="prefetch", fix="1 or more")
    return _ahead(iterator, depth)


def _ahead(iterator: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    items: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in iterator:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)
