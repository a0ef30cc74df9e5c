"""The slabs of a pool: how they are taken from the device, and given back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from gpu_cache.block import Slab
from gpu_cache.config import ALIGNMENT, CacheConfig
from gpu_cache.device import Arena, Device
from gpu_cache.freelist import FreeList

logger = logging.getLogger(__name__)


class SlabSet:
    """Slabs up to a cap, and overflow beyond it.

    Args:
        device: Where arenas live.
        config: Resolved settings.
    Thread-safety: any thread. Allocates and releases outside the lock.
    """

    def __init__(self, device: Device, config: CacheConfig) -> None:
        assert config.pool_bytes is not None
        assert config.prealloc_bytes is not None
        self.capacity = config.pool_bytes
        self._device, self._slab_bytes, self._prealloc_bytes = device, config.slab_bytes, config.prealloc_bytes
        # Guards every field below, those of each slab, and those of the pool that this is a part of.
        self._lock = threading.Condition(threading.Lock())
        self._slabs: list[Slab] = []
        self._keep_bytes = config.prealloc_bytes  # empty slabs down to this are kept
        self._is_started = False
        self._growing_bytes = 0  # of slabs being allocated
        self._reserved_bytes = self._overflow_bytes = 0
        self._alloc_failures = 0

    def resume(self) -> None:
        """Take back what `trim` said: the next use preallocates again, and keeps what it did."""
        with self._lock:
            self._keep_bytes, self._is_started = self._prealloc_bytes, False

    def keep(self, nbytes: int) -> None:
        """Preallocate nothing, but keep what is taken, up to so many bytes, from now on."""
        with self._lock:
            self._keep_bytes, self._is_started = nbytes, True

    def _preallocate(self) -> None:
        """Take the slabs that are kept while empty; once, at first use."""
        with self._lock:
            missing = 0 if self._is_started else self._keep_bytes - self._reserved_bytes
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
                    self._slabs.append(Slab(arena, FreeList(nbytes)))
                    self._reserved_bytes += nbytes
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
        return self._release_empty(keep_bytes=0)

    def _release_empty(self, keep_bytes: int) -> bool:
        """Release empty slabs down to `keep_bytes`, and empty overflow; whether any."""
        with self._lock:
            released = []
            for slab in reversed(self._slabs):
                is_spare = slab.is_overflow or self._reserved_bytes - slab.nbytes >= keep_bytes
                if slab.free.is_empty and is_spare:
                    released.append(slab)
                    self._count_locked(slab, -slab.nbytes)
            self._slabs = [slab for slab in self._slabs if slab not in released]
        self._release(released)
        return bool(released)

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
                        self._slabs.append(slab)
                        self._count_locked(slab, slab.nbytes)
        if failed is not None:
            raise failed

    def _count_locked(self, slab: Slab, nbytes: int) -> None:
        if slab.is_overflow:
            self._overflow_bytes += nbytes
        else:
            self._reserved_bytes += nbytes
