"""The slabs of a pool: how they are taken from the device, kept, and given back."""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from gpu_cache.block import Slab
from gpu_cache.config import ALIGNMENT, CacheConfig
from gpu_cache.device import Arena, Device
from gpu_cache.freelist import FreeList

logger = logging.getLogger(__name__)

# What the latest steps had in use is kept. Fewer, and batches of changing length take slabs again and again; more, and
# one long batch, as of an evaluation, keeps its memory for longer.
NUM_STEPS = 16
IDLE_S = 60.0  # without a take: counts as a step that needed no more than is in use
LOOK_S = 1.0  # between two looks at whether the device is short of memory, and whether nobody takes anything


class HighWater:
    """The most bytes of slabs that the latest steps had in use: what the pool keeps for the next one.

    A clear ends a step if at least half of what came free since the last one was taken again: the clears of one step,
    one for each owner, count once, also while a prefetch takes the next batch. A minute without a take ends a step
    too, so that an idle process keeps a peak for a quarter of an hour and no longer.

    Args:
        now: Seconds, of a clock that only goes forward.
    Thread-safety: none; the owner locks.
    Source: our measurement: slabs that go and come back every step stall a trainer's launches for 31 ms on an H100,
        and cost the host 0.76 instead of 0.12 CPU seconds per GB.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._peaks: deque[int] = deque(maxlen=NUM_STEPS)
        self._num_resting = 0  # steps for which nothing is kept
        self._peak_bytes = 0  # of slabs in use in this step
        self._most_bytes = self._least_bytes = 0  # in use in this step
        self._taken_bytes = 0
        self._idle_since = now()

    @property
    def nbytes(self) -> int:
        """Bytes of slabs worth keeping."""
        return 0 if self._num_resting else max(self._peak_bytes, *self._peaks, 0)

    def note(self, slab_bytes: int, used_bytes: int, taken_bytes: int) -> None:
        """Count a take.

        Args:
            slab_bytes: Of the slabs that are in use with it.
            used_bytes: In use with it, in all slabs.
            taken_bytes: Of the take.
        """
        self._peak_bytes = max(self._peak_bytes, slab_bytes)
        self._most_bytes = max(self._most_bytes, used_bytes)
        self._least_bytes = min(self._least_bytes, used_bytes - taken_bytes)
        self._taken_bytes += taken_bytes
        self._idle_since = self._now()

    def clear(self, used_bytes: int) -> bool:
        """Count a clear, when so many bytes are in use; whether it ends a step."""
        self._least_bytes = min(self._least_bytes, used_bytes)
        if not self._taken_bytes or 2 * self._taken_bytes < self._most_bytes - self._least_bytes:
            return False
        self._end(used_bytes)
        return True

    def pass_time(self, used_bytes: int) -> None:
        """End a step if nothing was taken for long."""
        if self._now() - self._idle_since >= IDLE_S:
            self._end(used_bytes)

    def rest(self) -> None:
        """Count nothing that was in use until now, nor what the next steps have in use."""
        self._peaks.clear()
        self._peak_bytes, self._num_resting = 0, NUM_STEPS

    def _end(self, used_bytes: int) -> None:
        self._peaks.append(self._peak_bytes)
        self._num_resting = max(0, self._num_resting - 1)
        self._begin(used_bytes)

    def _begin(self, used_bytes: int) -> None:
        self._peak_bytes = 0  # what the last step leaves counts from the first take on, if it is still in use then
        self._most_bytes = self._least_bytes = used_bytes
        self._taken_bytes = 0
        self._idle_since = self._now()


class SlabSet:
    """Slabs up to a cap, and overflow beyond it.

    Empty slabs are kept as far as they were preallocated, and as far as the latest steps had them in use.

    Args:
        device: Where arenas live.
        config: Resolved settings.
    Thread-safety: any thread. Allocates and releases outside the lock.
    """

    def __init__(self, device: Device, config: CacheConfig) -> None:
        assert config.pool_bytes is not None
        assert config.prealloc_bytes is not None
        self.capacity = config.pool_bytes
        self._device, self._slab_bytes = device, config.slab_bytes
        # Guards every field below, those of each slab, and those of the pool that this is a part of.
        self._lock = threading.Condition(threading.Lock())
        self._slabs: list[Slab] = []  # the smallest first: what is short leaves the long ones to what needs them
        self._floor_bytes = config.prealloc_bytes  # empty slabs down to this are kept in any case
        self._limit_bytes: int | None = None  # and no more than this: what was trimmed to, until `resume`
        self._water = HighWater()
        self._uses = itertools.count(1)  # numbers takes, so that the slab longest unused goes first
        self._is_started = False
        self._growing_bytes = 0  # of slabs being allocated
        self._reserved_bytes = self._overflow_bytes = 0
        self._in_use_bytes = 0  # of slabs that are not empty, overflow left out
        self._alloc_failures = 0
        self._num_shortages: int | None = None  # as the device counted at the last look
        self._look_at = 0.0  # when to look next; read without the lock, as being late by one look harms nothing

    def resume(self) -> None:
        """Take back what `trim` said: the next use preallocates again, and keeps what it did."""
        with self._lock:
            self._limit_bytes, self._is_started = None, False

    def keep(self, nbytes: int) -> None:
        """Preallocate nothing, but keep what is taken, up to so many bytes, from now on."""
        with self._lock:
            self._floor_bytes, self._is_started = nbytes, True

    @property
    def _kept_bytes(self) -> int:
        """Empty slabs down to this are kept."""
        kept = max(self._floor_bytes, self._water.nbytes)
        return kept if self._limit_bytes is None else min(kept, self._limit_bytes)

    @property
    def _has_spare(self) -> bool:
        """Whether more is reserved than will be for good: time, or a lack of memory, may take it."""
        for_good = self._floor_bytes if self._limit_bytes is None else min(self._floor_bytes, self._limit_bytes)
        return self._reserved_bytes > for_good

    def _look_for_shortage(self) -> None:
        """Keep nothing for a while if torch's allocator ran short of memory since the last look.

        It empties its own cache before it gives up, but of empty slabs it knows nothing.
        """
        found = self._device.num_shortages()
        with self._lock:
            before, self._num_shortages = self._num_shortages, found
            self._look_at = time.monotonic() + LOOK_S
            if before is not None and found > before:
                self._water.rest()

    def _preallocate(self) -> None:
        """Take the slabs that are kept while empty; once, at first use."""
        if self._is_started:
            return
        if self._num_shortages is None:
            self._look_for_shortage()
        with self._lock:
            wanted = self._floor_bytes if self._limit_bytes is None else min(self._floor_bytes, self._limit_bytes)
            missing = 0 if self._is_started else wanted - self._reserved_bytes
            self._is_started = True
        while missing > 0:
            with self._lock:
                growth = self._plan_growth_locked(min(missing, self._slab_bytes))
            if not growth or not self._grow(growth):
                return
            missing -= growth

    def _plan_growth_locked(self, nbytes: int) -> int:
        """Reserve the bytes of a new slab that can hold `nbytes`; 0 if the pool may not grow so far."""
        room = self.capacity - self._reserved_bytes - self._growing_bytes
        if nbytes > room:
            return 0
        growth = min(max(nbytes, self._slab_bytes), room // ALIGNMENT * ALIGNMENT)
        self._growing_bytes += growth
        return growth

    def _grow(self, nbytes: int) -> bool:
        """Add the slab that `_plan_growth_locked` reserved; False if the device has no room.

        Then torch's ordinary allocator is not asked for it: of what the trainer's blocks left there, the cache takes no
        more than a run at a time, as overflow.
        """
        arena = None
        try:
            arena = self._allocate(nbytes, private=True)
        except torch.OutOfMemoryError:
            logger.warning("no room on %s for a slab of %s bytes", self._device.torch_device, f"{nbytes:,}")
        finally:
            with self._lock:
                self._growing_bytes -= nbytes
                self._lock.notify_all()
                if arena is None:
                    self._alloc_failures += 1
                else:
                    self._add_locked(Slab(arena, FreeList(nbytes)))
        return arena is not None

    def _overflow(self, nbytes: int) -> Slab:
        """A slab from torch's own allocator, for the caller to add and to take from at once: empty ones go."""
        return Slab(self._allocate(nbytes, private=False), FreeList(nbytes), is_overflow=True)

    def _allocate(self, nbytes: int, *, private: bool) -> Arena:
        """Take memory from the device; if it has none, once more without the slabs that nobody uses."""
        try:
            return self._device.arena(nbytes, private=private)
        except torch.OutOfMemoryError:
            if not self._give_way():
                raise
        return self._device.arena(nbytes, private=private)

    def _give_way(self) -> bool:
        """Release what the device needs more than the pool; whether any."""
        return self._release_empty(is_scarce=True)

    def _release_empty(self, *, is_scarce: bool = False) -> bool:
        """Release empty slabs down to what is kept, and empty overflow; whether any.

        Where memory is scarce none is kept, now and in the next steps.
        """
        with self._lock:
            if is_scarce:
                self._water.rest()
            kept = 0 if is_scarce else self._kept_bytes
            released = []
            for slab in self._empty_locked():
                if slab.is_overflow or self._reserved_bytes - slab.nbytes >= kept:
                    released.append(slab)
                    self._count_locked(slab, -slab.nbytes)
            self._slabs = [slab for slab in self._slabs if slab not in released]
        self._release(released)
        return bool(released)

    def _make_way_locked(self, nbytes: int) -> list[Slab]:
        """Take out empty slabs, for the caller to release, so that one of `nbytes` may come; none if it may not.

        Under the lock under which no range was found: released later, they might be what has become free since.
        """
        lacking = nbytes - (self.capacity - self._reserved_bytes - self._growing_bytes)
        way: list[Slab] = []
        for slab in [one for one in self._empty_locked() if not one.is_overflow]:
            if lacking <= 0:
                break
            way.append(slab)
            lacking -= slab.nbytes
        if lacking > 0:
            return []
        for slab in way:
            self._slabs.remove(slab)
            self._count_locked(slab, -slab.nbytes)
        return way

    def _empty_locked(self) -> list[Slab]:
        """Those that nothing is taken of, the longest unused first."""
        return sorted((slab for slab in self._slabs if slab.free.is_empty), key=lambda slab: slab.used_at)

    def _release(self, slabs: Sequence[Slab]) -> None:
        """Give arenas back to the device. One that it fails to take comes back, and keeps no other from going."""
        failed: Exception | None = None
        for slab in slabs:
            try:
                self._device.release_arena(slab.arena)
            except Exception as error:
                failed = failed or error
                if slab.arena.nbytes:  # else the device has it, and will free it with a later one
                    with self._lock:
                        self._add_locked(slab)
        if failed is not None:
            raise failed

    def _add_locked(self, slab: Slab) -> None:
        bisect.insort(self._slabs, slab, key=lambda one: one.nbytes)
        self._count_locked(slab, slab.nbytes)

    def _count_locked(self, slab: Slab, nbytes: int) -> None:
        if slab.is_overflow:
            self._overflow_bytes += nbytes
        else:
            self._reserved_bytes += nbytes
