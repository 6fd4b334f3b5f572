"""Byte-pair tokenizers by Hugging Face `tokenizers`."""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from shardtrain.errors import DataError

END_OF_TEXT = "<|endoftext|>"


def train(texts: Iterable[str], entries: int) -> Any:
    """A byte-level BPE of `entries` entries, `<|endoftext|>` among them; the same on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if entries < len(alphabet) + 1:
        raise DataError(
            f"{entries} entries do not hold the {len(alphabet)} bytes and one special token",
            where=f"tokenizer bpe:{entries}",
            fix=f"bpe:{len(alphabet) + 1} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(path: str | pathlib.Path) -> Any:
    """A `tokenizer.json`."""
    from tokenizers import Tokenizer

    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError("no such tokenizer", where=str(file), fix="bpe:512, or the path of a tokenizer.json")
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"not a tokenizer: {str(error).splitlines()[0]}",
            where=str(file),
            fix="a Hugging Face tokenizer.json",
        ) from error


def entries_of(name: str) -> int | None:
    """512 for `bpe:512`; None for a path."""
    match = re.fullmatch(r"bpe:(\d+)", name)
    return int(match.group(1)) if match else None


def size_of(tokenizer: Any) -> int:
    """The largest id plus one: the rows a table needs. More than the count of entries where ids have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def end_of_text(tokenizer: Any) -> int | None:
    """The id of the token between documents, if the tokenizer has one."""
    for name in (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    return None


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
