"""Batches in an order that depends on the seed and the sample's global index, and on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from shardtrain.data.quarantine import Quarantine
from shardtrain.errors import DataError

Batch = dict[str, np.ndarray]


class _Loader:
    """Sample i of the run is `self.sample(i)`. A process reads only its own rows of each global batch."""

    global_batch: int
    source: Any
    rows: np.ndarray | None = None

    def sample(self, index: int) -> Batch:
        """One row by its index in the run."""
        raise NotImplementedError

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes and dtypes of the fields."""
        one = self.sample(0)
        return {n: jax.ShapeDtypeStruct((self.global_batch, *v.shape), v.dtype) for n, v in one.items()}

    def for_rows(self, rows: np.ndarray) -> Self:
        """The same loader, reading only these rows (ascending) of each global batch: `plan.rows`."""
        other = copy.copy(self)
        other.rows = np.asarray(rows)
        return other

    def starting_at(self, cursor: Any) -> Iterator[Batch]:
        """Batches from row `cursor` of the run on, without end. Seeking costs nothing.

        `cursor`: a number of rows, or `state.cursor`.
        """
        cursor = row_of(cursor)
        rows = np.arange(self.global_batch) if self.rows is None else self.rows
        while True:
            yield _stack([self.sample(cursor + int(row)) for row in rows])
            cursor += self.global_batch

    def batches(self, limit: int = 0) -> Iterator[Batch]:
        """Every row once, in global batches; the last is filled up with rows of weight 0.

        Without a field `weights` or `mask` nothing can weigh 0: rows that fill no whole batch are left out.
        `limit`: at most so many rows; 0 for all.
        """
        count = min(len(self.source), limit) if limit else len(self.source)
        weights = [name for name in ("weights", "mask") if name in self.batch_spec]
        if not weights and count < self.global_batch:
            raise DataError(
                f"{count} rows are no whole batch of {self.global_batch}",
                where="evaluation",
                fix="more rows, or a field `weights` that the loss uses, so that the rest can weigh 0",
            )
        count -= 0 if weights else count % self.global_batch
        rows = np.arange(self.global_batch) if self.rows is None else self.rows
        for start in range(0, count, self.global_batch):
            batch = _stack([self.sample(min(start + int(row), count - 1)) for row in rows])
            for name in weights:
                batch[name][start + rows >= count] = 0
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        return self.starting_at(0)


def _positive(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name}={size}", where=where, fix="1 or more")


def row_of(cursor: Any) -> int:
    """A cursor as a number: itself, or the high and low words that a state keeps."""
    words = np.asarray(jax.device_get(cursor)).ravel().tolist()
    return int(words[0]) if len(words) == 1 else (int(words[0]) << 32) + int(words[1])


def _stack(samples: list[Batch]) -> Batch:
    return {name: np.stack([s[name] for s in samples]) for name in samples[0]}


def _shuffled(source: Any, seed: int, shuffle: bool) -> Any:
    """A Grain dataset over all epochs, addressed by global sample index; each epoch in an order of its own."""
    import grain

    dataset = grain.MapDataset.source(source)
    if shuffle:
        dataset = dataset.seed(seed).shuffle()
    return dataset.repeat()


class _Windows:
    """Windows of `sequence` + 1 tokens that share their end tokens, random access. Counts its reads."""

    def __init__(self, tokens: np.ndarray, sequence: int, vocab: int):
        self.tokens, self.sequence, self.vocab, self.reads = tokens, sequence, vocab, 0

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        start = int(index) * self.sequence
        window = np.asarray(self.tokens[start : start + self.sequence + 1], np.int32)
        # An id past the table would train on silently: a gather clamps it.
        if not 0 <= window.min() <= window.max() < self.vocab:
            at = int(window.argmin() if window.min() < 0 else window.argmax())
            raise DataError(
                f"token id {window[at]} in a vocabulary of {self.vocab}",
                where=f"token {start + at} of {getattr(self.tokens, 'filename', 'the array')}",
                why="the file changed after it was prepared",
                fix="remove its folder and prepare it again; or --data.quarantine N leaves out so many such rows",
            )
        return window


class TokenLoader(_Loader):
    """Rows of tokens and their next tokens, from `prepare`d text.

    Args:
        data: a `TokenData`, or a 1-D array of token ids.
        split: `train` or `eval`.
        sequence: tokens per row.
        global_batch: rows per step over all processes.
        seed: of the order. shuffle: False for the order of the text.
        quarantine: so many rows that cannot be read may be left out, see `Quarantine`; 0 refuses the first.

    Fields: `tokens`, `targets` int32 [rows, sequence]; `weights` float32 [rows, sequence], 1.
    """

    def __init__(
        self,
        data: Any,
        *,
        split: str = "train",
        sequence: int,
        global_batch: int,
        seed: int = 0,
        rows: np.ndarray | None = None,
        shuffle: bool = True,
        quarantine: int = 0,
    ):
        _positive("TokenLoader", sequence=sequence, global_batch=global_batch)
        bare = isinstance(data, np.ndarray)
        tokens = data if bare else data.tokens(split)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{tokens.dtype} with {tokens.ndim} dims", where="TokenLoader", fix="a 1-D array of token ids"
            )
        self.source = _Windows(tokens, sequence, 2**31 if bare else data.vocab_size)
        if len(self.source) < 1:
            raise DataError(
                f"{len(tokens)} tokens, one row takes {sequence + 1}",
                where=f"{split} text",
                fix=f"more text, or a sequence of at most {max(1, len(tokens) - 1)}",
            )
        self.sequence, self.global_batch, self.rows = sequence, global_batch, rows
        rows_of = Quarantine(self.source, quarantine) if quarantine else self.source
        self._dataset = _shuffled(rows_of, seed, shuffle)

    def sample(self, index: int) -> Batch:
        window = self._dataset[index]
        return {"tokens": window[:-1], "targets": window[1:], "weights": np.ones(self.sequence, np.float32)}


