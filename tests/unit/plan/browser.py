"""A real browser, spoken to over its DevTools protocol: what a page draws, says, asks the network for and complains of."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60.0


def installed() -> str | None:
    """Path of a browser of the Chromium family."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One headless browser with one tab. `problems`: errors of scripts, and every request but that for the page itself."""

    def __init__(self, program: str):
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp(prefix="browser-")
        flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # as root there is none
        self.process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.numbers, self.events, self.problems = itertools.count(1), [], []
        try:
            self.socket = self.loop.run_until_complete(self._connect())
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> Any:
        place, end = pathlib.Path(self.folder, "DevToolsActivePort"), time.monotonic() + WAIT
        while not place.is_file() or "\n" not in place.read_text():
            assert time.monotonic() < end and self.process.poll() is None, "the browser did not start"
            await asyncio.sleep(0.05)
        address = f"http://127.0.0.1:{place.read_text().splitlines()[0]}/json/list"
        tabs: list[Any] = []
        while not tabs:
            answer = await AsyncHTTPClient().fetch(address)
            tabs = [t for t in json.loads(answer.body) if t["type"] == "page"]
        return await websocket_connect(tabs[0]["webSocketDebuggerUrl"], max_message_size=2**28)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(WAIT)
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, params), WAIT))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(await self.socket.read_message())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            found = params["exceptionDetails"]
            self.problems.append(found.get("exception", {}).get("description") or found["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            asked = params["request"]["url"]
            if asked != self.address and not asked.startswith("data:"):
                self.problems.append(f"asked for {asked}")

    async def _until(self, event: str) -> None:
        while event not in self.events:
            self._heard(json.loads(await self.socket.read_message()))

    def open(self, file: pathlib.Path, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """Load a page from the disk, in a window of that size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.events, self.problems, self.address = [], [], file.resolve().as_uri()
        self.call("Page.navigate", url=self.address)
        self.loop.run_until_complete(asyncio.wait_for(self._until("Page.loadEventFired"), WAIT))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def shot(self, file: pathlib.Path, whole: bool = True) -> None:
        """A PNG of the page, as long as it is."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")["data"]
        file.write_bytes(base64.b64decode(data))
