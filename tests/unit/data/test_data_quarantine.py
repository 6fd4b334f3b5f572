"""Rows that cannot be read are left out, and nothing else moves."""

import numpy as np
import pytest

from shardtrain.data import TokenLoader
from shardtrain.data.quarantine import Quarantine
from shardtrain.errors import DataError

SEQUENCE, COUNT, VOCAB = 4, 12, 64


class Text:
    """Row r is all r, but for the token that it shares with the next; bad ids where a test wants them."""

    vocab_size = VOCAB

    def __init__(self, bad=(), token=VOCAB, dtype=np.uint16):
        self.all = np.append(np.repeat(np.arange(COUNT), SEQUENCE), COUNT).astype(dtype)
        for row in bad:
            self.all[row * SEQUENCE + 2] = token

    def tokens(self, split):
        return self.all


def rows(bad=(), start=0, count=3 * COUNT, mine=None, token=VOCAB, **options):
    """The rows that a process sees, by the first of their tokens."""
    loader = TokenLoader(Text(bad, token, **options), sequence=SEQUENCE, global_batch=4, seed=5, quarantine=3)
    if mine is not None:
        loader = loader.for_rows(np.array(mine))
    batches = loader.starting_at(start)
    return [int(t) for _ in range((count - start) // 4) for t in next(batches)["tokens"][:, 0]]


@pytest.mark.parametrize("bad", [[3], [3, 4, 7], [COUNT - 1]])
def test_the_next_good_row_stands_in(bad, caplog):
    """In every epoch, whichever process reads it and wherever it starts; all others keep their place. Failed once with a
    stand-in that depended on how many bad rows had been met before."""
    after = {r: next(s % COUNT for s in range(r, r + COUNT) if s % COUNT not in bad) for r in range(COUNT)}
    expected = [after[r] for r in rows()]
    assert rows(bad) == expected and set(rows()) == set(range(COUNT))
    assert rows(bad, start=16) == expected[16:]
    halves = rows(bad, mine=[0, 1]), rows(bad, mine=[2, 3])
    assert [x for i in range(0, 18, 2) for half in halves for x in half[i : i + 2]] == expected
    assert all(f"row {r} is left out" in caplog.text for r in bad)
    assert (
        f"token {bad[0] * SEQUENCE + 2} of the array: token id {VOCAB} in a vocabulary of {VOCAB}"
        in caplog.text
    )


def test_a_negative_id():
    """The fault in mind: only the largest id was looked at."""
    expected = [6 if r == 5 else r for r in rows()]
    assert rows([5], token=-1, dtype=np.int32) == expected
    with pytest.raises(DataError, match="token id -1 in a vocabulary of 64"):
        list(TokenLoader(Text([5], -1, np.int32), sequence=SEQUENCE, global_batch=4).batches())


def test_a_limit_of_different_rows(caplog):
    """A row is counted and logged once, however often its turn comes; one more than the limit ends it, with what was found.
    Failed once with a count of reads."""
    rows([1, 2, 6], count=5 * COUNT)
    assert caplog.text.count("is left out") == 3
    with pytest.raises(DataError, match="4 rows cannot be read, 3 may be left out") as caught:
        rows([1, 2, 6, 9])
    assert caught.value.why.count("token id 64") == 4 and "--data.quarantine" in caught.value.fix


def test_a_disk_that_cannot_be_read():
    """Counts as bad rows do; where no row is good there is an end. The fault in mind: an endless search."""

    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, row):
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match=r"3 rows cannot be read, 2 may.*\n.*Input/output error"):
        Quarantine(Broken(), 2)[1]
    with pytest.raises(DataError, match="none of the 3 rows"):
        Quarantine(Broken(), 5)[1]


def test_without_a_quarantine_the_first_is_refused():
    """As ever. The fault in mind: a default that leaves out."""
    with pytest.raises(DataError, match=f"token id {VOCAB}"):
        list(TokenLoader(Text([3]), sequence=SEQUENCE, global_batch=4).batches())
