"""The order of rows is a function of the seed and the row's index in the run, and of nothing else."""

import itertools

import jax
import numpy as np
import pytest

from shardtrain.data import ArrayLoader, TokenLoader, as_loader
from shardtrain.data.loader import IterableLoader, row_of

SEQUENCE, WINDOWS = 4, 50
TOKENS = np.arange(SEQUENCE * WINDOWS + 3)  # three tokens too few for one more window


def token_loader(**options):
    return TokenLoader(TOKENS, sequence=SEQUENCE, **{"global_batch": 8, **options})


def array_loader(**options):
    arrays = {"x": np.arange(WINDOWS, dtype=np.float32), "y": np.arange(WINDOWS * 2).reshape(-1, 2)}
    return ArrayLoader(arrays, **{"global_batch": 8, **options})


LOADERS = {"tokens": (token_loader, "tokens"), "arrays": (array_loader, "y")}
each_loader = pytest.mark.parametrize(("make", "field"), LOADERS.values(), ids=LOADERS)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def rows_of_process(kind, process, processes, batch=8):
    every = np.arange(batch)
    return (
        every[every % processes == process] if kind == "interleaved" else np.split(every, processes)[process]
    )


@each_loader
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("kind", ["interleaved", "blocks"])
def test_processes_together_read_what_one_reads(make, field, processes, kind):
    """And no process touches a row of another. Failed once when a process shuffled its own share,
    and once when it read the whole batch and threw rows away."""
    whole = take(make(seed=3).starting_at(0), 9)
    for process in range(processes):
        rows = rows_of_process(kind, process, processes)
        mine = make(seed=3, rows=rows)
        mine.source.reads = 0
        for batch, full in zip(take(mine.starting_at(0), 9), whole, strict=True):
            same(batch, {name: value[rows] for name, value in full.items()})
        assert mine.source.reads == 9 * len(rows)
        same(next(make(seed=3).for_rows(rows).starting_at(8)), {n: v[rows] for n, v in whole[1].items()})


