"""Hosts on one machine, for benchmarks that cut a network: namespaces with a name and an address each, at one switch;
and a disk of its own that can be filled.

Linux, as root, with `ip`, `unshare`, `hostname` and `mount`. The switch is a bridge in a namespace of its own, so nothing of this
machine's network is touched. The file system is shared, as a cluster's would be; a cut does not reach it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

_NAMES = Path("/etc/netns")  # `ip netns exec` puts NAME/hosts in the place of /etc/hosts


class Hosts(contextlib.AbstractContextManager["Hosts"]):
    """So many hosts, gone on leaving the block.

    Raises:
        OSError: namespaces are not permitted here, or a tool is missing.
    """

    def __init__(self, count: int):
        self._tag = f"st{os.getpid()}"
        self.names = [f"{self._tag}-{i}" for i in range(count)]
        self.addresses = [f"10.231.77.{i + 1}" for i in range(count)]
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise

    def _make(self) -> None:
        _do("ip", "netns", "add", self._tag)
        _do("ip", "-n", self._tag, "link", "add", "switch", "type", "bridge")
        _do("ip", "-n", self._tag, "link", "set", "switch", "up")
        known = "".join(f"{a} {n}\n" for a, n in zip(self.addresses, self.names, strict=True))
        for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            _do("ip", "netns", "add", name)
            port = ["link", "add", f"port{index}", "type", "veth", "peer", "name", "eth0", "netns", name]
            _do("ip", "-n", self._tag, *port)
            _do("ip", "-n", self._tag, "link", "set", f"port{index}", "master", "switch", "up")
            _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _do("ip", "-n", name, "link", "set", device, "up")
            (_NAMES / name).mkdir(parents=True, exist_ok=True)
            (_NAMES / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def command(self, index: int, words: Sequence[str]) -> list[str]:
        """Runs on that host, under its name."""
        rename = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[index]]
        return ["ip", "netns", "exec", self.names[index], *rename, *words]

    def link(self, index: int, up: bool) -> None:
        """Plug a host's cable in, or pull it."""
        _do("ip", "-n", self._tag, "link", "set", f"port{index}", "up" if up else "down")

    def __exit__(self, *_: object) -> None:
        for name in [*self.names, self._tag]:
            with contextlib.suppress(OSError):
                _do("ip", "netns", "delete", name)
            shutil.rmtree(_NAMES / name, ignore_errors=True)


class Disk(contextlib.AbstractContextManager["Disk"]):
    """So many MiB in memory, mounted on a folder until the block is left.

    Raises:
        OSError: mounting is not permitted here.
    """

    def __init__(self, folder: Path, mib: int):
        self._folder, self._stop = folder, threading.Event()
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        _do("mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", str(folder))

    def fill(self) -> None:
        """Until `free`: what is removed meanwhile makes no room. Returns when it is full."""
        full = threading.Event()

        def write() -> None:
            with (self._folder / ".filler").open("wb", buffering=0) as file:
                while not self._stop.is_set():
                    try:
                        file.write(bytes(1 << 12))
                    except OSError:
                        full.set()
                        self._stop.wait(0.001)

        self._stop.clear()
        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()
        full.wait()

    def free(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            (self._folder / ".filler").unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self.free()
        _do("umount", "--lazy", str(self._folder))


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
