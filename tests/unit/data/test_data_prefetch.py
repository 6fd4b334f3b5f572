"""Reading ahead changes nothing but the time."""

import threading
import time

import pytest

from shardtrain.data import prefetch


def readers():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def ends(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_same_items_in_the_same_order():
    """None and exceptions as items too; it ends when they end. Failed once with None as the end."""
    items = [1, None, "two", ValueError("an item"), [], 3.0]
    assert list(prefetch(iter(items))) == items
    assert list(prefetch(iter([]))) == []
    assert not readers()


@pytest.mark.parametrize("error", [ValueError("row 3 is damaged"), KeyboardInterrupt()])
def test_an_exception_comes_where_its_item_would(error):
    """Failed once when it was lost in the thread and the reader waited for ever."""

    def broken():
        yield 1
        yield 2
        raise error

    got = []
    with pytest.raises(type(error)) as caught:
        for item in prefetch(broken()):
            got.append(item)
    assert got == [1, 2] and caught.value is error
    assert not readers()


def test_no_more_than_the_depth_is_read_ahead():
    """`depth` in the queue, one in the thread's hand. Failed once with a queue without bound."""
    read = [0]

    def source():
        while True:
            read[0] += 1
            yield read[0]

    items = prefetch(source(), depth=3)
    assert next(items) == 1
    assert ends(lambda: read[0] == 1 + 3 + 1)
    time.sleep(0.1)
    assert read[0] == 5
    assert next(items) == 2 and ends(lambda: read[0] == 6)
    items.close()


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_stops_the_thread(leave):
    """Also one that waits with an item in hand. Failed once when it waited for room for ever."""

    def source():
        number = 0
        while True:
            yield (number := number + 1)

    items = prefetch(source())
    assert next(items) == 1 and len(readers()) == 1
    if leave == "close":
        items.close()
    else:
        del items
    assert ends(lambda: not readers())


def test_reading_goes_on_while_the_user_works():
    """The next item is there when it is asked for. Failed once with the reading inside `next`."""
    ready = threading.Event()

    def source():
        yield 1
        ready.set()
        yield 2

    items = prefetch(source())
    assert next(items) == 1
    assert ready.wait(5)
    assert list(items) == [2]
