from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from gpu_cache.config import MIB, CacheConfig
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena, Device
from gpu_cache.errors import CacheFullError, GpuCacheError
from gpu_cache.pool import lease
from gpu_cache.pool.block import Copy, Range, Slab, aligned, carve_shards
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.freelist import FreeList
from gpu_cache.pool.lease import Husks, Lease
from gpu_cache.pool.slab import SlabPool, _stretches
from gpu_cache.source import ShardSpec
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.sim_device import SimDevice
from tests.support.threads import run_threads


def pool_of(
    device: Device | None = None, *, pool_bytes: int = 4 * MIB, slab_bytes: int = MIB, prealloc_bytes: int = 0
) -> SlabPool:
    config = CacheConfig(
        slab_bytes=slab_bytes, pool_bytes=pool_bytes, prealloc_bytes=prealloc_bytes, run_bytes=MIB
    ).resolved(is_cuda=False, device_bytes=0)
    device = HostDevice() if device is None else device
    return SlabPool(device, config, StreamFence(device, "all"), lambda dead: None, Husks())


def shards_in(pool: SlabPool, taken: Range, *lengths: int) -> list[Copy]:
    """Carve shards of these lengths, which fill the range."""
    specs = [ShardSpec(f"k{number}", torch.uint8, (nbytes,)) for number, nbytes in enumerate(lengths)]
    offsets = [sum(aligned(nbytes) for nbytes in lengths[:number]) for number in range(len(lengths))]
    return pool.carve(taken, specs, offsets)


def taken_from(pool: SlabPool, nbytes: int) -> Range:
    taken = pool.take(nbytes)
    assert taken is not None
    return taken


def check(pool: SlabPool, **expected: int) -> None:
    """Whether every reserved byte is where it should be."""
    accounts = pool.accounts()
    assert accounts == {**dict.fromkeys(accounts, 0), **expected}
    assert sum(accounts.values()) == 2 * accounts["reserved"]


def test_a_block_goes_from_pending_to_held_to_free() -> None:
    pool = pool_of()
    taken = taken_from(pool, 1536)
    check(pool, pending=1536, free=MIB - 1536, reserved=MIB)
    landings = shards_in(pool, taken, 1000, 10)
    check(pool, held=1536, free=MIB - 1536, reserved=MIB)
    kept = landings.pop(0).base
    del landings
    pool.drain()
    check(pool, held=1024, free=MIB - 1024, reserved=MIB)
    del kept
    pool.drain()
    check(pool, free=MIB, reserved=MIB)  # kept for the next step
    pool.trim()
    check(pool)
    assert pool.stats()["device_peak_bytes"] == 1536


def test_preallocated_slabs_are_taken_at_first_use_and_kept() -> None:
    pool = pool_of(prealloc_bytes=2 * MIB)
    check(pool)
    landings = shards_in(pool, taken_from(pool, 512), 512)
    check(pool, held=512, free=2 * MIB - 512, reserved=2 * MIB)
    del landings
    pool.drain()
    check(pool, free=2 * MIB, reserved=2 * MIB)
    assert pool.trim(MIB)
    check(pool, free=MIB, reserved=MIB)
    assert not pool.trim(MIB)


def test_a_trimmed_pool_gives_back_a_slab_that_a_clear_leaves_empty() -> None:
    pool = pool_of(prealloc_bytes=MIB)
    first, second = [shards_in(pool, taken_from(pool, MIB), MIB) for _ in range(2)]
    pool.trim(MIB)
    assert pool.accounts()["reserved"] == 2 * MIB
    del second
    pool.drain()
    check(pool, held=MIB, reserved=MIB)
    assert first[0].base.numel() == MIB