class _Rows:
    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays, self.reads = arrays, 0

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Batch:
        self.reads += 1
        return {name: value[index] for name, value in self.arrays.items()}


class ArrayLoader(_Loader):
    """Rows of arrays that fit in memory (or are memory-mapped), shuffled anew each epoch.

    Args:
        arrays: name -> array; the first dim is rows, the same in all.
        global_batch: rows per step over all processes.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        global_batch: int,
        seed: int = 0,
        rows: np.ndarray | None = None,
        shuffle: bool = True,
    ):
        arrays = _rows_of({name: np.asarray(value) for name, value in arrays.items()}, "ArrayLoader")
        _positive("ArrayLoader", global_batch=global_batch)
        self.source, self.global_batch, self.rows = _Rows(arrays), global_batch, rows
        self._dataset = _shuffled(self.source, seed, shuffle)

    def sample(self, index: int) -> Batch:
        found = self._dataset[index]
        return {name: np.asarray(value) for name, value in found.items()}


class IterableLoader:
    """Any iterable of batches: dicts, or tuples (then the fields are "0", "1", ...), of arrays with a `__array__`.

    A resumed run skips what was consumed by reading and dropping it; the iterable must give the same
    batches again. An iterable that can be iterated again starts over when it ends.
    """

    def __init__(self, data: Iterable[Any]):
        self._data = data
        self._first: Any = None
        iterator = iter(data)
        try:
            self._first = _rows_of(_as_dict(next(iterator)), "data")
        except StopIteration:
            raise DataError(
                "gave no batch", where="data", fix="an iterable of dicts or tuples of arrays"
            ) from None
        self._iterator: Iterator[Any] | None = iterator if iter(data) is iterator else None
        self._begun = False
        self.global_batch = len(next(iter(self._first.values()))) * jax.process_count()

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes and dtypes, from the first batch."""
        return {
            n: jax.ShapeDtypeStruct((self.global_batch, *v.shape[1:]), jax.dtypes.canonicalize_dtype(v.dtype))
            for n, v in self._first.items()
        }

    def for_rows(self, rows: np.ndarray) -> IterableLoader:
        """Itself: each process's iterable gives that process's rows already."""
        return self

    def starting_at(self, cursor: Any) -> Iterator[Batch]:
        """Batches after the first `cursor` rows (a number, or `state.cursor`)."""
        skip = row_of(cursor) // self.global_batch
        for index, batch in enumerate(self._all()):
            if index >= skip:
                yield batch

    def _all(self) -> Iterator[Batch]:
        if self._iterator is not None:
            if self._begun:
                raise DataError(
                    "a second time from the start, and it can be read only once",
                    where="data",
                    why="a generator or an iterator; a rewind reads batches again",
                    fix="a list, a loader, or an object whose __iter__ begins anew; or guard.on_bad='skip'",
                )
            self._begun = True
            yield self._first
            yield from map(_as_dict, self._iterator)
            return
        found = True
        while found:  # what gives nothing the second time has ended
            found = False
            for batch in self._data:
                found = True
                yield _as_dict(batch)


def _rows_of(fields: Batch, where: str) -> Batch:
    """The fields, if all have the same number of rows."""
    lengths = {name: value.shape[0] if value.ndim else "none" for name, value in fields.items()}
    if len(set(lengths.values())) != 1 or {0, "none"} & set(lengths.values()):
        raise DataError(
            f"rows per field: {lengths}",
            where=where,
            fix="arrays with the same number of rows in every field",
        )
    return fields


def _as_dict(batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        return {str(name): np.asarray(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return {str(index): np.asarray(value) for index, value in enumerate(batch)}
    raise DataError(f"a batch is a {type(batch).__name__}", where="data", fix="dicts or tuples of arrays")


def as_loader(data: Any, global_batch: int = 0, *, seed: int = 0) -> Any:
    """A loader from what `st.fit` accepts: a loader, a dict of arrays (then `global_batch` counts), or an iterable."""
    if hasattr(data, "starting_at") and hasattr(data, "batch_spec"):
        return data
    if isinstance(data, Mapping):
        fields = _rows_of(_as_dict(data), "data")
        return ArrayLoader(fields, global_batch or len(next(iter(fields.values()))), seed)
    if hasattr(data, "__iter__"):
        return IterableLoader(data)
    raise DataError(
        f"cannot read a {type(data).__name__}", where="data", fix="an iterable of dicts or tuples of arrays"
    )
