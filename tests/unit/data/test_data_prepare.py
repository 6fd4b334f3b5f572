"""Text is tokenised once, into a folder that its content names, and held-out text stays out."""

import json
import multiprocessing
import pathlib
import sys

import numpy as np
import pytest

from shardtrain.data import open_tokens, prepare, sources
from shardtrain.data import tokenizer as tokenizers
from shardtrain.errors import DataError

WORDS = ["in the beginning", "the earth was", "without form", "and void", "and darkness"]
TEXT = "".join(f"{WORDS[i % 5]} {i}\n" for i in range(400))


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "story.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def prepared(text, output, **options):
    return prepare(str(text), output, **{"tokenizer": "bpe:300", "eval_fraction": 0.1, **options})


def test_the_manifest_counts_what_is_there(text, tmp_path):
    """Counts, hashes, vocabulary and entropy, each made again. Failed once with the entropy in bits."""
    data = prepared(text, tmp_path / "out")
    train, held_out = data.tokens("train"), data.tokens("eval")
    facts = data.manifest
    assert facts["tokens"] == {"train": len(train), "eval": len(held_out)}
    for split in ("train", "eval"):
        assert facts["sha256"][split] == tokenizers.digest(data.path / f"{split}.bin")
    assert facts["source"] == [{"file": "story.txt", "bytes": len(TEXT), "sha256": tokenizers.digest(text)}]
    assert train.dtype == np.uint16 and isinstance(train, np.memmap)
    assert data.vocab_size == data.tokenizer().get_vocab_size() <= 300
    assert max(train.max(), held_out.max()) < data.vocab_size
    shares = np.bincount(held_out) / len(held_out)
    shares = shares[shares > 0]
    assert data.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)


def test_all_text_comes_back_and_the_held_out_part_is_the_end(text, tmp_path):
    """Whole lines, none in both parts; the tokenizer did not see them either.

    Failed once with the first part held out, and with the tokenizer trained on everything.
    """
    marked = TEXT + "ᚠᚡᚢ ᚠᚡᚢ ᚠᚡᚢ ᚠᚡᚢ ᚠᚡᚢ ᚠᚡᚢ ᚠᚡᚢ\n" * 8
    text.write_text(marked, encoding="utf-8")
    data = prepared(text, tmp_path / "out", eval_fraction=0.05)
    model = data.tokenizer()
    train, held_out = (model.decode(data.tokens(s).tolist()) for s in ("train", "eval"))
    assert train + held_out == marked and train.endswith("\n")
    assert 0.02 < len(held_out) / len(marked) < 0.1
    assert "ᚠ" in held_out and "ᚠ" not in train
    assert len(model.encode("ᚠᚡᚢ").ids) == 9, "three bytes each: no merge was learnt from them"


def test_documents_are_held_out_whole_and_end_with_a_token(tmp_path):
    """Of .jsonl. Failed once without the token between documents."""
    file = tmp_path / "many.jsonl"
    texts = [f"document {i}\nof two lines {i * i}" for i in range(50)]
    file.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n\n" for t in texts))
    data = prepared(file, tmp_path / "out", eval_fraction=0.2)
    end = tokenizers.end_of_text(data.tokenizer())
    found = []
    for split in ("train", "eval"):
        ids = data.tokens(split)
        assert ids[-1] == end
        pieces = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
        found.append([data.tokenizer().decode(p.tolist()) for p in pieces])
    assert found[0] + found[1] == texts
    assert data.manifest["documents"] == {"train": len(found[0]), "eval": len(found[1])}
    assert 5 <= len(found[1]) <= 15


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_jsonl_lines_end_at_newlines_alone(tmp_path, name):
    """U+2028 and U+0085 may stand inside a JSON string; a byte order mark in front is no text.

    Failed once with `str.splitlines`, which cuts there, and with .jsonl.gz read as plain text.
    """
    import gzip

    file = tmp_path / name
    texts = ["one\u2028two\u0085three", "four"]
    raw = "\ufeff" + "".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts)
    file.write_bytes((gzip.compress if name.endswith("gz") else bytes)(raw.encode()))
    assert list(sources.documents(file, "text")) == texts