def test_the_pool_does_not_grow_beyond_its_cap() -> None:
    pool = pool_of(pool_bytes=3 * MIB // 2)
    first = taken_from(pool, MIB)
    second = taken_from(pool, MIB // 2)
    assert second.slab.nbytes == MIB // 2, "the last slab is as large as there is room"
    assert pool.take(512) is None
    pool.abandon(first)
    pool.abandon(second)
    check(pool, quarantined=3 * MIB // 2, reserved=3 * MIB // 2)
    pool.drain()
    check(pool, free=3 * MIB // 2, reserved=3 * MIB // 2)


def test_a_shard_larger_than_a_slab_gets_a_slab_of_its_own() -> None:
    pool = pool_of()
    taken = taken_from(pool, 3 * MIB)
    assert taken.slab.nbytes == 3 * MIB
    assert pool.take(2 * MIB) is None
    pool.abandon(taken)


def test_empty_slabs_make_way_for_a_shard_longer_than_they_are() -> None:
    pool = pool_of(prealloc_bytes=4 * MIB)
    pool.abandon(taken_from(pool, 512))
    pool.drain()
    check(pool, free=4 * MIB, reserved=4 * MIB)
    taken = taken_from(pool, 3 * MIB)
    check(pool, pending=3 * MIB, free=MIB, reserved=4 * MIB)  # as many as it needs, and no more
    assert pool.free_bytes == MIB
    assert pool.take(2 * MIB) is None
    check(pool, pending=3 * MIB, free=MIB, reserved=4 * MIB)
    pool.abandon(taken)
    pool.drain()
    check(pool, free=4 * MIB, reserved=4 * MIB)


def test_readers_that_race_for_the_first_slab_share_it() -> None:
    pool = pool_of(pool_bytes=MIB)
    taken: list[Range] = []
    run_threads([lambda: taken.append(taken_from(pool, 1024))] * 8)
    assert len({id(one.slab) for one in taken}) == 1
    for one in taken:
        pool.abandon(one)


def test_overflow_is_outside_the_cap_and_goes_back_at_once() -> None:
    pool = pool_of(pool_bytes=MIB, prealloc_bytes=MIB)
    held = shards_in(pool, taken_from(pool, MIB), MIB)
    landings = shards_in(pool, pool.take_overflow(2 * MIB), 2 * MIB)
    check(pool, held=3 * MIB, reserved=3 * MIB)
    assert pool.take(512) is None
    del landings
    pool.drain()
    check(pool, held=MIB, reserved=MIB)
    assert held[0].base.numel() == MIB


def test_the_numbers_of_a_shortage_add_up_to_the_pool_and_what_is_outside_of_it() -> None:
    device = SimDevice()
    device.adversary.begin()  # it does nothing before a thread waits for it
    pool = pool_of(device, pool_bytes=4 * MIB, prealloc_bytes=MIB)
    held = [*shards_in(pool, taken_from(pool, MIB), MIB), *shards_in(pool, taken_from(pool, MIB), MIB)]
    on_its_way = taken_from(pool, MIB)
    freed = shards_in(pool, taken_from(pool, 512), 512)
    held += shards_in(pool, pool.take_overflow(3 * MIB), 3 * MIB)
    freed += shards_in(pool, pool.take_overflow(3 * MIB), 3 * MIB)
    overflowing = pool.take_overflow(2 * MIB)
    freed.clear()
    pool.drain()
    found = map(int, re.findall(r"\d+", pool.shortage(3 * MIB).words.replace(",", ""))[:6])
    held_bytes, pending, quarantined, outside, free, largest = found
    assert (pending, outside, free) == (3 * MIB, 8 * MIB, MIB - 512)
    assert held_bytes + pending + quarantined + free == pool.capacity + outside
    assert largest == MIB - 512
    for taken in (on_its_way, overflowing):
        pool.abandon(taken)


class TinyDevice(HostDevice):
    """A device that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        if nbytes > self.room:
            raise torch.OutOfMemoryError(f"{nbytes} bytes")
        self.room -= nbytes
        return super().arena(nbytes, private=private)


def test_a_device_without_room_is_no_error_until_overflow_fails_too(caplog: pytest.LogCaptureFixture) -> None:
    pool = pool_of(TinyDevice(MIB))
    kept = taken_from(pool, MIB)
    assert pool.take(512) is None
    assert pool.stats()["alloc_failures"] == 1
    with pytest.raises(CacheFullError, match="need 512 bytes"):
        pool.take_overflow(512)
    assert pool.take(512) is None
    assert [record.getMessage() for record in caplog.records] == ["no room on cpu for a slab of 1,048,576 bytes"]
    pool.abandon(kept)
    pool.drain()
    check(pool)


def test_a_failed_preallocation_is_not_tried_at_every_take() -> None:
    pool = pool_of(TinyDevice(0), prealloc_bytes=2 * MIB)
    assert pool.take(512) is None
    assert pool.stats()["alloc_failures"] == 2  # the preallocation, and the slab for this take
    assert pool.take(512) is None
    assert pool.stats()["alloc_failures"] == 3


def test_building_that_fails_half_way_loses_nothing() -> None:
    pool = pool_of()
    taken = taken_from(pool, 1536)
    specs = [ShardSpec("good", torch.uint8, (512,)), ShardSpec("bad", torch.uint8, (512,))]
    specs[1].shape = (-1,)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        pool.carve(taken, specs, [0, 512])
    assert taken.rest.nbytes == 1024
    pool.abandon(taken)
    del caught
    pool.drain()
    check(pool, free=MIB, reserved=MIB)


def test_shards_built_before_one_that_fails_die_after_the_pool_knows_their_leases() -> None:
    pool, freed, leases = pool_of(), deque[Lease](), dict[int, Lease]()
    specs = [ShardSpec("good", torch.uint8, (512,)), ShardSpec("bad", torch.uint8, (512,))]
    specs[1].shape = (-1,)
    try:
        carve_shards(taken_from(pool, 1536), specs, [0, 512], freed, leases)
    except (RuntimeError, ValueError):
        assert leases.keys() == {0}
        assert not freed
    assert list(freed) == [leases[0]]


def test_ranges_of_several_slabs_go_back_in_whole_stretches() -> None:
    one, other = Slab(MagicMock(), FreeList(MIB)), Slab(MagicMock(), FreeList(MIB))
    ranges = [Range(slab, offset, 512) for offset in (1024, 0, 512, 4096) for slab in (one, other)]
    assert list(_stretches(ranges)) == [(slab, at, n) for slab in (one, other) for at, n in ((0, 1536), (4096, 512))]


def test_unsound_leases_stop_the_pool_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_cache.pool.slab.lease_fault", lambda: "fires early")
    with pytest.raises(GpuCacheError, match="fires early"):
        pool_of()


def test_a_lease_on_the_public_tensor_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test sees through the carving that fires while views live."""

    def on_the_tensor(arena, offset, nbytes, template, shape, fired):  # type: ignore[no-untyped-def]
        tensor = template.new().set_(arena)[offset : offset + nbytes]
        return tensor, None, Lease(tensor, fired)

    monkeypatch.setattr(lease, "carve", on_the_tensor)
    assert "early" in lease.lease_fault()


def test_dead_leases_are_told_once_their_bytes_are_in_quarantine() -> None:
    told: list[tuple[list[object], int]] = []
    config = CacheConfig(slab_bytes=MIB, pool_bytes=MIB, run_bytes=MIB).resolved(is_cuda=False, device_bytes=0)
    device = HostDevice()
    pool = SlabPool(
        device,
        config,
        StreamFence(device, "all"),
        lambda dead: told.append(([lease.key for lease in dead], pool.accounts()["held"])),
        Husks(),
    )
    shards_in(pool, taken_from(pool, 512), 512)
    pool.drain()
    assert told == [(["k0"], 0)]


def test_freed_bytes_wait_for_every_stream(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    pool = pool_of(device, prealloc_bytes=MIB)
    landings = shards_in(pool, taken_from(pool, 512), 512)
    streams = list(device.fence_streams())
    assert len(streams) > 32
    del landings
    pool.drain()
    for stream in streams[:-1]:
        cuda.advance(stream)
    pool.drain()
    check(pool, quarantined=512, free=MIB - 512, reserved=MIB)
    cuda.advance(streams[-1])
    pool.drain()
    check(pool, free=MIB, reserved=MIB)


def test_synchronize_empties_the_quarantine(tmp_path: Path) -> None:
    pool = pool_of(cuda_device(FakeCuda(), tmp_path), prealloc_bytes=MIB)
    shards_in(pool, taken_from(pool, 512), 512)
    pool.drain()
    assert pool.accounts()["quarantined"] == 512
    pool.synchronize()
    check(pool, free=MIB, reserved=MIB)


def test_room_that_another_thread_waited_for_is_found() -> None:
    """It was not there when it was looked for, and there was nothing left to wait for: the shard overflowed."""
    pool = pool_of(pool_bytes=MIB)
    landings = shards_in(pool, taken_from(pool, MIB), MIB)
    assert pool.take(MIB) is None
    landings.clear()
    pool.synchronize()  # the reaper, before its turn comes to look at the quarantine
    assert pool.take_freed(MIB) is not None


def test_nothing_is_drained_during_a_capture(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    pool = pool_of(device, prealloc_bytes=MIB)
    landings = shards_in(pool, taken_from(pool, 512), 512)
    with cuda.capture(device.fence_streams()[5]):
        del landings
        pool.drain()
        assert pool.accounts()["held"] == 512
    pool.synchronize()
    check(pool, free=MIB, reserved=MIB)


def test_a_released_slab_gives_its_memory_back_to_the_driver(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    pool = pool_of(device)
    index = device.torch_device.index
    landings = shards_in(pool, taken_from(pool, 512), 512)
    assert cuda.reserved(index) == MIB
    del landings
    pool.trim()
    assert cuda.reserved(index) == 0
    assert not cuda.violations
