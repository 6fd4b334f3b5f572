"""Digests of files: a CRC-32 of every 64 MiB.

A core does 1.5 GiB/s of SHA-256, several times that of CRC-32 by carry-less products (ISA-L; `zlib` has the same numbers
and takes longer: `benchmarks/results/checkpoint.json`). CRC-32 sees every flip of
one bit, of two within a chunk (its period is 512 MiB, hence chunks), and every burst up to 32 bits; other damage, such as
another file in the place of this one, goes unseen once in 2^32. What SHA-256 would add is a defence against somebody
who forges files; that one can write a new manifest as well.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine
    from zlib import crc32

CHUNK = 1 << 26
BLOCK = 1 << 20  # stays in the cache of a core
THREADS = 4


def of_files(place: Path, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Name to the digests of its chunks, for files under `place` of the sizes given; several threads read."""
    chunks = [(name, start) for name, size in sizes.items() for start in range(0, size, CHUNK)]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda chunk: _chunk(place / chunk[0], chunk[1]), chunks))
    result: dict[str, list[str]] = {name: [] for name in sizes}
    for (name, _), digest in zip(chunks, found, strict=True):
        result[name].append(digest)
    return result


def of(data: bytes) -> str:
    """The digest of a chunk that is in memory."""
    return f"{crc32(data):08x}"


def differences(place: Path, sizes: Mapping[str, int], digests: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with the contents of files that have their sizes, a sentence each."""
    try:
        now = of_files(place, sizes)
    except (
        OSError
    ) as error:  # a disk that cannot be read; of one file, since the others may take as long to fail
        return [f"{error.filename} cannot be read: {error.strerror}"]
    found = []
    for name, size in sizes.items():
        pairs = itertools.zip_longest(now[name], digests.get(name, []))
        if bad := [i for i, (here, written) in enumerate(pairs) if here != written]:
            first, last = bad[0] * CHUNK, min(size, (bad[-1] + 1) * CHUNK)
            found.append(f"the file {name} is not what was written: bytes {first} to {last} of {size} differ")
    return found


def _chunk(file: Path, start: int) -> str:
    crc, left, block = 0, CHUNK, memoryview(bytearray(BLOCK))
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            while left and (count := stream.readinto(block[: min(BLOCK, left)])):
                crc = crc32(block[:count], crc)
                left -= count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    return f"{crc:08x}"
