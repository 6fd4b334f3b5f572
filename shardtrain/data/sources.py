"""Documents from files: .txt, .jsonl, either also as .gz; and tokens from .npy, .bin."""

from __future__ import annotations

import glob
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shardtrain.errors import DataError

KING_JAMES = pathlib.Path(__file__).parent / "text" / "king_james.txt.gz"
TOKENS = (".npy", ".bin")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")  # of .bin


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find(source: Source) -> list[pathlib.Path]:
    """The files of a source: the name of the shipped text, paths, patterns."""
    if source == "king_james":
        return [KING_JAMES]
    files: list[pathlib.Path] = []
    for name in [source] if isinstance(source, str | os.PathLike) else source:
        path = pathlib.Path(name).expanduser()
        found = (
            [path]
            if path.is_file()
            else [pathlib.Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        )
        found = [p for p in found if p.is_file()]
        if not found:
            raise DataError(
                "no such file",
                where=str(name),
                fix="king_james, or files that end in .txt .jsonl .npy .bin, text also in .gz",
            )
        files += found
    kinds = {p.suffix in TOKENS for p in files}
    if len(kinds) > 1:
        raise DataError(
            "text and token files together", where=", ".join(map(str, files[:4])), fix="one kind at a time"
        )
    return files


def documents(file: pathlib.Path, field: str) -> Iterator[str]:
    """The documents of one text file; a .txt is one."""
    if file.name.removesuffix(".gz").endswith(".jsonl"):
        # Not `splitlines`: a JSON string may hold other ends of lines, such as U+2028.
        for number, line in enumerate(_text(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number} is not JSON: {error.msg}", where=str(file), fix="one object a line"
                ) from error
            if not isinstance(value, dict) or not isinstance(value.get(field), str):
                has = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise DataError(
                    f"line {number} has no text field '{field}'",
                    where=str(file),
                    why=f"it has: {has}",
                    fix="--data.field NAME",
                )
            yield value[field]
    else:
        yield _text(file)


def _text(file: pathlib.Path) -> str:
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"not a whole gzip file: {error}", where=str(file), fix="fetch it again"
            ) from error
    if not raw.strip():
        raise DataError("the file is empty", where=str(file), fix="a file with text")
    at = raw.find(b"\0")
    if at >= 0:
        raise DataError(
            f"binary, not text: a zero byte at offset {at}",
            where=str(file),
            fix=".npy or .bin for tokens, or UTF-8 text",
        )
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}",
            where=str(file),
            fix="convert it to UTF-8, or .npy or .bin for tokens",
        ) from error


def tokens(file: pathlib.Path, dtype: str) -> np.ndarray:
    """Token ids of a .npy (1-D, integers) or a raw .bin of `dtype`, memory-mapped."""
    size = file.stat().st_size
    if size == 0:
        raise DataError("the file is empty", where=str(file), fix="a file with tokens")
    if file.suffix == ".bin":
        if dtype not in DTYPES:
            raise DataError(f"'{dtype}' is no type of tokens", where="dtype", fix=", ".join(DTYPES))
        width = np.dtype(dtype).itemsize
        if size % width:
            raise DataError(
                f"{size} bytes are not whole {dtype} tokens",
                where=str(file),
                fix="--data.dtype uint16 or uint32 (--dtype of `data prepare`)",
            )
        return np.memmap(file, dtype=dtype, mode="r")
    try:
        array: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"not a readable .npy: {error}", where=str(file), fix="numpy.save of the tokens"
        ) from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"{array.dtype} with {array.ndim} dims",
            where=str(file),
            fix="a 1-D array of integers: all tokens in order",
        )
    return array
