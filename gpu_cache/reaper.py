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
        """Whether bytes may become free without a call."""

    def drain(self) -> None:
        """Free the bytes that can be freed now."""

    def finish(self) -> None:
        """Give back memory that no reader holds, and wait for the device if need be. Nothing new is handed out."""


class Reaper:
    """Drains pools once a second while they are busy, drops husks, and sleeps otherwise.

    Its thread keeps the pools alive, so that blocks of a closed or dead cache still find their way back.

    Args:
        pool: Drained.
        husks: Dropped.
        period_s: Seconds between two looks; None: `PERIOD_S`.

    Attributes:
        awake: Set while tensors may be handed out or freed; then `wake` has nothing to do.
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
        """Look after the pools from now on: a call hands tensors out, or lets them die."""
        if self.awake.is_set() or self._is_retired.is_set():
            return
        with self._lock:
            if self._thread is None:
                thread = OwnThread(self._run, "gpu-cache-reaper", self.end)
                thread.start()
                self._thread = thread
        self.awake.set()

    def retire(self, first: Callable[[], object] | None = None) -> None:
        """Go on until no reader holds a block, give the memory back, and end. Idempotent; only sets flags.

        Args:
            first: Called by the thread before it looks.
        """
        self._first = first
        self._is_retired.set()
        self.awake.set()

    def end(self) -> None:
        """Retire, and look once more. The end of the process gives back what readers still hold. Only sets flags."""
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
        """Drop some husks, with breaks: each drop may wait for the GIL, or keep others waiting for it."""
        until = time.monotonic() + _DROPPING_S
        while len(self._husks) and time.monotonic() < until and not self._is_ended.is_set():
            self._husks.drop(_AT_ONCE)
            time.sleep(_BREAK_S)

    def _reap(self) -> bool:
        """Free the bytes that can be freed; return whether nothing is left to look after."""
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
