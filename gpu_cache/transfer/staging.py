"""The staging ring: a few pinned host buffers on the way to the device. The last copy's event guards each."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque

from gpu_cache.config import CacheConfig
from gpu_cache.device.protocol import Device, Event, Pinned
from gpu_cache.errors import CacheClosedError, TransferError
from gpu_cache.transfer import inflight
from gpu_cache.transfer.inflight import Stalls, Turn


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """One pinned buffer. Belongs to the thread that acquired it."""

    pinned: Pinned
    guard: Event | None = None  # behind its last copies; when it is done, the bytes may be overwritten
    turn: Turn | None = None  # the turn of the reader that receives into it
    since: float = 0.0  # when that reader got it


class StagingRing:
    """A fixed number of slots, allocated one by one as they are first needed.

    While a reader of another node waits, a stalled reader's slot does not count: there may be one slot more.

    Thread-safety: any thread. Allocates and waits for the device outside the lock.
    """

    def __init__(self, device: Device, config: CacheConfig) -> None:
        self.slot_bytes = config.staging_slot_bytes
        self._device, self._max_slots, self._stalls = device, config.staging_slots, Stalls()
        # Guards every field below. Notified when a slot comes back and on close.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # its `with` is Python: Ctrl-C there would keep the lock taken
        self._idle: deque[Slot] = deque()  # the longest idle first: its copies are the likeliest to be done
        self._slots: list[Slot] = []
        self._num_allocating = 0
        self._stalled: set[Turn] = set()  # among those that hold slots
        self._is_closed = False
        self._wait_s = 0.0
        self._peak_slots = self._alloc_failures = 0

    def __repr__(self) -> str:
        with self._lock:
            return f"StagingRing({len(self._idle)} idle of {len(self._slots)} slots of {self.slot_bytes:,} bytes)"

    def acquire(self, timeout_s: float, turn: Turn | None = None) -> Slot:
        """Wait for a slot whose last copies are done; it is the caller's until `release`.

        Args:
            timeout_s: Longest wait, in seconds.
            turn: The turn of the reader that is to receive into it.
        Raises:
            TransferError: None came free within `timeout_s`.
            CacheClosedError: The ring was closed.
        """
        began = time.monotonic()
        turn = turn or Turn("")
        slot = self._reserve(timeout_s, turn)
        if slot is not None and not self._is_done(slot) and self._exchange(slot):
            slot = None
        slot = slot or self._allocate()
        try:
            if slot.guard is not None:
                self._device.synchronize(slot.guard)
                slot.guard = None
        except BaseException:
            self.release(slot)
            raise
        with self._lock:
            slot.turn, slot.since = turn, time.monotonic()
            self._peak_slots = max(self._peak_slots, len(self._slots) - len(self._idle))
            self._wait_s += time.monotonic() - began
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back. The caller has set `guard` if copies from it were enqueued."""
        with self._lock:
            if slot.turn is not None:
                self._stalled.discard(slot.turn)
            slot.turn = None
            is_surplus = self._is_closed or len(self._slots) - len(self._stalled) > self._max_slots
            if not is_surplus:
                self._idle.append(slot)
            self._changed.notify_all()  # a reader of another node may go on where the first one may not
        if is_surplus:
            self._free(slot)

    def close(self) -> None:
        """Free the idle slots now and the others as they come back; waiting threads get an error. Idempotent.

        Slots whose last copies the device cannot tell of stay for the next call. Raises the device's last error then.
        """
        with self._lock:
            self._is_closed = True
            idle = list(self._idle)
            self._idle.clear()
            self._changed.notify_all()
        with contextlib.ExitStack() as stack:  # each, also behind one that raises
            for slot in idle:
                stack.callback(self._free, slot)

    def stats(self) -> dict[str, float]:
        """The ring's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {
                "pinned_wait_seconds": self._wait_s,
                "pinned_bytes": (len(self._slots) - len(self._idle)) * self.slot_bytes,
                "pinned_capacity_bytes": len(self._slots) * self.slot_bytes,
                "is_pinned": int(bool(self._slots) and all(slot.pinned.is_pinned for slot in self._slots)),
            }

    def details(self) -> dict[str, int]:
        """Further figures of a report, under the report's names."""
        with self._lock:
            return {
                "pinned_peak_bytes": self._peak_slots * self.slot_bytes,
                "pinned_alloc_failures": self._alloc_failures,
            }

    def reset_peak(self) -> None:
        """Set the peak to the slots in use now."""
        with self._lock:
            self._peak_slots = len(self._slots) - len(self._idle)

    def _reserve(self, timeout_s: float, turn: Turn) -> Slot | None:
        """Wait for an idle slot; None: the caller must allocate one."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            with self._lock:
                if self._changed.wait_for(lambda: self._can_proceed_locked(turn.node), min(left_s, inflight.LOOK_S)):
                    return self._reserve_locked()
            if left_s <= inflight.LOOK_S:
                raise TransferError(
                    f"no staging buffer came free in {timeout_s:.1f} s: all {self._max_slots} of "
                    f"{self.slot_bytes:,} bytes are in use; raise staging_slots (GPU_CACHE_STAGING_SLOTS)"
                )
            self._look()

    def _reserve_locked(self) -> Slot | None:
        if self._is_closed:
            raise CacheClosedError("the cache was closed while waiting for a staging buffer")
        if self._idle:
            return self._idle.popleft()
        self._num_allocating += 1
        return None

    def _look(self) -> None:
        """Find the stalled readers. Asks them outside the lock."""
        with self._lock:
            since = {slot.turn: slot.since for slot in self._slots if slot.turn is not None}
        stalled = self._stalls.look(since)
        with self._lock:
            self._stalled = {slot.turn for slot in self._slots if slot.turn is not None and slot.turn in stalled}

    def _is_done(self, slot: Slot) -> bool:
        """Whether its copies are done; a slot of which the device does not tell goes back."""
        try:
            return slot.guard is None or self._device.query(slot.guard)
        except BaseException:
            self.release(slot)
            raise

    def _exchange(self, slot: Slot) -> bool:
        """Give back a slot that is still copied from, if another one may be allocated instead of a wait."""
        with self._lock:
            if self._is_closed or len(self._slots) + self._num_allocating >= self._max_slots:
                return False
            self._idle.appendleft(slot)
            self._num_allocating += 1
            self._changed.notify_all()
            return True

    def _can_proceed_locked(self, node: str) -> bool:
        num_counted = len(self._slots) + self._num_allocating - sum(turn.node != node for turn in self._stalled)
        return self._is_closed or bool(self._idle) or num_counted < self._max_slots

    def _allocate(self) -> Slot:
        slot = None
        try:
            slot = Slot(self._device.pinned(self.slot_bytes))
        finally:
            with self._lock:
                self._num_allocating -= 1
                if slot is not None:
                    self._slots.append(slot)
                else:
                    self._alloc_failures += 1
                    self._changed.notify_all()  # not each reader may go on
        return slot

    def _free(self, slot: Slot) -> None:
        is_done = False
        try:
            if slot.guard is not None:
                self._device.synchronize(slot.guard)
            is_done = True
        finally:
            with self._lock:
                if is_done:
                    self._slots.remove(slot)
                else:
                    self._idle.append(slot)
                self._changed.notify_all()
        self._device.release_pinned(slot.pinned)
