"""Has somebody outside asked this run to stop?"""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax


class Preemption:
    """SIGTERM on one process; on several, JAX's preemption service, which has all stop after one step."""

    def __init__(self) -> None:
        self._asked = False
        self._handles = False
        self._previous: Any = None

    def install(self) -> None:
        """Take SIGTERM. On several processes it is left to JAX's own notifier."""
        main = threading.current_thread() is threading.main_thread()
        if main and not self._handles and jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._handles = True

    def remove(self) -> None:
        """Give SIGTERM back to who had it."""
        if self._handles:
            # None: it was set by C code, and Python cannot put it back
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._handles = False

    def asked(self, step: int | None) -> bool:
        """True once asked. On several processes all must call this with the same `step`, and it turns true
        for all at the same one."""
        if self._asked or step is None or jax.process_count() == 1:
            return self._asked
        if jax.config.jax_enable_preemption_service:
            from jax.experimental import multihost_utils

            self._asked = bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def _on_signal(self, *_: object) -> None:
        self._asked = True
