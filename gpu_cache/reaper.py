"""One thread for each cache that drains what dies while nobody calls."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0


class Drainable(Protocol):
    @property
    def is_busy(self) -> bool:
        """Whether anything may become free without a call."""

    def drain(self) -> None:
        """Free what can be freed now."""


class Reaper:
    """Drains a pool once a second while it is busy, and sleeps otherwise.

    Thread-safety: any thread.
    """

    def __init__(self, pool: Drainable, period_s: float = _PERIOD_S) -> None:
        self._pool, self._period_s = pool, period_s
        self._may_be_busy, self._is_stopped = threading.Event(), threading.Event()
        # Guards _thread.
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Something is about to be handed out: watch it."""
        if self._may_be_busy.is_set() or self._is_stopped.is_set():
            return
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="gpu-cache-reaper", daemon=True)
                thread.start()
                self._thread = thread
        self._may_be_busy.set()

    def stop(self) -> None:
        """End the thread and wait for it. Idempotent."""
        self._is_stopped.set()
        self._may_be_busy.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            self._may_be_busy.wait()
            if self._is_stopped.wait(self._period_s):
                return
            self._may_be_busy.clear()  # before looking: what is handed out from here on sets it again
            try:
                self._pool.drain()
            except Exception:
                logger.exception("draining freed shards failed; trying again in %.0f s", self._period_s)
            if self._pool.is_busy:
                self._may_be_busy.set()
