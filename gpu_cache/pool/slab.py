"""The pool: slabs, the blocks carved from them, and the quarantine that freed ranges pass before they are reused.

The pool keeps as many empty slabs as were preallocated, and as many as the latest steps had in use.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch

from gpu_cache.config import ALIGNMENT, CacheConfig, variable
from gpu_cache.device.protocol import Arena, Memory
from gpu_cache.errors import CacheFullError, GpuCacheError
from gpu_cache.pool.block import Copy, Quarantine, Range, Slab, TrimReport, carve_shards
from gpu_cache.pool.eviction import Layout, Span
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.freelist import FreeList
from gpu_cache.pool.high_water import HighWater
from gpu_cache.pool.lease import Husks, Lease, lease_fault
from gpu_cache.source import ShardSpec
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

_OFFSET, _NBYTES, _USED_AT = attrgetter("offset"), attrgetter("nbytes"), attrgetter("used_at")

LOOK_S = 1.0  # between two looks whether the device is short of memory, and whether takes have ended


class Shortage(NamedTuple):
    """Why a pool has no room.

    Attributes:
        kind: The reason in a word; each is warned about in turn.
        words: The reason and the remedy, after the pool's name.
    """

    kind: str
    words: str


class SlabPool:
    """Device memory of one cache.

    Args:
        device: Where arenas live.
        config: Resolved settings.
        fence: Records the events that freed ranges wait for.
        on_dead: Called with the leases that fired.
        husks: Takes tensors of blocks that lost their bytes.
        name: For messages; "pool" or "host tier".
    Attributes:
        husks: As given.
        torch_device: The device that its bytes are on.
        may_overflow: Whether runs that find no room may go outside of it.
    Raises:
        GpuCacheError: Leases are unsound on this torch.
    Thread-safety: any thread. Allocates and releases outside the lock.
    Source: deferred free behind events, as PyTorch's CachingHostAllocator does.
    """

    def __init__(
        self,
        device: Memory,
        config: CacheConfig,
        fence: StreamFence,
        on_dead: Callable[[list[Lease]], None],
        husks: Husks,
        name: str = "pool",
    ) -> None:
        if fault := lease_fault():
            raise GpuCacheError(fault)
        self._fence, self._on_dead = fence, on_dead
        self.name, self._setting = name, f"{name.replace(' ', '_')}_bytes"
        self.may_overflow = not device.hard_limit
        self.husks, self.torch_device = husks, device.torch_device
        self._freed: deque[Lease] = deque()  # leases fire into it, and nothing else appends
        assert config.pool_bytes is not None
        assert config.prealloc_bytes is not None
        self.capacity = config.pool_bytes
        self._device, self._slab_bytes = device, config.slab_bytes
        self._warnings = Throttle()
        # Guards every field below, and those of each slab; _look_at is read without it.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # its `with` is Python: Ctrl-C there would keep the lock taken
        self._slabs: list[Slab] = []  # the smallest first: short runs leave the long slabs to long runs
        self._overflows: list[Slab] = []  # beyond the cap, one run in each
        self._floor_bytes = config.prealloc_bytes  # empty slabs down to this are kept
        self._limit_bytes = sys.maxsize  # but no more than this, from `trim` until `resume`
        self._water = HighWater()
        self._uses = itertools.count(1)  # numbers takes, so that the slab longest unused goes first
        self._is_started = False
        self._growing_bytes = 0  # slabs that are being allocated
        self._reserved_bytes = self._overflow_bytes = 0
        self._in_use_bytes = 0  # slabs that are not empty, without overflow
        self._alloc_failures = 0
        self._num_shortages: int | None = None  # as the device counted at the last look
        self._look_at = 0.0  # when to look next; to be late by one look harms nothing
        self._quarantine: dict[Quarantine, None] = {}  # the oldest first
        self._pending_bytes = self._held_bytes = self._quarantined_bytes = self._peak_bytes = 0

    def __repr__(self) -> str:
        return f"SlabPool({self.accounts()}, at most {self.capacity:,} bytes)"

    def full(self, nbytes: int) -> CacheFullError:
        """The error for a run of `nbytes`, after alignment, that finds no room."""
        why = f"the {self.name} {self.shortage(nbytes).words}"
        return CacheFullError(nbytes, self.free_bytes, self.capacity, setting=self._setting, why=why)

    @property
    def is_busy(self) -> bool:
        """Whether bytes may become free without a call: some are taken, in quarantine, or kept for a next step."""
        with self._lock:
            return bool(self._pending_bytes or self._held_bytes or self._quarantine) or self._has_spare

    def take(self, nbytes: int) -> Range | None:
        """Take one range for a run, growing the pool where it may; None if there is no room now."""
        if not self._is_started:
            self._preallocate()
        while True:
            with self._lock:
                while not (taken := self._take_locked(self._slabs, nbytes)) and self._growing_bytes:
                    self._changed.wait()  # for another thread's slab, which may have room for both
                growth = 0 if taken else self._plan_growth_locked(nbytes)
                # A run longer than a slab may need the room of empty slabs.
                way = [] if taken or growth else self._make_way_locked(nbytes)
            if not (self._grow(growth) if growth else way):
                return taken
            self._release(way)

    def take_overflow(self, nbytes: int) -> Range:
        """Take a range outside the pool, from torch's own allocator.

        Raises:
            CacheFullError: The device has no room either.
        """
        try:
            arena = self._allocate(nbytes, private=False)
        except torch.OutOfMemoryError as error:
            with self._lock:
                reserved = self._reserved_bytes + self._overflow_bytes
            raise CacheFullError(nbytes, self._device.memory_info()[0], self.capacity, reserved) from error
        with self._lock:
            slab = Slab(arena, FreeList(nbytes), is_overflow=True)
            self._add_locked(slab)
            taken = self._take_locked([slab], nbytes)  # at once: empty ones go
        assert taken is not None
        return taken

    def carve(self, taken: Range, specs: Sequence[ShardSpec], offsets: Sequence[int]) -> list[Copy]:
        """Turn a run's range into its shards' tensors. From here on their leases alone give the bytes back.

        Call inside `plain_tensors()`. If it raises, the caller abandons the range, of which leases may cover a part.
        """
        leases: dict[int, Lease] = {}
        try:
            return carve_shards(taken, specs, offsets, self._freed, leases)
        finally:
            nbytes = sum(map(_NBYTES, leases.values()))
            with self._lock:
                taken.slab.leases.update(leases)
                self._pending_bytes -= nbytes
                self._held_bytes += nbytes
            taken.leased_bytes += nbytes

    def abandon(self, taken: Range) -> None:
        """Give back the part of a range that no lease covers; copies into it may still be under way."""
        if not (rest := taken.rest).nbytes:
            return
        with self._lock:
            self._pending_bytes -= rest.nbytes
            self._quarantine[Quarantine([rest])] = None
            self._quarantined_bytes += rest.nbytes

    def drain(self) -> None:
        """Move freed blocks to quarantine, and from there to the free lists if done. Never waits for the device."""
        is_due = time.monotonic() >= self._look_at
        if not (self._freed or self._quarantine or is_due) or self._device.is_capturing():
            return
        if is_due:
            self._look()
        self._settle([one for one in self._fenced() if all(map(self._device.query, one.events or ()))])

    def end_step(self) -> None:
        """Count a clear, which may end a step: see `HighWater`."""
        with self._lock:
            has_ended = self._water.clear(self._held_bytes + self._pending_bytes)
        if has_ended:
            self._look_for_shortage()

    def synchronize(self) -> None:
        """Drain, and wait until what was freed before this call is reusable."""
        held = self._fenced()
        for one in held:
            self._wait_for(one)
        self._settle(held)

    def take_freed(self, nbytes: int) -> Range | None:
        """Take a range from freed bytes: wait for the oldest of them, then the next, until there is room."""
        for one in self._fenced():
            self._wait_for(one)
            self._settle([one])
            if (taken := self.take(nbytes)) is not None:
                return taken
        return self.take(nbytes)  # the reaper may have freed it all, and left nothing to wait for

    def layout(self) -> Layout:
        """The ranges that are free or will be, and the room to grow, for a choice of victims."""
        with self._lock:
            freed = [one for held in self._quarantine for one in held.ranges if not one.slab.is_overflow]
            free = [Span(slab, start, nbytes) for slab in self._slabs for start, nbytes in slab.free.ranges()]
            return Layout(
                {slab: slab.nbytes for slab in self._slabs},
                [*free, *(Span(one.slab, one.offset, one.nbytes) for one in freed)],
                max(0, self.capacity - self._reserved_bytes - self._growing_bytes),
            )

    @property
    def can_reuse(self) -> bool:
        """Whether bytes freed now can be reused: not while a CUDA graph is being captured on any stream."""
        return not self._fence.is_captured

    def trim(self, to_bytes: int = 0) -> TrimReport:
        """Release empty slabs down to `to_bytes`, and keep no more until `resume`."""
        with self._lock:
            self._limit_bytes = min(self._limit_bytes, to_bytes)
            before = self._reserved_bytes + self._overflow_bytes
        self.synchronize()
        self._release_empty()
        with self._lock:
            held = [slab.nbytes for slab in (*self._slabs, *self._overflows) if not slab.free.is_empty]
            return TrimReport(max(0, before - self._reserved_bytes - self._overflow_bytes), sum(held), len(held))

    def resume(self) -> None:
        """End what `trim` began: the next use preallocates again, and slabs are kept from step to step."""
        with self._lock:
            self._limit_bytes, self._is_started = sys.maxsize, False

    def keep(self, nbytes: int) -> None:
        """Preallocate nothing, but keep the slabs that are taken, up to so many bytes."""
        with self._lock:
            self._floor_bytes, self._is_started = nbytes, True

    def stats(self) -> dict[str, int]:
        """The pool's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {
                "device_bytes": self._held_bytes,
                "device_reserved_bytes": self._reserved_bytes + self._overflow_bytes,
                "device_capacity_bytes": self.capacity,
                "device_peak_bytes": self._peak_bytes,
                "device_largest_free_bytes": max((slab.free.largest_free_bytes for slab in self._slabs), default=0),
                "device_quarantined_bytes": self._quarantined_bytes,
                "alloc_failures": self._alloc_failures,
            }

    def accounts(self) -> dict[str, int]:
        """Where each reserved byte is: free + pending + held + quarantined = reserved."""
        with self._lock:
            return {
                "free": sum(slab.free.free_bytes for slab in (*self._slabs, *self._overflows)),
                "pending": self._pending_bytes,
                "held": self._held_bytes,
                "quarantined": self._quarantined_bytes,
                "reserved": self._reserved_bytes + self._overflow_bytes,
            }

    def shortage(self, nbytes: int) -> Shortage:
        """Say why a run of `nbytes`, after alignment, finds no room, and the remedy; its numbers are of one moment."""
        can_reuse = self.can_reuse
        with self._lock:
            free = sum(slab.free.free_bytes for slab in self._slabs)
            largest = max((slab.free.largest_free_bytes for slab in self._slabs), default=0)
            room = max(0, self.capacity - self._reserved_bytes - self._growing_bytes)
            held, pending, freed = self._held_bytes, self._pending_bytes, self._quarantined_bytes
            outside = held + pending + freed + free - self._reserved_bytes
        raising = f"raise {self._device.hard_limit or f'{self._setting} ({variable(self._setting)})'}"
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
            f"is full of shards that are in use ({held:,} held, {pending:,} on their way, {freed:,} waiting to be "
            f"reused, {outside:,} of these outside of it, {free + room:,} free, the largest free range {largest:,}); "
            f"{raising}, or clear what is done with",
        )

    @property
    def free_bytes(self) -> int:
        """Bytes that the pool may still hand out, in any number of pieces."""
        with self._lock:
            taken = self._held_bytes + self._pending_bytes + self._quarantined_bytes
            return max(0, self.capacity + self._overflow_bytes - taken)

    def reset_peak(self) -> None:
        """Make the peak what is in use now."""
        with self._lock:
            self._peak_bytes = self._held_bytes + self._pending_bytes

    def _collect(self) -> None:
        """Quarantine the blocks whose leases fired; until then they count as held."""
        dead: list[Lease] = []
        nbytes = 0
        with self._lock:
            while self._freed:
                lease = self._freed.popleft()
                del lease.slab.leases[lease.offset]
                nbytes += lease.nbytes
                dead.append(lease)
            if not dead:
                return
            self._held_bytes -= nbytes
            self._quarantine[Quarantine(dead)] = None
            self._quarantined_bytes += nbytes
        self._on_dead(dead)

    def _fenced(self) -> list[Quarantine]:
        """Quarantine dead blocks, and return all quarantines that have events; those without get them, if possible.

        Events are recorded after the drop of every block that they guard.
        """
        self._collect()
        with self._lock:
            held = list(self._quarantine)
        if held and held[-1].events is None and (events := self._fence.record()) is not None:
            for one in held:
                if one.events is None:
                    one.events = events
        return [one for one in held if one.events is not None]

    def _wait_for(self, one: Quarantine) -> None:
        for event in one.events or ():
            self._device.synchronize(event)

    def _settle(self, done: Sequence[Quarantine]) -> None:
        """Give ranges back to the free lists. Release slabs that become empty, if the pool keeps enough others."""
        with self._lock:
            for one in done:
                if one not in self._quarantine:  # another thread settled it
                    continue
                del self._quarantine[one]
                # Neighbours die together. To give back thousands of small blocks singly would be a third of a clear.
                for slab, offset, nbytes in _stretches(one.ranges):
                    slab.free.give(offset, nbytes)
                    self._quarantined_bytes -= nbytes
                    if slab.free.is_empty and not slab.is_overflow:
                        self._in_use_bytes -= slab.nbytes
        if done:
            self._release_empty()

    def _look(self) -> None:
        """Keep less if the device is short of memory, or if nothing was taken for long. Once a second."""
        with self._lock:
            if not self._has_spare:
                self._look_at = time.monotonic() + LOOK_S
                return
            self._water.pass_time(self._held_bytes + self._pending_bytes)
        self._look_for_shortage()
        self._release_empty()

    def _give_way(self) -> bool:
        """Release every empty slab, after a wait for freed bytes; whether there was any."""
        before = self.stats()["device_reserved_bytes"]
        self.synchronize()
        self._release_empty(is_scarce=True)
        return self.stats()["device_reserved_bytes"] < before

    def _take_locked(self, slabs: Sequence[Slab], nbytes: int) -> Range | None:
        for slab in slabs:
            was_empty = slab.free.is_empty
            if (offset := slab.free.take(nbytes)) is None:
                continue
            self._pending_bytes += nbytes
            in_use = self._held_bytes + self._pending_bytes
            self._peak_bytes = max(self._peak_bytes, in_use)
            slab.used_at = next(self._uses)
            if not slab.is_overflow:
                self._in_use_bytes += slab.nbytes if was_empty else 0
                self._water.note(self._in_use_bytes, in_use, nbytes)
            return Range(slab, offset, nbytes)
        return None

    @property
    def _has_spare(self) -> bool:
        """Whether more slabs are reserved than the floor: time, or a lack of memory, may take them."""
        return self._reserved_bytes > min(self._floor_bytes, self._limit_bytes)

    def _look_for_shortage(self) -> None:
        """Keep nothing for a while if torch's allocator ran short of memory since the last look.

        It empties its own cache before it gives up, but knows nothing of empty slabs.
        """
        found = self._device.num_shortages()
        with self._lock:
            before, self._num_shortages = self._num_shortages, found
            self._look_at = time.monotonic() + LOOK_S
            if before is not None and found > before:
                self._water.rest()

    def _preallocate(self) -> None:
        """Take the slabs that are kept while empty; once, at first use."""
        if self._num_shortages is None:
            self._look_for_shortage()
        with self._lock:
            kept = min(self._floor_bytes, self._limit_bytes)
            missing = 0 if self._is_started else kept - self._reserved_bytes
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

        Torch's ordinary allocator may have memory that the trainer's blocks left. The cache takes that run by run only,
        as overflow.
        """
        arena = None
        try:
            arena = self._allocate(nbytes, private=True)
        except torch.OutOfMemoryError:
            if self._warnings.opens():  # each fetch may try once more; `alloc_failures` counts them
                logger.warning("no room on %s for a slab of %s bytes", self.torch_device, f"{nbytes:,}")
        finally:
            with self._lock:
                self._growing_bytes -= nbytes
                self._changed.notify_all()
                if arena is None:
                    self._alloc_failures += 1
                else:
                    self._add_locked(Slab(arena, FreeList(nbytes)))
        return arena is not None

    def _allocate(self, nbytes: int, *, private: bool) -> Arena:
        """Take memory from the device. If it has none, release empty slabs and try once more."""
        try:
            return self._device.arena(nbytes, private=private)
        except torch.OutOfMemoryError:
            if not self._give_way():
                raise
        return self._device.arena(nbytes, private=private)

    def _release_empty(self, *, is_scarce: bool = False) -> None:
        """Release empty slabs above those to keep, the longest unused first, and empty overflow.

        With `is_scarce` it keeps none, now and in the next steps.
        """
        with self._lock:
            if is_scarce:
                self._water.rest()
            kept = 0 if is_scarce else min(max(self._floor_bytes, self._water.nbytes), self._limit_bytes)
            released, surplus = [slab for slab in self._overflows if slab.free.is_empty], self._reserved_bytes - kept
            for slab in self._empty_locked():
                if slab.nbytes <= surplus:
                    released.append(slab)
                    surplus -= slab.nbytes
            for slab in released:
                self._remove_locked(slab)
        if released:
            self._release(released)

    def _make_way_locked(self, nbytes: int) -> list[Slab]:
        """Take out empty slabs, for the caller to release, so that a slab of `nbytes` has room; or none.

        Under the same lock as the search for a range: it must not release a slab that became free since.
        """
        lacking = nbytes - (self.capacity - self._reserved_bytes - self._growing_bytes)
        way: list[Slab] = []
        for slab in self._empty_locked():
            if lacking <= 0:
                break
            way.append(slab)
            lacking -= slab.nbytes
        if lacking > 0:
            return []
        for slab in way:
            self._remove_locked(slab)
        return way

    def _empty_locked(self) -> list[Slab]:
        """Slabs without a range in use, the longest unused first."""
        return sorted((slab for slab in self._slabs if slab.free.is_empty), key=_USED_AT)

    def _release(self, slabs: Sequence[Slab]) -> None:
        """Give arenas back to the device. If that fails for one, it stays here, and the others go all the same."""
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
        if slab.is_overflow:
            self._overflows.append(slab)
            self._overflow_bytes += slab.nbytes
        else:
            bisect.insort(self._slabs, slab, key=_NBYTES)
            self._reserved_bytes += slab.nbytes

    def _remove_locked(self, slab: Slab) -> None:
        if slab.is_overflow:
            self._overflows.remove(slab)
            self._overflow_bytes -= slab.nbytes
        else:
            self._slabs.remove(slab)
            self._reserved_bytes -= slab.nbytes


def _stretches(ranges: Iterable[Lease | Range]) -> Iterator[tuple[Slab, int, int]]:
    """Slab, offset and length of ranges, by slab and offset; ranges that follow upon each other become one."""
    by_slab: dict[Slab, list[Lease | Range]] = {}
    for one in ranges:
        by_slab.setdefault(one.slab, []).append(one)
    for slab, inside in by_slab.items():
        inside.sort(key=_OFFSET)
        start = end = inside[0].offset
        for one in inside:
            if one.offset != end:
                yield slab, start, end - start
                start = one.offset
            end = one.offset + one.nbytes
        yield slab, start, end - start
