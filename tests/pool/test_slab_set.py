"""A device without room, and one that fails to take memory back."""

from __future__ import annotations

import pytest
import torch

from gpu_cache.config import MIB
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena
from gpu_cache.errors import CacheFullError
from tests.pool.test_slab import TinyDevice, check, pool_of, shards_in, taken_from
from tests.support.sim_device import SimDevice


class ScarceDevice(TinyDevice):
    """Room for so many bytes, some of which are released."""

    def release_arena(self, arena: Arena) -> None:
        self.room += arena.nbytes
        super().release_arena(arena)


def test_overflow_takes_unused_slabs_of_the_pool_on_a_full_device() -> None:
    pool = pool_of(ScarceDevice(2 * MIB), pool_bytes=2 * MIB, prealloc_bytes=2 * MIB)
    held = shards_in(pool, taken_from(pool, MIB), MIB)
    landings = shards_in(pool, pool.take_overflow(MIB), MIB)
    check(pool, held=2 * MIB, reserved=2 * MIB)
    with pytest.raises(CacheFullError) as caught:
        pool.take_overflow(512)
    assert (caught.value.needed, caught.value.capacity, caught.value.reserved) == (512, 2 * MIB, 2 * MIB)
    assert "the device is out of memory" in str(caught.value)
    assert len(held) == len(landings) == 1


def test_overflow_waits_for_blocks_being_freed_before_it_gives_up() -> None:
    device = SimDevice()
    device.adversary.begin()
    pool = pool_of(device, pool_bytes=MIB, prealloc_bytes=MIB)
    landings = shards_in(pool, taken_from(pool, MIB), MIB)
    device.kernel(device.pooled[1], landings[0].base, landings[0].base.numpy().copy())
    del landings
    pool.drain()
    check(pool, quarantined=MIB, reserved=MIB)
    device.refuse("arena", 1)
    pool.abandon(pool.take_overflow(512))
    assert pool.accounts()["reserved"] == 512, "the slab went"
    device.refuse("arena", 2)
    with pytest.raises(CacheFullError, match="need 512 bytes, and the device is out of memory"):
        pool.take_overflow(512)
    pool.synchronize()
    assert device.faults == []


def test_a_slab_without_room_is_tried_again_without_the_unused_ones() -> None:
    device = ScarceDevice(3 * MIB)
    pool = pool_of(device, pool_bytes=6 * MIB, prealloc_bytes=2 * MIB)
    pool.abandon(taken_from(pool, 512))
    pool.drain()
    check(pool, free=2 * MIB, reserved=2 * MIB)
    pool.abandon(taken_from(pool, 3 * MIB))
    check(pool, quarantined=3 * MIB, reserved=3 * MIB)
    assert pool.stats()["alloc_failures"] == 0


def test_the_host_without_memory_is_out_of_memory_too() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
        HostDevice().arena(1 << 60)


class StubbornDevice(HostDevice):
    """Does not take some arenas back, at first."""

    def __init__(self) -> None:
        super().__init__()
        self.num_failures = 0

    def release_arena(self, arena: Arena) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("not now")
        super().release_arena(arena)


def test_one_slab_that_is_not_taken_back_strands_no_other() -> None:
    device = StubbornDevice()
    pool = pool_of(device)
    ranges = [taken_from(pool, MIB) for _ in range(3)]
    device.num_failures = 1
    for taken in ranges:
        pool.abandon(taken)
    with pytest.raises(RuntimeError, match="not now"):
        pool.trim()
    check(pool, free=MIB, reserved=MIB)
    pool.trim()
    check(pool)


def test_a_trim_reports_released_and_held_bytes() -> None:
    pool = pool_of(prealloc_bytes=2 * MIB)
    held = shards_in(pool, taken_from(pool, 512), 512)
    report = pool.trim()
    assert (report.freed_bytes, report.held_bytes, report.num_held) == (MIB, MIB, 1)
    assert not pool.trim()
    del held
    pool.drain()
    check(pool)  # the target stays
    pool.resume()
    pool.abandon(taken_from(pool, 512))
    pool.drain()
    check(pool, free=2 * MIB, reserved=2 * MIB)
