"""Bytes on their way: a budget that all readers of a cache share, granted window by window."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from weakref import WeakKeyDictionary

from gpu_cache.errors import CacheClosedError, FetchError, FetchTimeoutError, listed

LOOK_S = 0.25  # between two looks of a waiting reader at the progress of those that it waits for
_STALLED_S = 1.0
# A slower node makes no progress: a window of 64 MiB would take 17 minutes.
_LEAST_BYTES_PER_S = 64 << 10


@dataclasses.dataclass(slots=True, eq=False, weakref_slot=True)
class Turn:
    """One reader's place in the queue; the reader takes a new one for each window."""

    node: str  # names it in messages, and shares its part of the budget
    # Bytes that came over its connection so far; None where the reader cannot tell. Any thread may call it.
    num_received: Callable[[], int | None] = lambda: None
    is_given_up: bool = False  # set by any thread, which then calls `wake`


class Stalls:
    """Tells which readers get too few bytes for the windows or buffers that they hold.

    Args:
        now: Seconds, monotonic.
    Thread-safety: any thread. If two look at once, the marks of one stand.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # When a reader last kept pace, and its bytes then. Weak, as a turn leads to a reader and its connection.
        self._marks: WeakKeyDictionary[Turn, tuple[float, int]] = WeakKeyDictionary()

    def look(self, held_since: Mapping[Turn, float]) -> set[Turn]:
        """The stalled readers. One that cannot tell its bytes is stalled after it has held its grant for a second."""
        now = self._now()
        marks = {turn: self._mark(turn, since, now) for turn, since in held_since.items()}
        self._marks = WeakKeyDictionary(marks)
        return {turn for turn, (at, _) in marks.items() if now - at >= _STALLED_S}

    def _mark(self, turn: Turn, since: float, now: float) -> tuple[float, int]:
        received = turn.num_received()
        if received is None:
            return since, 0
        at, before = self._marks.get(turn, (now, received))
        moved = received - before if received >= before else received  # else they came over a new connection
        return (now, received) if moved > _LEAST_BYTES_PER_S * (now - at) else (at, before)


class InflightBudget:
    """The most bytes that may be on their way at once, granted first come, first served, node by node.

    A large request asks again for each window, behind later readers, so it starves none. No reader overtakes one that
    waits, so the request is not starved either. One exception: a node that holds less than another goes first, however
    many readers of the other wait. A window larger than the whole budget is granted alone.

    While a reader of another node waits, the bytes that a stalled reader holds do not count. They do not come, and
    would keep the others' away. So the windows of stalled readers, and no more, may exceed the budget.

    Args:
        limit_bytes: The budget.
    Thread-safety: any thread.
    Source: fair queueing by rounds; our own.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self._stalls = limit_bytes, Stalls()
        # Guards every field below. Notified when bytes come back, when a reader leaves the queue, and on `wake`.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # its `with` is Python: Ctrl-C there would keep the lock taken
        self._queue: dict[Turn, None] = {}  # first come, first served
        self._next: Turn | None = None  # the one of the queue that is granted next
        self._held: dict[Turn, tuple[int, float]] = {}  # bytes, and since when
        self._stalled: set[Turn] = set()  # among those that hold bytes
        self._wait_s = 0.0
        self._is_closed = False

    def __repr__(self) -> str:
        with self._lock:
            return f"InflightBudget({self._nbytes_locked:,} of {self.limit_bytes:,} bytes, {len(self._queue)} waiting)"

    @contextlib.contextmanager
    def granted(self, nbytes: int, turn: Turn, deadline: float) -> Iterator[None]:
        """Wait for room for `nbytes`, and hold it for the length of the context.

        Args:
            nbytes: Bytes of the window that is to be received.
            turn: The reader's; waits for one grant at a time.
            deadline: By `time.monotonic()`.
        Raises:
            FetchTimeoutError: There was none in time.
            FetchError: The turn was given up.
            CacheClosedError: The cache was closed.
        """
        began = time.monotonic()
        try:
            with self._lock:
                self._queue[turn] = None
                self._choose_locked()
            while not self._take(nbytes, turn, began, deadline):
                self._look(turn)
            yield
        finally:
            with self._lock:
                if turn in self._queue:  # without a grant
                    del self._queue[turn]
                    self._wait_s += time.monotonic() - began
                self._held.pop(turn, None)
                self._stalled.discard(turn)
                self._choose_locked()

    def wake(self) -> None:
        """Let waiting readers look whether they were given up."""
        with self._lock:
            self._changed.notify_all()

    def close(self) -> None:
        """Grant nothing any more. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """The budget's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {"inflight_bytes": self._nbytes_locked, "inflight_wait_seconds": self._wait_s}

    def _take(self, nbytes: int, turn: Turn, began: float, deadline: float) -> bool:
        """Wait for the grant; False if it is time to look for stalled readers."""
        with self._lock:
            if not self._is_over_locked(turn, nbytes):
                left_s, is_next = max(0.0, deadline - time.monotonic()), self._next is turn
                self._changed.wait_for(
                    lambda: self._is_over_locked(turn, nbytes) or (self._next is turn) != is_next,
                    min(left_s, LOOK_S) if is_next else left_s,
                )
            if not self._is_over_locked(turn, nbytes):
                if time.monotonic() < deadline:
                    return False
                raise self._late_locked(turn, nbytes, time.monotonic() - began)
            if self._is_closed:
                raise CacheClosedError
            if turn.is_given_up:
                raise FetchError(f"Failed to fetch shards from {turn.node}: the fetch was given up")
            del self._queue[turn]
            self._held[turn] = nbytes, time.monotonic()
            self._wait_s += time.monotonic() - began
            self._choose_locked()  # the next one may fit beside it
            return True

    def _look(self, turn: Turn) -> None:
        """Find the stalled readers, if this one is next and waits for them. Asks the readers outside the lock."""
        with self._lock:
            if self._next is not turn:
                return
            since = {one: at for one, (_, at) in self._held.items()}
        stalled = self._stalls.look(since)
        with self._lock:
            self._stalled = {one for one in stalled if self._held.get(one, (0, None))[1] == since[one]}

    @property
    def _nbytes_locked(self) -> int:
        return sum(nbytes for nbytes, _ in self._held.values())

    def _choose_locked(self) -> None:
        """Choose the next turn: the first of the node that holds the fewest bytes. Let all that wait look."""
        held: Counter[str] = Counter()
        for turn, (nbytes, _) in self._held.items():
            held[turn.node] += nbytes
        self._next = min(self._queue, key=lambda turn: held[turn.node], default=None)
        self._changed.notify_all()

    def _is_over_locked(self, turn: Turn, nbytes: int) -> bool:
        """Whether a turn's wait is over: the bytes that count leave room, or it ends without a grant."""
        if self._is_closed or turn.is_given_up:
            return True
        if self._next is not turn:
            return False
        counted = sum(
            held for other, (held, _) in self._held.items() if other.node == turn.node or other not in self._stalled
        )
        return not counted or counted + nbytes <= self.limit_bytes

    def _late_locked(self, turn: Turn, nbytes: int, waited_s: float) -> FetchTimeoutError:
        nodes = listed(sorted({one.node for one in self._stalled}))
        stalled = f", and next to nothing came from {nodes}" if nodes else ""
        return FetchTimeoutError(
            f"Failed to fetch shards from {turn.node}: {nbytes:,} bytes waited {waited_s:.1f} s for their turn, "
            f"while {self._nbytes_locked:,} of at most {self.limit_bytes:,} were being received{stalled}; "
            "raise max_inflight_bytes (GPU_CACHE_MAX_INFLIGHT_BYTES)"
        )
