"""Slabs that the latest steps needed are kept, until they are needed less, or needed elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import MIB
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena, Device
from gpu_cache.pool.high_water import IDLE_S, NUM_STEPS, HighWater
from gpu_cache.pool.slab import SlabPool
from tests.pool.test_slab import check, pool_of, shards_in, taken_from
from tests.support.clocks import Clock
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource
from tests.support.tier_scene import cache_on_fake

pytestmark = pytest.mark.usefixtures("no_reaper")

SLAB = 64 << 10
CONFIG = CacheConfig(
    slab_bytes=SLAB, pool_bytes=8 * SLAB, prealloc_bytes=SLAB, staging_slots=2, staging_slot_bytes=SLAB, run_bytes=SLAB
)


# The mark.


def stepped(water: HighWater, *slab_bytes: int) -> None:
    """Steps that have so many bytes of slabs in use, each all of what it took, and then nothing."""
    for nbytes in slab_bytes:
        water.note(nbytes, nbytes, nbytes)
        assert water.clear(0)


def test_the_largest_of_the_latest_steps_counts() -> None:
    water = HighWater()
    assert water.nbytes == 0
    stepped(water, 3, 7, 5)
    assert water.nbytes == 7
    stepped(water, *[2] * (NUM_STEPS - 2))
    assert water.nbytes == 7
    stepped(water, 2)
    assert water.nbytes == 5
    water.note(9, 9, 9)
    assert water.nbytes == 9, "while it is in use"


def test_the_clears_of_one_step_count_once() -> None:
    water = HighWater()
    stepped(water, 8)
    for _ in range(4):
        for taken in range(1, 9):
            water.note(taken, taken, 1)
        assert [water.clear(left) for left in (8, 6, 4, 2, 0)] == [True, False, False, False, False]
    stepped(water, 4, *[1] * (NUM_STEPS - 2))
    assert water.nbytes == 8
    stepped(water, 1)
    assert water.nbytes == 4


def test_clears_between_the_takes_of_the_next_step_end_none() -> None:
    """A prefetch brings the next batch, while the owners of the last one are cleared one by one."""
    water = HighWater()
    water.note(96, 96, 96)
    assert water.clear(96)
    used = 96
    for _ in range(2 * NUM_STEPS):
        used -= 3
        water.note(used + 1, used + 1, 1)
        used += 1
        assert not water.clear(used)
    assert water.nbytes == 96


def test_small_steps_beside_weights_that_stay_count() -> None:
    water = HighWater()
    water.note(100, 100, 100)
    stepped_beside = 0
    for _ in range(NUM_STEPS):
        water.note(110, 110, 10)
        stepped_beside += water.clear(100)
    assert stepped_beside == NUM_STEPS


def test_an_idle_minute_counts_as_a_step_and_a_quarter_of_an_hour_forgets_all() -> None:
    clock = Clock()
    water = HighWater(clock)
    stepped(water, 8)
    clock.now += IDLE_S - 1
    water.pass_time(0)
    assert water.nbytes == 8
    for _ in range(NUM_STEPS):
        assert water.nbytes == 8
        clock.now += IDLE_S
        water.pass_time(0)
    assert water.nbytes == 0


def test_after_a_lack_of_memory_some_steps_count_for_nothing() -> None:
    water = HighWater()
    stepped(water, 8)
    water.rest()
    for _ in range(NUM_STEPS):
        assert water.nbytes == 0
        stepped(water, 8)
    stepped(water, 5)
    assert water.nbytes == 8


# Steps of a cache.


class Traffic:
    """Counts the arenas that a device gives, and those it gets back."""

    def __init__(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = self.released = 0
        arena, release = device.arena, device.release_arena

        def counted(nbytes: int, *, private: bool = True) -> Arena:
            self.taken += 1
            return arena(nbytes, private=private)

        def counted_release(arena: Arena) -> None:
            self.released += 1
            release(arena)

        monkeypatch.setattr(device, "arena", counted)
        monkeypatch.setattr(device, "release_arena", counted_release)

    @property
    def both(self) -> tuple[int, int]:
        return self.taken, self.released


@pytest.fixture(params=["host", "staged host", "fake cuda", "simulated"])
def device(request: pytest.FixtureRequest, cuda: FakeCuda, tmp_path: Path) -> Device:
    if request.param == "fake cuda":
        return cuda_device(cuda, tmp_path)
    return SimDevice() if request.param == "simulated" else HostDevice(stages=request.param == "staged host")


@pytest.fixture
def cache(device: Device) -> Iterator[TensorCache]:
    cache = TensorCache(CONFIG, device=device)
    yield cache
    cache.close()
    assert not device.faults if isinstance(device, SimDevice) else True


def batch(num_shards: int, nbytes: int = 44_000) -> dict[Hashable, torch.Tensor]:
    return {number: torch.full((nbytes,), number, dtype=torch.uint8) for number in range(num_shards)}


def step(cache: TensorCache, cuda: FakeCuda, tensors: dict[Hashable, torch.Tensor]) -> None:
    """Fetch and clear; the device gets on meanwhile."""
    found = cache.get_many(list(tensors), DictSource(tensors))
    assert all(bool((one == number).all()) for number, one in enumerate(found))
    del found
    cache.clear()
    cuda.advance()
    cache.synchronize()


def reserved(cache: TensorCache) -> int:
    return cache.buffer_stats()["device_reserved_bytes"]


def test_with_the_same_batches_no_slab_is_taken_or_released_from_the_third_step_on(
    cache: TensorCache, device: Device, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(device, monkeypatch)
    for _ in range(2):
        step(cache, cuda, batch(5))
    before = traffic.both
    for _ in range(8):
        step(cache, cuda, batch(5))
        assert (cache.buffer_stats()["device_bytes"], reserved(cache)) == (0, 5 * SLAB)
    assert traffic.both == before == (5, 0)


def test_a_batch_held_until_the_next_one_arrives_takes_no_slab_either(
    cache: TensorCache, device: Device, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic, tensors = Traffic(device, monkeypatch), batch(3)
    held, seen = None, []
    for _ in range(10):
        held = cache.get_many(list(tensors), DictSource(tensors))
        cache.clear()
        cuda.advance()
        seen.append(traffic.both)
    assert seen[2:] == [seen[2]] * 8
    del held


def test_batches_of_changing_length_take_as_much_as_the_longest(
    cache: TensorCache, device: Device, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic(device, monkeypatch)
    for number in range(3 * NUM_STEPS):
        step(cache, cuda, batch((5, 2, 4, 3)[number % 4]))
    assert traffic.both == (5, 0)


def test_a_longer_batch_is_forgotten_after_some_steps(cache: TensorCache, cuda: FakeCuda) -> None:
    step(cache, cuda, batch(6))
    for _ in range(NUM_STEPS - 1):
        step(cache, cuda, batch(3))
        assert reserved(cache) == 6 * SLAB
    step(cache, cuda, batch(3))
    step(cache, cuda, batch(3))
    assert reserved(cache) == 3 * SLAB


def test_a_scope_is_a_step_too(cache: TensorCache, cuda: FakeCuda) -> None:
    tensors = batch(4)
    for _ in range(2):
        with cache.scope():
            cache.get_many(list(tensors), DictSource(tensors))
        cuda.advance()
        cache.synchronize()
    assert reserved(cache) == 4 * SLAB
    assert list(cache._lazy.open().pool._water._peaks) == [4 * SLAB] * 2


def test_slabs_of_their_own_for_long_shards_are_kept_and_the_longest_unused_goes(
    cache: TensorCache, device: Device, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    step(cache, cuda, batch(1, 2 * SLAB))
    for _ in range(2):
        step(cache, cuda, batch(1, 3 * SLAB))
    traffic = Traffic(device, monkeypatch)
    for _ in range(2 * NUM_STEPS):
        step(cache, cuda, batch(1, 3 * SLAB))
    assert traffic.taken == 0
    assert [slab.nbytes for slab in cache._lazy.open().pool._slabs] == [3 * SLAB]


# Overrides.


def test_after_a_trim_nothing_is_kept_until_resume(cache: TensorCache, cuda: FakeCuda) -> None:
    step(cache, cuda, batch(5))
    assert cache.trim(3 * SLAB).freed_bytes == 2 * SLAB
    step(cache, cuda, batch(5))
    assert reserved(cache) == 3 * SLAB
    assert cache.trim().freed_bytes == 3 * SLAB
    step(cache, cuda, batch(5))
    assert reserved(cache) == 0
    cache.resume()
    step(cache, cuda, batch(2))
    assert reserved(cache) == 2 * SLAB


def test_after_an_offload_nothing_is_kept(cache: TensorCache, cuda: FakeCuda) -> None:
    tensors = batch(5)
    held = cache.get_many(list(tensors), DictSource(tensors))
    cache.offload()
    assert reserved(cache) == 5 * SLAB
    del held
    cuda.advance()
    cache.synchronize()
    assert reserved(cache) == 0
    step(cache, cuda, batch(3))
    assert reserved(cache) == 0


@pytest.fixture
def gpu(cuda: FakeCuda, tmp_path: Path) -> Iterator[TensorCache]:
    yield from cache_on_fake(cuda, tmp_path, CONFIG)


@pytest.mark.parametrize("counter", ["num_alloc_retries", "num_ooms"])
def test_a_trainer_that_runs_short_of_memory_gets_the_kept_slabs(
    gpu: TensorCache, cuda: FakeCuda, counter: str
) -> None:
    step(gpu, cuda, batch(5))
    setattr(cuda, counter, 1)
    for _ in range(NUM_STEPS - 1):
        step(gpu, cuda, batch(5))
        assert reserved(gpu) == cuda.reserved(1) == SLAB, "what is preallocated"
    for _ in range(2):
        step(gpu, cuda, batch(5))
    assert reserved(gpu) == 5 * SLAB, "as it was short no more"


def test_an_allocator_without_such_counters_is_never_short(gpu: TensorCache, cuda: FakeCuda) -> None:
    cuda.has_memory_stats = False
    for _ in range(2):
        step(gpu, cuda, batch(5))
    assert reserved(gpu) == 5 * SLAB


def test_a_pool_that_found_no_memory_keeps_nothing_for_some_steps(gpu: TensorCache, cuda: FakeCuda) -> None:
    step(gpu, cuda, batch(5))
    others, cuda.free_bytes[1], cuda._cached[1] = cuda.free_bytes[1], 0, 4 * SLAB  # torch keeps its own cache
    step(gpu, cuda, batch(7))
    assert gpu.buffer_stats()["overflows"] == 2
    cuda.free_bytes[1] = others
    step(gpu, cuda, batch(5))
    assert reserved(gpu) == SLAB


def look_for(pool: SlabPool, seconds: float) -> None:
    """Let so many seconds pass in which nothing is taken, the reaper looking now and then."""
    clock = pool._water._now
    assert isinstance(clock, Clock)
    until = clock.now + seconds
    while clock.now < until:
        clock.now += IDLE_S / 3
        pool._look_at = 0.0
        pool.drain()


def timed(pool: SlabPool) -> SlabPool:
    """The pool, on a clock that stands still."""
    pool._water = HighWater(Clock())
    return pool


def test_an_idle_process_gives_its_kept_slabs_back() -> None:
    pool = timed(pool_of(prealloc_bytes=MIB))
    for _ in range(2):
        for one in [taken_from(pool, MIB) for _ in range(3)]:
            pool.abandon(one)
        pool.end_step()
        pool.drain()
    check(pool, free=3 * MIB, reserved=3 * MIB)
    assert pool.is_busy, "so that the reaper looks"
    look_for(pool, IDLE_S * (NUM_STEPS - 1))
    check(pool, free=3 * MIB, reserved=3 * MIB)
    look_for(pool, 2 * IDLE_S)
    check(pool, free=MIB, reserved=MIB)
    assert not pool.is_busy


def test_idleness_gives_back_no_held_slab() -> None:
    pool = timed(pool_of())
    held = shards_in(pool, taken_from(pool, MIB), MIB)
    look_for(pool, 2 * IDLE_S * NUM_STEPS)
    check(pool, held=MIB, reserved=MIB)
    del held
    pool.drain()
    check(pool)


def test_a_full_pool_releases_no_slab_that_another_thread_has_just_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread found no room, another freed a slab. The first released it and took a new one: 31 ms, four threads."""
    device = HostDevice()
    traffic, pool = Traffic(device, monkeypatch), pool_of(device, prealloc_bytes=4 * MIB)
    held = [shards_in(pool, taken_from(pool, MIB), MIB) for _ in range(4)]

    class Gate(threading.Condition):
        """The other thread's turn is when the first lets go of the lock."""

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if held:
                held.clear()
                pool.drain()

    pool._lock = pool._changed = Gate(threading.Lock())  # type: ignore[assignment]
    assert (pool.take(MIB) or pool.take(MIB)) is not None
    assert traffic.both == (4, 0)


def test_the_figures_count_kept_slabs(gpu: TensorCache, cuda: FakeCuda) -> None:
    step(gpu, cuda, batch(5))
    stats = gpu.buffer_stats()
    assert (stats["device_bytes"], stats["device_reserved_bytes"]) == (0, 5 * SLAB)
    assert cuda.reserved(1) == 5 * SLAB