@each_loader
@pytest.mark.parametrize("cursor", [8, 48, 56, 800])
def test_starting_at_a_cursor_is_skipping(make, field, cursor):
    """Across epochs, without reading what is skipped; a cursor that falls inside a batch of another size too.

    Failed once with an order of the loader's own count of batches.
    """
    skipped = take(itertools.islice(make().starting_at(0), cursor // 8, None), 3)
    loader = make()
    loader.source.reads = 0
    for a, b in zip(take(loader.starting_at(cursor), 3), skipped, strict=True):
        same(a, b)
    assert loader.source.reads == 24
    joined = lambda batches: np.concatenate([b[field] for b in batches])
    smaller = joined(take(make(global_batch=3).starting_at(cursor), 8))
    np.testing.assert_array_equal(smaller, joined(skipped))


@each_loader
def test_every_row_once_an_epoch_and_a_new_order_each(make, field):
    """Failed once with one order for all epochs, and once with a draw with replacement."""
    loader = make(seed=1)
    samples = [loader.sample(i)[field].tolist() for i in range(3 * WINDOWS)]
    epochs = [samples[i * WINDOWS : (i + 1) * WINDOWS] for i in range(3)]
    first = sorted(epochs[0])
    assert len({tuple(s) for s in first}) == WINDOWS
    assert all(sorted(e) == first for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != first


@each_loader
def test_the_seed_gives_the_order(make, field):
    """Failed once with the seed ignored, and once with `shuffle=False` ignored."""
    order = lambda **options: next(make(global_batch=40, **options).starting_at(0))[field].tolist()
    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(shuffle=False) == sorted(order(shuffle=False))


def test_far_into_a_run():
    """Past 2**32 rows. Failed once with an index of 32 bits."""
    loader = token_loader(seed=1)
    cursor = 2**33 + 5
    batch = next(loader.starting_at(cursor))
    same(batch, next(token_loader(seed=1).starting_at(np.array([2, 5], np.uint32))))
    epoch = [loader.sample(2**33 // WINDOWS * WINDOWS + i)["tokens"][0] for i in range(WINDOWS)]
    assert sorted(epoch) == list(range(0, SEQUENCE * WINDOWS, SEQUENCE))


def test_targets_are_the_next_tokens():
    """Windows share one token, no target is lost between them. Failed once with windows of `sequence` tokens."""
    loader = token_loader(shuffle=False)
    first, second = loader.sample(0), loader.sample(1)
    assert first["tokens"].tolist() == [0, 1, 2, 3] and first["targets"].tolist() == [1, 2, 3, 4]
    assert second["tokens"][0] == first["targets"][-1]
    assert len(loader.source) == WINDOWS
    assert {n: (s.shape, s.dtype.name) for n, s in loader.batch_spec.items()} == {
        "tokens": ((8, 4), "int32"),
        "targets": ((8, 4), "int32"),
        "weights": ((8, 4), "float32"),
    }


@pytest.mark.parametrize(("batch", "limit"), [(8, 0), (50, 0), (64, 0), (1, 0), (8, 19), (8, 500)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_evaluation_sees_every_window_once(batch, limit, shuffle):
    """What fills up the last batch weighs nothing, and on a process without any rows too many as well.

    Failed once with the filling at weight 1, and once when a process past the end gave fewer batches.
    """
    loader = token_loader(global_batch=batch, shuffle=shuffle)
    count = min(limit or WINDOWS, WINDOWS)
    batches = list(loader.batches(limit))
    assert len(batches) == -(-count // batch)
    weights = np.concatenate([b["weights"] for b in batches])
    seen = np.concatenate([b["tokens"] for b in batches])[weights.all(1)]
    assert len(seen) == len({tuple(s) for s in seen}) == count
    assert weights.sum() == count * SEQUENCE and set(weights.ravel()) <= {0.0, 1.0}
    rows = np.arange(batch)[batch // 2 :]
    for mine, full in zip(loader.for_rows(rows).batches(limit), batches, strict=True):
        same(mine, {name: value[rows] for name, value in full.items()})


def test_rows_of_arrays_stay_together():
    """Failed once when each field had an order of its own."""
    batch = next(array_loader().starting_at(0))
    np.testing.assert_array_equal(batch["y"][:, 0], 2 * batch["x"])
    assert array_loader().batch_spec["y"].shape == (8, 2)
    assert batch["x"].dtype == np.float32


BATCHES = [{"x": np.full((4, 2), i, np.float64), "y": np.full(4, i)} for i in range(5)]
KINDS = {
    "list of dicts": lambda: BATCHES,
    "generator": lambda: (b for b in BATCHES),
    "tuples": lambda: [(b["x"], b["y"]) for b in BATCHES],
    "lists": lambda: ([b["x"].tolist(), b["y"].tolist()] for b in BATCHES),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_any_iterable_of_batches(make):
    """The first batch is not lost to looking at it; a resume drops what was consumed.

    Failed once on a generator, which began at its second batch.
    """
    loader = as_loader(make())
    x = "x" if "x" in loader.batch_spec else "0"
    spec = loader.batch_spec[x]
    assert (spec.shape, spec.dtype, loader.global_batch) == ((4, 2), np.float32, 4)
    assert [b[x][0, 0] for b in take(loader.starting_at(0), 5)] == [0, 1, 2, 3, 4]
    resumed = as_loader(make()).for_rows(np.arange(4)).starting_at(np.array([0, 12], np.uint32))
    assert [b[x][0, 0] for b in take(resumed, 2)] == [3, 4]


def test_what_can_be_iterated_again_starts_over_and_the_rest_ends():
    """Failed once with a generator that repeated its first batch, and once without end on an iterable
    that is empty the second time."""
    first = lambda loader, count: [b["y"][0] for b in take(loader.starting_at(0), count)]
    assert first(IterableLoader(BATCHES), 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert first(IterableLoader(iter(BATCHES)), 12) == [0, 1, 2, 3, 4]

    class Once:
        """Ends for good, as a stream does."""

        def __init__(self):
            self.left = list(BATCHES)

        def __iter__(self):
            while self.left:
                yield self.left.pop(0)

    assert first(IterableLoader(Once()), 12)[-1] == 4


def test_as_loader_takes_what_fit_takes():
    """Failed once with the batch of a dict of arrays ignored."""
    loader = token_loader()
    assert as_loader(loader) is loader
    arrays = {"x": np.arange(12.0)}
    assert isinstance(as_loader(arrays, 4), ArrayLoader) and as_loader(arrays, 4).global_batch == 4
    assert as_loader(arrays).global_batch == 12
    order = lambda seed: next(as_loader(arrays, seed=seed).starting_at(0))["x"].tolist()
    assert order(1) != order(2)


@pytest.mark.parametrize("rows", [0, 7, 2**32 - 1, 2**32, 2**40 + 3])
def test_a_cursor_is_a_number_or_two_words(rows):
    """Failed once with the low word first."""
    words = np.array([rows >> 32, rows & 0xFFFFFFFF], np.uint32)
    assert row_of(rows) == row_of(words) == row_of(jax.numpy.asarray(words)) == rows
