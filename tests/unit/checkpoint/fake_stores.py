"""A bucket of GCS and of S3 on loopback, with what TensorStore asks of them, and faults on purpose."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape

BUCKET = "bucket"
PAGE = 7  # keys in a page of a list: few, so that lists have several


class FakeStore(ThreadingHTTPServer):
    """`objects`: key to (bytes, generation). `fault(n, method, key)` is asked before the n-th request since `count` was set.

    It answers None (all is well), a status, "drop" (the connection, nothing done), "lost" (done, no answer),
    "short" (half of what is sent is kept, and said to be all) or a number of seconds (a float) to wait.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.fault: Callable[[int, str, str], Any] = lambda n, method, key: None
        self.count = self.generation = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=lambda: self.serve_forever(0.01), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """Dropped connections are meant."""

    def ask(self, method: str, key: str) -> Any:
        with self.lock:
            self.count, n = self.count + 1, self.count
        return self.fault(n, method, key)  # it may ask for something itself

    def put(
        self, key: str, data: bytes, allowed: Callable[[tuple[bytes, int] | None], bool], short: bool
    ) -> int | None:
        """The new generation; None where the condition does not hold. One at a time, as stores promise."""
        if short:
            data = data[: len(data) // 2]
        with self.lock:
            if not allowed(self.objects.get(key)):
                return None
            self.generation += 1
            self.objects[key] = data, self.generation
            return self.generation

    def names(self) -> list[str]:
        return sorted(self.objects)


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    wbufsize = -1
    protocol_version = "HTTP/1.1"
    server: FakeStore

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        gcs = url.path.startswith(("/storage/v1/", "/upload/storage/v1/"))
        bucket, key = self._names(url.path, query, gcs)
        action = self.server.ask(self.command, key)
        if isinstance(action, float):
            time.sleep(action)
        if action == "drop":
            self.close_connection = True
            return
        if isinstance(action, int):
            self._answer(action, b"" if gcs else _error(f"Status{action}"))
            return
        self.short = action == "short"
        if bucket != BUCKET:
            status, headers, data = 404, {}, b"{}" if gcs else _error("NoSuchBucket")
        elif gcs:
            status, headers, data = self._gcs(key, query, body)
        else:
            status, headers, data = self._s3(key, query, body)
        if action == "lost":
            self.close_connection = True
            return
        self._answer(status, data, headers)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _names(self, path: str, query: dict[str, str], gcs: bool) -> tuple[str, str]:
        if gcs:
            bucket, _, key = path.partition("/b/")[2].partition("/o")
            return bucket, query.get("name") or urllib.parse.unquote(key.removeprefix("/"))
        bucket, _, key = path.removeprefix("/").partition("/")
        return bucket, urllib.parse.unquote(key)

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _object(self, key: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        data = self.server.objects[key][0]
        if "range" not in self.headers:
            return 200, headers, data
        start, _, end = self.headers["range"].removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end or len(data)), len(data) - 1)
        if first >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _page(self, keys: list[str], token: str) -> tuple[list[str], str]:
        rest = [key for key in keys if key > token]
        return rest[:PAGE], rest[PAGE - 1] if len(rest) > PAGE else ""

    def _gcs(self, key: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        store, is_json = self.server, {"Content-Type": "application/json"}
        if self.command == "POST":
            wanted = query.get("ifGenerationMatch")
            made = store.put(key, body, lambda old: wanted in (None, str(old[1] if old else 0)), self.short)
            found = {"name": key, "generation": str(made), "size": str(len(body))}
            return (412, {}, b"") if made is None else (200, is_json, json.dumps(found).encode())
        if self.command == "DELETE":
            return (204, {}, b"") if store.objects.pop(key, None) else (404, {}, b"")
        if not key:
            first, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            page, token = self._page(
                [k for k in store.names() if first <= k < end], query.get("pageToken", "")
            )
            items = [{"name": k, "size": str(len(store.objects[k][0]))} for k in page]
            return 200, is_json, json.dumps({"items": items} | ({"nextPageToken": token} if token else {})).encode()  # fmt: skip
        if key not in store.objects:
            return 404, {}, b""
        return self._object(key, {"x-goog-generation": str(store.objects[key][1])})

    def _s3(self, key: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        store = self.server
        tag = lambda data: f'"{hashlib.md5(data).hexdigest()}"'
        match, none = self.headers.get("if-match"), self.headers.get("if-none-match")
        if self.command == "PUT":
            if self.headers["x-amz-content-sha256"] != hashlib.sha256(body).hexdigest():
                return 400, {}, _error("XAmzContentSHA256Mismatch")
            allowed = lambda old: (
                (match is None or (old is not None and tag(old[0]) == match)) and not (none == "*" and old)
            )
            made = store.put(key, body, allowed, self.short)
            return (
                (412, {}, _error("PreconditionFailed")) if made is None else (200, {"ETag": tag(body)}, b"")
            )
        if self.command == "DELETE":
            store.objects.pop(key, None)
            return 204, {}, b""
        if "list-type" in query:
            keys = [k for k in store.names() if k.startswith(query.get("prefix", ""))]
            page, token = self._page(keys, query.get("continuation-token", ""))
            sizes = [(escape(k), len(store.objects[k][0])) for k in page]
            contents = "".join(f"<Contents><Key>{k}</Key><Size>{n}</Size></Contents>" for k, n in sizes)
            more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
            whole = f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}{contents}"
            return 200, {}, f'<?xml version="1.0"?><ListBucketResult>{whole}</ListBucketResult>'.encode()
        if key not in store.objects:
            return 404, {}, _error("NoSuchKey")
        own = tag(store.objects[key][0])
        if match is not None and match != own:
            return 412, {}, _error("PreconditionFailed")
        return self._object(key, {"ETag": own})


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>'.encode()
