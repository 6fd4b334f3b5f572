"""Tokenise text once into memory-mapped files beside a manifest.

  shardtrain data prepare book.txt --output prepared --tokenizer bpe:4096
  shardtrain data prepare 'shards/*.jsonl' --output prepared --tokenizer tokenizer.json --field content

Files: .txt, .txt.gz, .jsonl (one document a line), or tokens: .npy, .bin. A config reads the result with
--data.source FOLDER.
"""

from __future__ import annotations

import argparse
from typing import Any

from shardtrain.cli import shell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["prepare"])
    parser.add_argument("files", nargs="+", metavar="FILE", help="king_james, paths or patterns")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--tokenizer", default="bpe:512", metavar="bpe:N|FILE")
    parser.add_argument("--eval-fraction", type=float, default=0.05)
    parser.add_argument("--field", default="text", help="of .jsonl objects")
    parser.add_argument("--dtype", default="uint16", choices=["uint16", "uint32"], help="of .bin tokens")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from shardtrain.data import prepare

    source = options.files[0] if options.files == ["king_james"] else options.files
    found = prepare(
        source,
        options.output,
        tokenizer=options.tokenizer,
        eval_fraction=options.eval_fraction,
        text_field=options.field,
        dtype=options.dtype,
    )
    if not options.json:
        counts = found.manifest["tokens"]
        print(f"{found.path}")
        print(
            f"{counts['train']:,} training tokens, {counts['eval']:,} held out, {found.vocab_size:,} entries"
        )
        print(f"unigram entropy of the held-out text: {found.unigram_entropy:.4f} nats per token")
    return shell.DONE, {"path": str(found.path), **found.manifest}
