"""The pool: slabs, the blocks carved from them, and the quarantine that freed ranges pass before they are reused."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from gpu_cache.block import Quarantine, Range, Slab, carve_shards
from gpu_cache.config import ALIGNMENT, CacheConfig
from gpu_cache.device import Device
from gpu_cache.entry import Landing
from gpu_cache.errors import CacheFullError, GpuCacheError
from gpu_cache.fence import StreamFence
from gpu_cache.freelist import FreeList
from gpu_cache.lease import Lease, lease_fault
from gpu_cache.source import ShardSpec

logger = logging.getLogger(__name__)


class SlabPool:
    """Device memory of one cache.

    Args:
        device: Where arenas live.
        config: Resolved settings.
        fence: Records the events that freed ranges wait for.
        on_dead: Told the leases that fired.
    Raises:
        GpuCacheError: Leases are unsound on this torch.
    Thread-safety: any thread.
    Source: deferred free behind events, as PyTorch's CachingHostAllocator does.
    """

    def __init__(
        self, device: Device, config: CacheConfig, fence: StreamFence, on_dead: Callable[[list[Lease]], None]
    ) -> None:
        if fault := lease_fault():
            raise GpuCacheError(fault)
        assert config.pool_bytes is not None
        assert config.prealloc_bytes is not None
        self.capacity = config.pool_bytes
        self._device, self._slab_bytes, self._fence, self._on_dead = device, config.slab_bytes, fence, on_dead
        self._freed: deque[Lease] = deque()  # leases fire into it, and nothing else appends
        # Guards every field below and those of each slab.
        self._lock = threading.Condition(threading.Lock())
        self._slabs: list[Slab] = []
        self._quarantine: dict[Quarantine, None] = {}
        self._keep_bytes = config.prealloc_bytes  # empty slabs down to this are kept
        self._is_started = False
        self._growing_bytes = 0  # of slabs being allocated
        self._reserved_bytes = self._overflow_bytes = 0
        self._pending_bytes = self._held_bytes = self._quarantined_bytes = self._peak_bytes = 0
        self._alloc_failures = 0

    def __repr__(self) -> str:
        return f"SlabPool({self.accounts()}, at most {self.capacity:,} bytes)"

    @property
    def is_busy(self) -> bool:
        """Whether bytes may become free without a call: any are taken, or in quarantine."""
        with self._lock:
            return bool(self._pending_bytes or self._held_bytes or self._quarantine)

    def take(self, nbytes: int) -> Range | None:
        """Take one range for a run, growing the pool where it may; None if there is no room now."""
        self._preallocate()
        while True:
            with self._lock:
                while not (taken := self._take_locked(nbytes)) and self._growing_bytes:
                    self._lock.wait()  # for another thread's slab, which may have room for both
                growth = 0 if taken else self._plan_growth_locked(nbytes)
            # A run longer than a slab may need the room of empty ones.
            is_settled = taken or nbytes > self.capacity
            if is_settled or not (self._grow(growth) if growth else self._release_empty(keep_bytes=0)):
                return taken

    def take_overflow(self, nbytes: int) -> Range:
        """Take a range outside the pool, from torch's own allocator.

        Raises:
            CacheFullError: The device has no room either.
        """
        try:
            arena = self._device.arena(nbytes, private=False)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(nbytes, self._device.memory_info()[0], self.capacity) from error
        slab = Slab(arena, FreeList(nbytes), is_overflow=True)
        with self._lock:
            self._slabs.append(slab)
            self._overflow_bytes += nbytes
            taken = self._take_from_locked(slab, nbytes)
        assert taken is not None
        return taken

    def carve(self, taken: Range, specs: Sequence[ShardSpec], offsets: Sequence[int]) -> list[Landing]:
        """Turn a run's range into its shards' tensors; from here on their leases alone give the bytes back.

        Call inside `plain_tensors()`. If building one fails, what no lease covers is for the caller to abandon.
        """
        leases: dict[int, Lease] = {}
        landings = []
        nbytes = 0
        try:
            for landing, lease in carve_shards(taken, specs, offsets, self._freed):
                landings.append(landing)
                leases[lease.offset] = lease
                nbytes += lease.nbytes
        finally:
            with self._lock:
                taken.slab.leases.update(leases)
                self._pending_bytes -= nbytes
                self._held_bytes += nbytes
            taken.leased_bytes += nbytes
        return landings

    def abandon(self, taken: Range) -> None:
        """Give back a range whose run failed; copies into it may still be under way."""
        if not (rest := taken.rest).nbytes:
            return
        with self._lock:
            self._pending_bytes -= rest.nbytes
            self._quarantine_locked([rest], rest.nbytes)

    def drain(self) -> None:
        """Move freed blocks to quarantine, and what is done there to the free lists. Never waits for the device."""
        if not (self._freed or self._quarantine) or self._device.is_capturing():
            return
        self._collect()
        self._settle([one for one in self._fenced() if all(map(self._device.query, one.events or ()))])

    def synchronize(self) -> None:
        """Drain, and wait until what was freed before this call is reusable."""
        self._collect()
        held = self._fenced()
        for one in held:
            for event in one.events or ():
                self._device.synchronize(event)
        self._settle(held)

    def trim(self, to_bytes: int = 0) -> bool:
        """Release empty slabs down to `to_bytes`, and keep no more from now on; whether any was released."""
        with self._lock:
            self._keep_bytes = min(self._keep_bytes, to_bytes)
            before = self._reserved_bytes
        self.synchronize()
        self._release_empty(self._keep_bytes)
        with self._lock:
            return self._reserved_bytes < before

    def stats(self) -> dict[str, int]:
        """The pool's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {
                "device_bytes": self._held_bytes,
                "device_reserved_bytes": self._reserved_bytes + self._overflow_bytes,
                "device_capacity_bytes": self.capacity,
                "device_peak_bytes": self._peak_bytes,
                "device_largest_free_bytes": max(
                    (slab.free.largest_free_bytes for slab in self._slabs if not slab.is_overflow), default=0
                ),
                "device_quarantined_bytes": self._quarantined_bytes,
                "alloc_failures": self._alloc_failures,
            }

    def accounts(self) -> dict[str, int]:
        """Where every reserved byte is: free + pending + held + quarantined = reserved. For tests and reports."""
        with self._lock:
            return {
                "free": sum(slab.free.free_bytes for slab in self._slabs),
                "pending": self._pending_bytes,
                "held": self._held_bytes,
                "quarantined": self._quarantined_bytes,
                "reserved": self._reserved_bytes + self._overflow_bytes,
            }

    @property
    def free_bytes(self) -> int:
        """What the pool may still hand out, in however many pieces."""
        with self._lock:
            taken = self._held_bytes + self._pending_bytes + self._quarantined_bytes
            return max(0, self.capacity + self._overflow_bytes - taken)

    def reset_peak(self) -> None:
        """Make the peak what is in use now."""
        self._peak_bytes = self._held_bytes + self._pending_bytes

    def _collect(self) -> None:
        """Quarantine the blocks whose leases fired. Until then they count as held."""
        dead: list[Lease] = []
        with self._lock:
            while self._freed:
                dead.append(self._freed.popleft())
                del dead[-1].slab.leases[dead[-1].offset]
            self._held_bytes -= (nbytes := sum(lease.nbytes for lease in dead))
            if dead:
                self._quarantine_locked(dead, nbytes)
        self._on_dead(dead)

    def _fenced(self) -> list[Quarantine]:
        """What is in quarantine and has its events; those recorded here come after every drop."""
        with self._lock:
            held = list(self._quarantine)
        if unfenced := [one for one in held if one.events is None]:
            events = self._fence.record()
            for one in unfenced:
                one.events = events
        return [one for one in held if one.events is not None]

    def _settle(self, done: Sequence[Quarantine]) -> None:
        """Make ranges reusable, and release slabs that this leaves empty above what is kept."""
        with self._lock:
            for one in done:
                if one not in self._quarantine:  # another thread settled it
                    continue
                del self._quarantine[one]
                for freed in one.ranges:
                    freed.slab.free.give(freed.offset, freed.nbytes)
                    self._quarantined_bytes -= freed.nbytes
        if done:
            self._release_empty(self._keep_bytes)

    def _release_empty(self, keep_bytes: int) -> bool:
        with self._lock:
            released = []
            for slab in reversed(self._slabs):
                is_spare = slab.is_overflow or self._reserved_bytes - slab.nbytes >= keep_bytes
                if slab.free.is_empty and is_spare:
                    released.append(slab)
                    if slab.is_overflow:
                        self._overflow_bytes -= slab.nbytes
                    else:
                        self._reserved_bytes -= slab.nbytes
            self._slabs = [slab for slab in self._slabs if slab not in released]
        for slab in released:
            self._device.release_arena(slab.arena)
        return bool(released)

    def _preallocate(self) -> None:
        """Take the slabs that are kept while empty; once, at first use."""
        with self._lock:
            missing = 0 if self._is_started else self._keep_bytes
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
        """Add the slab that `_plan_growth_locked` reserved; False if the device has no room."""
        arena = None
        try:
            arena = self._device.arena(nbytes)
        except torch.OutOfMemoryError:
            logger.warning("no room on %s for a slab of %s bytes", self._device.torch_device, f"{nbytes:,}")
        finally:
            with self._lock:
                self._growing_bytes -= nbytes
                self._lock.notify_all()
                if arena is None:
                    self._alloc_failures += 1
                else:
                    self._slabs.append(Slab(arena, FreeList(nbytes)))
                    self._reserved_bytes += nbytes
        return arena is not None

    def _take_locked(self, nbytes: int) -> Range | None:
        for slab in self._slabs:
            if not slab.is_overflow and (taken := self._take_from_locked(slab, nbytes)):
                return taken
        return None

    def _take_from_locked(self, slab: Slab, nbytes: int) -> Range | None:
        offset = slab.free.take(nbytes)
        if offset is None:
            return None
        self._pending_bytes += nbytes
        self._peak_bytes = max(self._peak_bytes, self._held_bytes + self._pending_bytes)
        return Range(slab, offset, nbytes)

    def _quarantine_locked(self, ranges: Sequence[Range | Lease], nbytes: int) -> None:
        self._quarantine[Quarantine(ranges)] = None
        self._quarantined_bytes += nbytes
