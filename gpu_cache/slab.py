"""The pool: slabs, the blocks carved from them, and the quarantine that freed ranges pass before they are reused."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gpu_cache.block import Quarantine, Range, Slab, TrimReport, carve_shards
from gpu_cache.config import CacheConfig, variable
from gpu_cache.device import Device
from gpu_cache.entry import Landing
from gpu_cache.errors import CacheFullError, GpuCacheError
from gpu_cache.fence import StreamFence
from gpu_cache.lease import Husks, Lease, lease_fault
from gpu_cache.slab_set import LOOK_S, SlabSet
from gpu_cache.source import ShardSpec
from gpu_cache.victims import Layout, Span


class Shortage(NamedTuple):
    """Why a pool has no room.

    Attributes:
        kind: In a word; each is warned about in turn.
        words: What the pool is, has or does, and what helps.
    """

    kind: str
    words: str


class SlabPool(SlabSet):
    """Device memory of one cache.

    Args:
        device: Where arenas live.
        config: Resolved settings.
        fence: Records the events that freed ranges wait for.
        on_dead: Told the leases that fired.
        husks: Takes what is left of tensors that blocks were built with; None: its own.
    Raises:
        GpuCacheError: Leases are unsound on this torch.
    Thread-safety: any thread.
    Source: deferred free behind events, as PyTorch's CachingHostAllocator does.
    """

    def __init__(
        self,
        device: Device,
        config: CacheConfig,
        fence: StreamFence,
        on_dead: Callable[[list[Lease]], None],
        husks: Husks | None = None,
    ) -> None:
        if fault := lease_fault():
            raise GpuCacheError(fault)
        super().__init__(device, config)
        self._fence, self._on_dead = fence, on_dead
        self._husks = Husks() if husks is None else husks
        self._freed: deque[Lease] = deque()  # leases fire into it, and nothing else appends
        # Guarded by the lock.
        self._quarantine: dict[Quarantine, None] = {}  # the oldest first
        self._pending_bytes = self._held_bytes = self._quarantined_bytes = self._peak_bytes = 0

    def __repr__(self) -> str:
        return f"SlabPool({self.accounts()}, at most {self.capacity:,} bytes)"

    @property
    def husks(self) -> Husks:
        """What is left of tensors of this pool."""
        return self._husks

    @property
    def is_busy(self) -> bool:
        """Whether bytes may become free without a call: any are taken, in quarantine, or kept for a next step."""
        with self._lock:
            return bool(self._pending_bytes or self._held_bytes or self._quarantine) or self._has_spare

    def take(self, nbytes: int) -> Range | None:
        """Take one range for a run, growing the pool where it may; None if there is no room now."""
        self._preallocate()
        while True:
            with self._lock:
                while not (taken := self._take_locked(nbytes)) and self._growing_bytes:
                    self._lock.wait()  # for another thread's slab, which may have room for both
                growth = 0 if taken else self._plan_growth_locked(nbytes)
                # A run longer than a slab may need the room of empty ones.
                way = [] if taken or growth else self._make_way_locked(nbytes)
            if not (self._grow(growth) if growth else way):
                return taken
            self._release(way)

    def take_free(self, nbytes: int) -> Range | None:
        """Take a range of what is free now; the pool does not grow for it."""
        with self._lock:
            return self._take_locked(nbytes)

    def take_overflow(self, nbytes: int) -> Range:
        """Take a range outside the pool, from torch's own allocator.

        Raises:
            CacheFullError: The device has no room either.
        """
        try:
            slab = self._overflow(nbytes)
        except torch.OutOfMemoryError as error:
            with self._lock:
                reserved = self._reserved_bytes + self._overflow_bytes
            raise CacheFullError(nbytes, self._device.memory_info()[0], self.capacity, reserved) from error
        with self._lock:
            self._add_locked(slab)
            taken = self._take_from_locked(slab, nbytes)
        assert taken is not None
        return taken

    def carve(self, taken: Range, specs: Sequence[ShardSpec], offsets: Sequence[int]) -> list[Landing]:
        """Turn a run's range into its shards' tensors; from here on their leases alone give the bytes back.

        Call inside `plain_tensors()`. If building one fails, what no lease covers is for the caller to abandon.
        """
        leases: dict[int, Lease] = {}
        try:
            return carve_shards(taken, specs, offsets, self._freed, leases)
        finally:
            nbytes = sum(lease.nbytes for lease in leases.values())
            with self._lock:
                taken.slab.leases.update(leases)
                self._pending_bytes -= nbytes
                self._held_bytes += nbytes
            taken.leased_bytes += nbytes

    def abandon(self, taken: Range) -> None:
        """Give back a range whose run failed; copies into it may still be under way."""
        if not (rest := taken.rest).nbytes:
            return
        with self._lock:
            self._pending_bytes -= rest.nbytes
            self._quarantine_locked([rest], rest.nbytes)

    def drain(self) -> None:
        """Move freed blocks to quarantine, and what is done there to the free lists. Never waits for the device."""
        is_due = time.monotonic() >= self._look_at
        if not (self._freed or self._quarantine or is_due) or self._device.is_capturing():
            return
        if is_due:
            self._look()
        self._collect()
        self._settle([one for one in self._fenced() if all(map(self._device.query, one.events or ()))])

    def end_step(self) -> None:
        """Something was cleared: what is in use from here on is the next step's. See `HighWater`."""
        with self._lock:
            has_ended = self._water.clear(self._held_bytes + self._pending_bytes)
        if has_ended:
            self._look_for_shortage()

    def synchronize(self) -> None:
        """Drain, and wait until what was freed before this call is reusable."""
        self._collect()
        held = self._fenced()
        for one in held:
            self._wait_for(one)
        self._settle(held)

    def take_freed(self, nbytes: int) -> Range | None:
        """Take a range from what was freed: waits for the oldest of it, then the next, until there is room."""
        self._collect()
        for one in self._fenced():
            self._wait_for(one)
            self._settle([one])
            if (taken := self.take(nbytes)) is not None:
                return taken
        return self.take(nbytes)  # the reaper may have been first, and left nothing to wait for

    def layout(self) -> Layout:
        """Where room is, or could be made, for a choice of victims."""
        with self._lock:
            slabs = [slab for slab in self._slabs if not slab.is_overflow]
            freed = [one for held in self._quarantine for one in held.ranges if not one.slab.is_overflow]
            free = [Span(slab, start, nbytes) for slab in slabs for start, nbytes in slab.free.ranges()]
            return Layout(
                {slab: slab.nbytes for slab in slabs},
                [*free, *(Span(one.slab, one.offset, one.nbytes) for one in freed)],
                max(0, self.capacity - self._reserved_bytes - self._growing_bytes),
            )

    @property
    def can_reuse(self) -> bool:
        """Whether what is freed now can become free: not while a CUDA graph is being captured on any stream."""
        return not self._fence.is_captured

    def trim(self, to_bytes: int = 0) -> TrimReport:
        """Release empty slabs down to `to_bytes`, and keep no more until `resume`."""
        with self._lock:
            self._limit_bytes = to_bytes if self._limit_bytes is None else min(self._limit_bytes, to_bytes)
            before = self._reserved_bytes + self._overflow_bytes
        self.synchronize()
        self._release_empty()
        with self._lock:
            held = [slab.nbytes for slab in self._slabs if not slab.free.is_empty]
            return TrimReport(max(0, before - self._reserved_bytes - self._overflow_bytes), sum(held), len(held))

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

    def shortage(self, nbytes: int, setting: str) -> Shortage:
        """Say why a run of `nbytes` finds no room, and what helps, with the numbers of one moment.

        Args:
            nbytes: Of the run, after alignment.
            setting: The field of the settings that bounds this pool.
        """
        can_reuse = self.can_reuse
        with self._lock:
            slabs = [slab for slab in self._slabs if not slab.is_overflow]
            free = sum(slab.free.free_bytes for slab in slabs)
            largest = max((slab.free.largest_free_bytes for slab in slabs), default=0)
            room = max(0, self.capacity - self._reserved_bytes - self._growing_bytes)
            held, pending, freed = self._held_bytes, self._pending_bytes, self._quarantined_bytes
        raising = f"raise {setting} ({variable(setting)})"
        if nbytes > self.capacity:
            return Shortage("length", f"is shorter than this run of {nbytes:,} bytes; {raising}")
        if room >= nbytes:
            return Shortage("device", f"may grow by {room:,}, and the device has no memory for that; free some there")
        if not can_reuse and freed:
            return Shortage("capture", f"cannot reuse {freed:,} freed bytes during CUDA graph capture; fetch before")
        if free + room >= nbytes:
            return Shortage("pieces", f"has {free + room:,} bytes free in pieces, {largest:,} the largest; {raising}")
        if pending >= max(held, freed, 1):
            return Shortage("pending", f"has {pending:,} bytes taken for shards on their way; {raising}")
        return Shortage(
            "use",
            f"is full of shards that are in use ({held:,} held, {freed:,} waiting to be reused, the largest free range "
            f"{largest:,}); {raising}, or clear what is done with",
        )

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

    def _wait_for(self, one: Quarantine) -> None:
        for event in one.events or ():
            self._device.synchronize(event)

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
                    if freed.slab.free.is_empty and not freed.slab.is_overflow:
                        self._in_use_bytes -= freed.slab.nbytes
        if done:
            self._release_empty()

    def _look(self) -> None:
        """Once in a while: keep less if the device is short of memory, or if nothing is taken any more."""
        with self._lock:
            if not self._has_spare:
                self._look_at = time.monotonic() + LOOK_S
                return
            self._water.pass_time(self._held_bytes + self._pending_bytes)
        self._look_for_shortage()
        self._release_empty()

    def _give_way(self) -> bool:
        """Also what only waits to be reused."""
        before = self.stats()["device_reserved_bytes"]
        self.synchronize()
        super()._give_way()
        return self.stats()["device_reserved_bytes"] < before

    def _take_locked(self, nbytes: int) -> Range | None:
        for slab in self._slabs:
            if not slab.is_overflow and (taken := self._take_from_locked(slab, nbytes)):
                return taken
        return None

    def _take_from_locked(self, slab: Slab, nbytes: int) -> Range | None:
        was_empty = slab.free.is_empty
        offset = slab.free.take(nbytes)
        if offset is None:
            return None
        self._pending_bytes += nbytes
        in_use = self._held_bytes + self._pending_bytes
        self._peak_bytes = max(self._peak_bytes, in_use)
        slab.used_at = next(self._uses)
        if not slab.is_overflow:
            self._in_use_bytes += slab.nbytes if was_empty else 0
            self._water.note(self._in_use_bytes, in_use, nbytes)
        return Range(slab, offset, nbytes)

    def _quarantine_locked(self, ranges: Sequence[Range | Lease], nbytes: int) -> None:
        self._quarantine[Quarantine(ranges)] = None
        self._quarantined_bytes += nbytes
