"""Object stores, `gs://` and `s3://`: the few things that we ask of one. The one module that knows TensorStore.

TensorStore is what Orbax itself reads and writes stores with, and has conditional writes of both kinds (generations of
GCS, ETags of S3), so no other client is needed. It finds credentials as the clients of Google and AWS do. An emulator or a
store of another make is named by `TENSORSTORE_GCS_HTTP_URL` or by `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import os
import re
from typing import Any

from shardtrain.errors import CheckpointError, RunError, ShardTrainError

DRIVERS = {"gs": "gcs", "s3": "s3"}
RETRIES = {
    "max_retries": 5,
    "initial_delay": "500ms",
    "max_delay": "8s",
}  # of what a store answers with 5xx or 429
ANSWER = 60.0  # seconds to wait for one, and more where there are bytes:
SLOWEST = 1 << 20  # bytes a second; under that a store counts as silent
MISSING = b"\x02"  # TensorStore's generation of what is not there
OURS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "INVALID_ARGUMENT")  # no time will heal these


class StoreError(OSError):
    """A store did not do what it was asked for. `lasting`: it will not by itself."""

    def __init__(self, message: str, *, lasting: bool = False):
        super().__init__(message)
        self.lasting = lasting


def is_url(path: Any) -> bool:
    return "://" in str(path)


class Store:
    """A folder in a bucket. Methods wait for the answer, for a time that has an end.

    Args:
        url: `gs://BUCKET/FOLDER` or `s3://BUCKET/FOLDER`.

    Raises:
        CheckpointError: another URL. StoreError: by its methods.
    """

    def __init__(self, url: str):
        found = re.fullmatch(r"(\w+)://([a-z0-9][a-z0-9._-]+)/([\w.=-]+(?:/[\w.=-]+)*)/?", url, re.ASCII)
        if not found or found[1] not in DRIVERS or {".", ".."} & set(found[3].split("/")):
            raise CheckpointError(
                "not the URL of a folder in a store",
                where=url,
                why="letters, digits and ._=- in its names",
                fix="gs://BUCKET/FOLDER or s3://BUCKET/FOLDER",
            )
        self.url = url.rstrip("/")
        driver = DRIVERS[found[1]]
        self._spec: dict[str, Any] = {"driver": driver, "bucket": found[2], "path": found[3] + "/"}
        if driver == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            self._spec |= {"endpoint": endpoint} if endpoint else {}
            self._spec |= {"aws_region": region or "us-east-1"} if region or endpoint else {}
        self._context = {f"{driver}_request_retries": RETRIES}
        self._opened: Any = None

    @property
    def _kv(self) -> Any:
        if self._opened is None:
            import tensorstore

            opening = tensorstore.KvStore.open(self._spec, context=tensorstore.Context(self._context))
            self._opened = self._answer(opening, "be opened")
        return self._opened

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """What an object holds, None where there is none, and its generation."""
        found = self._answer(self._kv.read(key), f"give {key}", 1 << 26)
        return (found.value if found.state == "value" else None), found.stamp.generation

    def write(self, key: str, data: bytes) -> None:
        """All of it or nothing."""
        self._answer(self._kv.write(key, data), f"take {key}", len(data))

    def replace(self, key: str, data: bytes, generation: bytes) -> bytes | None:
        """Write if the object is still of that generation; its new one, or None where it is not."""
        stamp = self._answer(self._kv.write(key, data, if_equal=generation), f"take {key}", len(data))
        return stamp.generation or None

    def ends_with(self, key: str, size: int, last: bytes) -> bool:
        """Is the object there, of that size, with that last byte? Reads one byte."""
        try:
            found = self._answer(
                self._kv.read(key, byte_range=slice(size - 1, None)), f"give the end of {key}", 1
            )
        except StoreError as error:
            if "OUT_OF_RANGE" in str(error):
                return False
            raise
        return found.state == "value" and found.value == last

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects under `prefix`."""
        import tensorstore

        within = tensorstore.KvStore.KeyRange(prefix, _after(prefix))
        return sorted(key.decode() for key in self._answer(self._kv.list(within), "list"))

    def delete(self, key: str) -> None:
        self._answer(self._kv.write(key, None), f"delete {key}")

    def _answer(self, future: Any, what: str, size: int = 0) -> Any:
        limit = ANSWER + size / SLOWEST
        try:
            return future.result(timeout=limit)
        except TimeoutError:
            future.cancel()
            raise StoreError(f"did not {what} within {limit:.0f} s") from None
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            said = re.sub(r"\s*\[[^\]]*(?:body|source|headers)[^\]]*\].*", "", str(error), flags=re.DOTALL)[
                :300
            ]
            lasting = said.startswith(OURS)
            raise StoreError(f"did not {what}: {said}", lasting=lasting) from error


def _after(prefix: str) -> str:
    """The first key behind all that begin with `prefix`; empty: there is no end."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""


def refusal(url: str, error: StoreError) -> ShardTrainError:
    """What a start ends with: as wrong input where no time will heal it, else as a run that may be tried again."""
    if error.lasting:
        return CheckpointError(
            f"the store {error}",
            where=url,
            fix="check the bucket, its permissions and the credentials (GOOGLE_APPLICATION_CREDENTIALS, AWS_PROFILE, ...)",
        )
    return RunError(
        f"the store {error}",
        where=url,
        why="whether another run writes there, or this one is further there, cannot be known",
        fix="the same command later; or without `durable`, which keeps the folder alone",
    )
