"""Bytes on their way: a budget that all readers of a cache share, granted window by window."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator

from gpu_cache.errors import CacheClosedError, FetchError, FetchTimeoutError


@dataclasses.dataclass(slots=True, eq=False)
class Turn:
    """One reader's place in the queue, which it takes anew for each window."""

    node: str  # for messages
    is_given_up: bool = False  # set by anybody, who then calls `wake`


class InflightBudget:
    """The most bytes that may be on their way at once, granted first come, first served.

    A large request asks again for each window, behind whoever came meanwhile, so that it starves nobody; and nobody
    overtakes one that waits, so that it is not starved either. A window larger than the whole budget is granted alone.

    Args:
        limit_bytes: The budget.
    Thread-safety: any thread.
    Source: fair queueing by rounds; our own.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        # Guards every field below. Notified when bytes come back, when somebody leaves the queue, and on `wake`.
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[Turn] = deque()
        self._nbytes = 0
        self._wait_s = 0.0
        self._is_closed = False

    def __repr__(self) -> str:
        with self._changed:
            return f"InflightBudget({self._nbytes:,} of {self.limit_bytes:,} bytes, {len(self._queue)} waiting)"

    @contextlib.contextmanager
    def granted(self, nbytes: int, turn: Turn, deadline: float) -> Iterator[None]:
        """Wait for room for `nbytes`, and hold it for the length of the context.

        Args:
            nbytes: Of the window that is to be received.
            turn: The reader's; waits for one grant at a time.
            deadline: As by `time.monotonic()`.
        Raises:
            FetchTimeoutError: There was none in time.
            FetchError: The turn was given up.
            CacheClosedError: The cache was closed.
        """
        self._take(nbytes, turn, deadline)
        try:
            yield
        finally:
            with self._changed:
                self._nbytes -= nbytes
                self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait look again whether they were given up."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Grant nothing any more. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """The budget's part of `BufferStats`, consistent in itself."""
        with self._changed:
            return {"inflight_bytes": self._nbytes, "inflight_wait_seconds": self._wait_s}

    def _take(self, nbytes: int, turn: Turn, deadline: float) -> None:
        began = time.monotonic()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(lambda: self._is_over_locked(turn, nbytes), max(0.0, deadline - began))
                self._check_locked(turn, nbytes, time.monotonic() - began)
                self._nbytes += nbytes
            finally:
                self._queue.remove(turn)
                self._changed.notify_all()  # the next one may fit beside it
                self._wait_s += time.monotonic() - began

    def _is_over_locked(self, turn: Turn, nbytes: int) -> bool:
        return self._is_closed or turn.is_given_up or self._is_next_locked(turn, nbytes)

    def _is_next_locked(self, turn: Turn, nbytes: int) -> bool:
        return self._queue[0] is turn and (not self._nbytes or self._nbytes + nbytes <= self.limit_bytes)

    def _check_locked(self, turn: Turn, nbytes: int, waited_s: float) -> None:
        if self._is_closed:
            raise CacheClosedError
        if turn.is_given_up:
            raise FetchError(f"Failed to fetch shards from {turn.node}: the fetch was given up")
        if not self._is_next_locked(turn, nbytes):
            raise FetchTimeoutError(
                f"Failed to fetch shards from {turn.node}: {nbytes:,} bytes waited {waited_s:.1f} s for their turn, "
                f"while {self._nbytes:,} of at most {self.limit_bytes:,} were being received; raise max_inflight_bytes "
                "(GPU_CACHE_MAX_INFLIGHT_BYTES)"
            )