def test_a_second_call_only_opens(text, tmp_path, monkeypatch):
    """Failed once when the key had the time in it."""
    first = prepared(text, tmp_path / "out")
    stamp = (first.path / "train.bin").stat().st_mtime_ns
    monkeypatch.setattr(tokenizers, "train", lambda *_: pytest.fail("tokenised again"))
    again = prepared(text, tmp_path / "out")
    assert again.path == first.path and again.manifest == first.manifest
    assert (again.path / "train.bin").stat().st_mtime_ns == stamp


def test_what_changes_the_tokens_is_prepared_beside_the_old(text, tmp_path):
    """The text, the tokenizer, the fraction. Failed once with a key of the file's name alone."""
    out = tmp_path / "out"
    places = [prepared(text, out).path, prepared(text, out, tokenizer="bpe:280").path]
    places.append(prepared(text, out, eval_fraction=0.2).path)
    trained = tmp_path / "own.json"
    for entries in (270, 290):  # another tokenizer under the same name
        tokenizers.train(TEXT.splitlines(), entries).save(str(trained))
        places.append(prepared(text, out, tokenizer=str(trained)).path)
    text.write_text(TEXT.replace("void", "full"))
    places.append(prepared(text, out).path)
    assert len(set(places)) == 6
    assert all(open_tokens(p).tokens("train").size for p in places)


def _child(source: str, output: str, results) -> None:
    data = prepare(source, output, tokenizer="bpe:300", eval_fraction=0.1)
    results.put((str(data.path), (data.path / "train.bin").stat().st_ino))


def test_two_processes_at_once_write_once(text, tmp_path):
    """Both get the same file, nothing is left over. Failed once without the lock: the second rename failed."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [
        context.Process(target=_child, args=(str(text), str(tmp_path / "out"), results)) for _ in range(2)
    ]
    for child in children:
        child.start()
    found = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(found) == 1
    (place,) = (p for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock"))
    assert str(place) == next(iter(found))[0]


def test_a_failure_leaves_nothing_half_written(text, tmp_path, monkeypatch):
    """Failed once with the work folder left behind."""
    monkeypatch.setattr(sys.modules[prepare.__module__], "_entropy", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(text, tmp_path / "out")
    assert [p for p in (tmp_path / "out").iterdir() if not p.name.endswith(".lock")] == []


def test_a_truncated_token_file_is_refused(text, tmp_path):
    """With both sizes. Failed once when the size was not compared."""
    data = prepared(text, tmp_path / "out")
    file = data.path / "train.bin"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size - 2)
    for again in (lambda: open_tokens(data.path), lambda: prepared(text, tmp_path / "out")):
        with pytest.raises(DataError, match=f"{size - 2} bytes, {size} were written") as caught:
            again()
        assert str(file) in str(caught.value) and caught.value.fix
    file.unlink()
    with pytest.raises(DataError, match="0 bytes"):
        open_tokens(data.path)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "no prepared data"),
        ("{", "cannot be read"),
        ('{"format": 99}', "format 99, this is 2"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
    ],
)
def test_a_folder_that_is_none_of_ours_is_refused(tmp_path, manifest, says):
    """Failed once on a manifest that is a list, with an AttributeError."""
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=says) as caught:
        open_tokens(tmp_path)
    assert caught.value.fix and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_tokens_come_through_as_they_are(tmp_path, kind):
    """Wide ids stay wide; there is no tokenizer, and it says so. Failed once with uint16 for all."""
    ids = np.arange(1000, dtype=np.uint32) * 100
    file = tmp_path / f"ids.{kind}"
    np.save(file, ids) if kind == "npy" else ids.tofile(file)
    data = prepare(str(file), tmp_path / "out", eval_fraction=0.1, dtype="uint32")
    joined = np.concatenate([data.tokens("train"), data.tokens("eval")])
    np.testing.assert_array_equal(joined, ids)
    assert data.vocab_size == 99_901 and len(data.tokens("eval")) == 100
    with pytest.raises(DataError, match="without a tokenizer"):
        data.tokenizer()


def test_the_shipped_text(tmp_path):
    """Is there, is text, and is small. Failed once with the file left out of the package."""
    (file,) = sources.find("king_james")
    (text,) = sources.documents(file, "text")
    assert file.stat().st_size < 2e6 and len(text) > 4e6 and "In the beginning God created" in text
