"""One thread for each cache that frees dead shards between calls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from gpu_cache.pool.lease import Husks
from gpu_cache.process import OwnThread

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
_DROPPING_S = 0.5  # longest that it drops husks before it looks at the pool again
_AT_ONCE, _BREAK_S = 256, 0.0005  # 256 drops take 0.1 ms where no other thread runs Python, our measurement


class Drainable(Protocol):
    @property
    def is_busy(self) -> bool:
        """Whether anything may become free without a call."""

    def drain(self) -> None:
        """Free what can be freed now."""

    def finish(self) -> None:
        """Give back what is not held, and wait for the device where that takes it; nothing new is handed out."""


class Reaper:
    """Drains a pool once a second while it is busy, drops what is left of tensors, and sleeps otherwise.

    Its thread keeps the pool alive: the blocks of a cache that is closed, or gone, still find their way back.

    Attributes:
        awake: Set while anything may be handed out or freed; then `wake` has nothing to do.
    Thread-safety: any thread.
    """

    def __init__(self, pool: Drainable, husks: Husks, period_s: float | None = None) -> None:
        self._pool, self._period_s = pool, PERIOD_S if period_s is None else period_s
        self._husks = husks
        self.awake, self._is_retired = threading.Event(), threading.Event()
        self._is_ended = threading.Event()
        # Guards _thread.
        self._lock = threading.Lock()
        self._thread: OwnThread | None = None
        self._first: Callable[[], object] | None = None

    def wake(self) -> None:
        """Something may be handed out or given back: look after it."""
        if self.awake.is_set() or self._is_retired.is_set():
            return
        with self._lock:
            if self._thread is None:
                thread = OwnThread(self._run, "gpu-cache-reaper", self.end)
                thread.start()
                self._thread = thread
        self.awake.set()

    def retire(self, first: Callable[[], object] | None = None) -> None:
        """Go on until nothing is held, give back what is left, and end. Idempotent; only sets flags.

        Args:
            first: Called by the thread before it looks.
        """
        self._first = first
        self._is_retired.set()
        self.awake.set()

    def end(self) -> None:
        """Retire it, and look once more: what is held then is given back by the process's end. Only sets flags."""
        self._is_ended.set()
        self._is_retired.set()
        self.awake.set()

    def _run(self) -> None:
        pause = self._is_retired.wait  # retirement cuts it short, once
        while True:
            self.awake.wait()
            pause(self._period_s)
            if self._is_retired.is_set():
                pause = self._is_ended.wait
            self.awake.clear()  # before looking: what is handed out from here on sets it again
            is_last = self._is_ended.is_set()
            is_idle = self._reap()
            if is_last:  # remaining tensors go with the process
                return
            self._drop_husks()
            if is_idle and self._is_retired.is_set():
                return
            if not is_idle or len(self._husks):
                self.awake.set()

    def _drop_husks(self) -> None:
        """Drop some of them, with breaks: each may have to wait for the GIL, or keep others waiting."""
        until = time.monotonic() + _DROPPING_S
        while len(self._husks) and time.monotonic() < until and not self._is_ended.is_set():
            self._husks.drop(_AT_ONCE)
            time.sleep(_BREAK_S)

    def _reap(self) -> bool:
        """Free what can be freed; whether nothing is left to look after."""
        try:
            if not self._is_retired.is_set():
                self._pool.drain()
            else:
                if self._first is not None:
                    self._first()
                self._pool.finish()
        except Exception:
            logger.exception("draining freed shards failed; trying again in %.0f s", self._period_s)
            return False
        return not self._pool.is_busy
