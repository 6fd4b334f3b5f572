"""Tokenise once into a memory-mapped file beside a manifest; read it ever after."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from shardtrain.data import sources, tokenizer
from shardtrain.errors import DataError

FORMAT = 2
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Tokenised text on disk. `manifest`: counts, hashes, vocabulary, entropy; see `prepare`."""

    path: pathlib.Path
    manifest: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer, or the largest id plus one."""
        return int(self.manifest["vocab_size"])

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the held-out text under its own unigram distribution."""
        return float(self.manifest["unigram_entropy"])

    def tokens(self, split: str) -> np.ndarray:
        """All tokens of `train` or `eval`, memory-mapped.

        Raises:
            DataError: another split.
        """
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}'", where=str(self.path), fix=" or ".join(SPLITS))
        return np.memmap(self.path / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")

    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer.

        Raises:
            DataError: the data came as tokens, without one.
        """
        if self.manifest["tokenizer"] is None:
            raise DataError(
                "was prepared from tokens, without a tokenizer",
                where=str(self.path),
                fix="prepare them with the tokenizer.json that made them (--data.tokenizer FILE)",
            )
        return tokenizer.load(self.path / "tokenizer.json")


def prepare(
    source: sources.Source,
    output: str | os.PathLike[str],
    *,
    tokenizer: str = "bpe:512",
    eval_fraction: float = 0.05,
    text_field: str = "text",
    dtype: str = "uint16",
) -> TokenData:
    """Tokenise a source into a folder under `output` that its content names; a second call only opens it.

    Args:
        source: `king_james`, or paths and patterns of .txt and .jsonl (one document a line), with .gz
            or without, or of tokens: .npy, .bin.
        output: a folder for prepared data.
        tokenizer: `bpe:N` trains a byte-level BPE of N entries on the training text; or a tokenizer.json,
            which beside tokens says what they mean.
        eval_fraction: the last part of the text (whole documents or lines) is held out.
        text_field: of .jsonl objects.
        dtype: of .bin tokens.

    Raises:
        DataError: missing, empty, binary or malformed input, with file and line or offset.
    """
    if not 0 < eval_fraction < 1:
        raise DataError(f"{eval_fraction}", where="eval_fraction", fix="between 0 and 1, such as 0.05")
    files = sources.find(source)
    try:
        key = _key(files, tokenizer, eval_fraction, text_field, dtype)
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(error.filename), fix="a file that can be"
        ) from error
    place = pathlib.Path(output) / f"{_stem(files)}-{key[:12]}"
    if (place / "manifest.json").exists():  # before the lock: a prepared cache may be read-only
        return open_tokens(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with (place.parent / f".{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of several processes does the work
            if not (place / "manifest.json").exists():
                if place.exists():
                    raise DataError(
                        "there is a folder without a manifest", where=str(place), fix="remove the folder"
                    )
                _write(files, place, tokenizer, eval_fraction, text_field, dtype, key)
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror or error}",
            where=str(place.parent),
            fix="a folder that can be (--data.cache, or --output of `data prepare`)",
        ) from error
    return open_tokens(place)


def open_tokens(path: str | os.PathLike[str]) -> TokenData:
    """Open what `prepare` wrote.

    Raises:
        DataError: no manifest, another format, or a file that is not the size it was written with.
    """
    place = pathlib.Path(path)
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        written = manifest["format"]
    except FileNotFoundError:
        raise DataError("no prepared data here", where=str(place), fix="shardtrain data prepare") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the manifest cannot be read: {error}", where=str(place), fix="remove the folder"
        ) from error
    if written != FORMAT:
        raise DataError(f"format {written}, this is {FORMAT}", where=str(place), fix="remove the folder")
    width = np.dtype(manifest["dtype"]).itemsize
    for split in SPLITS:
        file, expected = place / f"{split}.bin", manifest["tokens"][split] * width
        actual = file.stat().st_size if file.exists() else 0
        if actual != expected:
            raise DataError(
                f"{actual} bytes, {expected} were written",
                where=str(file),
                why="cut off or changed",
                fix="remove the folder",
            )
    return TokenData(place, manifest)


def _stem(files: list[pathlib.Path]) -> str:
    return files[0].name.split(".")[0]


def _key(files: list[pathlib.Path], *settings: Any) -> str:
    """A name for the content: a changed source is prepared anew, beside the old one."""
    digests = [tokenizer.digest(f) for f in files]
    name = settings[0]
    if tokenizer.entries_of(name) is None and pathlib.Path(name).is_file():
        digests.append(tokenizer.digest(pathlib.Path(name)))
    return hashlib.sha256(json.dumps([FORMAT, digests, *map(str, settings)]).encode()).hexdigest()


def _write(
    files: list[pathlib.Path],
    place: pathlib.Path,
    tokenizer_name: str,
    eval_fraction: float,
    field: str,
    dtype: str,
    key: str,
) -> None:
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        if files[0].suffix in sources.TOKENS:
            splits = _from_tokens(files, eval_fraction, dtype)
            facts, vocab = _meaning(splits, work, tokenizer_name, files[0])
        else:
            splits, facts, vocab = _from_text(files, work, tokenizer_name, eval_fraction, field)
        width = np.uint16 if vocab <= 2**16 else np.uint32
        for split, ids in zip(SPLITS, splits, strict=True):
            ids.astype(width).tofile(work / f"{split}.bin")
        manifest = {
            "format": FORMAT,
            "key": key,
            "source": [
                {"file": f.name, "bytes": f.stat().st_size, "sha256": tokenizer.digest(f)} for f in files
            ],
            **facts,
            "vocab_size": vocab,
            "dtype": np.dtype(width).name,
            "tokens": {split: len(ids) for split, ids in zip(SPLITS, splits, strict=True)},
            "sha256": {split: tokenizer.digest(work / f"{split}.bin") for split in SPLITS},
            "unigram_entropy": _entropy(splits[1]),
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        work.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _from_tokens(
    files: list[pathlib.Path], eval_fraction: float, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.asarray(sources.tokens(f, dtype)) for f in files]
    ids = np.concatenate(parts)
    if len(ids) < 2:
        raise DataError(
            f"{len(ids)} tokens cannot be divided into training and held-out ones",
            where=str(files[0]),
            fix="a file with more",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**31:
        raise DataError(
            f"token ids from {low} to {high}", where=str(files[0]), fix=f"ids from 0 to {2**31 - 1}"
        )
    cut = len(ids) - max(1, int(len(ids) * eval_fraction))
    return ids[:cut], ids[cut:]


def _meaning(
    splits: tuple[np.ndarray, np.ndarray], work: pathlib.Path, name: str, file: pathlib.Path
) -> tuple[dict[str, Any], int]:
    """Of tokens: the tokenizer that goes with them, if one was given, and the entries."""
    largest = max(int(part.max()) for part in splits)
    if tokenizer.entries_of(name) is not None:
        return {"tokenizer": None, "documents": None}, largest + 1
    model = tokenizer.load(name)
    vocab = tokenizer.size_of(model)
    if largest >= vocab:
        raise DataError(
            f"token id {largest}, the tokenizer has {vocab} entries",
            where=str(file),
            why=f"tokenizer {name}",
            fix="the tokenizer that made these tokens, or the right dtype",
        )
    model.save(str(work / "tokenizer.json"))
    digest = tokenizer.digest(work / "tokenizer.json")
    return {"tokenizer": {"name": name, "sha256": digest}, "documents": None}, vocab


def _from_text(
    files: list[pathlib.Path], work: pathlib.Path, name: str, eval_fraction: float, field: str
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, Any], int]:
    texts = [d for f in files for d in sources.documents(f, field) if d.strip()]
    if not texts:
        raise DataError("no text", where=str(files[0]), fix="a file with text")
    train_texts, eval_texts = _split(texts, eval_fraction)
    entries = tokenizer.entries_of(name)
    model = tokenizer.load(name) if entries is None else tokenizer.train(_pieces(train_texts), entries)
    model.no_padding()
    model.no_truncation()
    model.save(str(work / "tokenizer.json"))
    end = tokenizer.end_of_text(model) if len(texts) > 1 else None
    splits = tuple(_encode(model, part, end) for part in (train_texts, eval_texts))
    facts = {
        "tokenizer": {"name": name, "sha256": tokenizer.digest(work / "tokenizer.json")},
        "documents": {"train": len(train_texts), "eval": len(eval_texts)},
    }
    return (splits[0], splits[1]), facts, tokenizer.size_of(model)


def _split(texts: list[str], eval_fraction: float) -> tuple[list[str], list[str]]:
    """The last part is held out: whole documents, as long as that comes near the fraction.

    A document so long that it would not (a book, the last of three files) is divided between two lines.
    """
    total = sum(map(len, texts))
    target = total * (1 - eval_fraction)
    ends = list(itertools.accumulate(map(len, texts)))
    at = next(i for i, end in enumerate(ends) if end >= target)
    cut = min(at + 1, len(texts) - 1)
    if cut and abs(ends[cut - 1] - target) <= total * eval_fraction / 2:
        return texts[:cut], texts[cut:]
    lines = texts[at].splitlines(keepends=True)
    if len(lines) == 1 and cut:
        return texts[:cut], texts[cut:]
    if len(lines) == 1:
        raise DataError(
            "one line cannot be divided into training and held-out text", where="text", fix="more lines"
        )
    reached = itertools.accumulate(map(len, lines), initial=ends[at] - len(texts[at]))
    line = next(i for i, end in enumerate(reached) if end >= target)
    line = min(max(line, 1), len(lines) - 1)
    return [*texts[:at], "".join(lines[:line])], ["".join(lines[line:]), *texts[at + 1 :]]


def _pieces(texts: list[str]) -> Iterator[str]:
    for text in texts:
        yield from text.splitlines(keepends=True)


def _encode(model: Any, texts: list[str], end: int | None) -> np.ndarray:
    parts: list[np.ndarray] = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), 4096):  # bounds the memory of one call
            batch = model.encode_batch(lines[start : start + 4096], add_special_tokens=False)
            parts.append(np.fromiter(itertools.chain.from_iterable(e.ids for e in batch), np.int64))
        if end is not None:
            parts.append(np.array([end], np.int64))
    return np.concatenate(parts)


def _entropy(ids: np.ndarray) -> float:
    counts = np.unique(np.asarray(ids), return_counts=True)[1] / max(1, len(ids))
    return float(-(counts * np.log(counts)).sum()) if len(ids) > 1 else math.nan
