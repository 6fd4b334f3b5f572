"""Every wrong input of the data room ends in one message with where, the numbers and the way out."""

import gzip
import json

import numpy as np
import pytest

from shardtrain.data import ArrayLoader, TokenLoader, as_loader, prepare
from shardtrain.data import tokenizer as tokenizers
from shardtrain.errors import DataError


def npy(array):
    def write(path):
        with path.open("wb") as f:
            np.save(f, array)

    return write


FILES = {
    "missing": ("no.txt", None, {}, "no such file"),
    "no match": ("*.text", None, {}, "no such file"),
    "empty": ("a.txt", b"", {}, "the file is empty"),
    "blank": ("a.txt", b" \n\n", {}, "the file is empty"),
    "binary": ("a.txt", b"abc\0def", {}, "zero byte at offset 3"),
    "latin-1": ("a.txt", b"caf\xe9 au lait", {}, "byte 0xe9 at offset 3"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"text\n" * 999)[:-9], {}, "not a whole gzip file"),
    "no gzip": ("a.txt.gz", b"plain text", {}, "not a whole gzip file"),
    "one line": ("a.txt", b"a line\n", {}, "one line cannot be divided"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n\n{text\n', {}, "line 3 is not JSON"),
    "rows per field: {}": (
        "a.jsonl",
        b'{"text": "a"}\n{"body": "b"}\n',
        {},
        "line 2 has no text field 'text'",
    ),
    "no string": ("a.jsonl", b'{"text": 5}\n', {}, "line 1 has no text field 'text'"),
    "no object": ("a.jsonl", b"[1]\n", {}, "line 1 has no text field"),
    "blank documents": ("a.jsonl", b'{"text": " "}\n', {}, "no text"),
    "fraction": ("a.txt", b"a\nb\n", {"eval_fraction": 1.0}, "eval_fraction: 1.0"),
    "few entries": ("a.txt", b"a\nb\n", {"tokenizer": "bpe:100"}, "100 entries do not hold the 256"),
    "no tokenizer": ("a.txt", b"a\nb\n", {"tokenizer": "gpt2.json"}, "no such tokenizer"),
    "odd bytes": ("a.bin", b"\1" * 5, {}, "5 bytes are not whole uint16 tokens"),
    "empty bin": ("a.bin", b"", {}, "the file is empty"),
    "no dtype": ("a.bin", b"\1" * 8, {"dtype": "words"}, "words"),
    "float dtype": ("a.bin", b"\1" * 8, {"dtype": "float32"}, "float32"),
    "floats": ("a.npy", npy(np.ones(9)), {}, "float64 with 1 dims"),
    "two dims": ("a.npy", npy(np.ones((3, 3), int)), {}, "int64 with 2 dims"),
    "pickle": ("a.npy", npy(np.array([{}, 1], object)), {}, "not a readable .npy"),
    "cut npy": ("a.npy", b"\x93NUMPY\1\0", {}, "not a readable .npy"),
    "negative": ("a.npy", npy(np.array([3, -1, 2])), {}, "-1"),
    "huge": ("a.npy", npy(np.array([3, 2**33, 2])), {}, str(2**33)),
    "no tokens": ("a.npy", npy(np.array([], int)), {}, "0 tokens"),
    "one token": ("a.npy", npy(np.array([3])), {}, "1 tokens"),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_a_wrong_file_is_refused(case, tmp_path):
    """And nothing is left where the data would be.

    Failed once on a .npy of no tokens, an unknown dtype and an id past 32 bits: a ValueError, a TypeError,
    and a silent remainder.
    """
    name, content, options, says = case
    file = tmp_path / name
    if callable(content):
        content(file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(str(file), tmp_path / "out", **{"tokenizer": "bpe:260", **options})
    text = str(caught.value)
    assert says in text and caught.value.where and caught.value.fix
    out = tmp_path / "out"
    assert not out.exists() or not [p for p in out.iterdir() if not p.name.endswith(".lock")]


def test_text_and_tokens_together_are_refused(tmp_path):
    """Failed once when the kind of the first file decided."""
    (tmp_path / "a.txt").write_text("a\nb\n")
    np.save(tmp_path / "b.npy", np.arange(9))
    with pytest.raises(DataError, match="text and token files together"):
        prepare([str(tmp_path / "a.txt"), str(tmp_path / "b.npy")], tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """Failed once with a NotADirectoryError."""
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="cannot be written") as caught:
        prepare(str(tmp_path / "a.txt"), tmp_path / "out")
    assert str(tmp_path / "out") in caught.value.where and "--data.cache" in caught.value.fix


@pytest.mark.parametrize("content", ["{}", "not json", json.dumps({"model": 3})])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content):
    """Failed once with the library's plain Exception."""
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match="not a tokenizer") as caught:
        tokenizers.load(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TokenLoader(np.arange(8), sequence=8, global_batch=2), "8 tokens, one row takes 9"),
        (lambda: ArrayLoader({}, 2), "rows per field: {}"),
        (lambda: ArrayLoader({"x": np.ones(3), "y": np.ones(4)}, 2), "{'x': 3, 'y': 4}"),
        (lambda: ArrayLoader({"x": np.ones((0, 3))}, 2), "{'x': 0}"),
        (lambda: ArrayLoader({"x": np.float32(3)}, 2), "{'x': 'none'}"),
        (lambda: as_loader([]), "gave no batch"),
        (lambda: as_loader(5), "cannot read a int"),
        (lambda: as_loader([1, 2]), "a batch is a int"),
        (lambda: as_loader([{}]), "rows per field: {}"),
        (lambda: as_loader([{"x": 1.0}]), "{'x': 'none'}"),
        (lambda: as_loader([{"x": np.ones(2), "y": np.ones(3)}]), "{'x': 2, 'y': 3}"),
    ],
)
def test_what_is_no_data_is_refused(make, says):
    """Failed once on a batch without fields (StopIteration) and a field without rows (TypeError)."""
    with pytest.raises(DataError) as caught:
        make()
    assert says in str(caught.value) and caught.value.where and caught.value.fix
