"""A trainer's steady state on a real GPU: nothing is allocated, nothing is copied twice, times are plausible."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache, stats_delta
from gpu_cache.device.cuda import CudaDevice
from tests.support.gpu_process import run_python
from tests.support.gpu_scene import GPU, MIB, fetch, free_bytes, is_about, small_cache
from tests.support.sources import DictSource, same_bytes, some_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]

_WARM_STEPS, _STEPS = 10, 200
# Counters of torch's allocators that grow when memory is taken, from the cache of either or from the driver.
_DEVICE_COUNTERS = ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc", "num_alloc_retries")
_HOST_COUNTERS = ("num_host_alloc", "active_requests.allocated", "allocations.allocated", "allocation.allocated")


def allocations() -> dict[str, int]:
    """The counters of both allocators, those that this torch has."""
    device, host = torch.cuda.memory_stats(GPU), torch.cuda.host_memory_stats()
    found = {name: device[name] for name in _DEVICE_COUNTERS if name in device}
    assert {"allocation.all.allocated", "segment.all.allocated"} <= set(found)
    return found | {name: host[name] for name in _HOST_COUNTERS if name in host}


def test_two_hundred_steps_allocate_nothing() -> None:
    cache = TensorCache(
        CacheConfig(device="cuda:0", slab_bytes="16MiB", pool_bytes="64MiB", prealloc_bytes="32MiB", staging_slots=3)
    )
    torch.cuda.init()
    tensors = some_tensors(200)
    total = torch.zeros((), dtype=torch.int64, device=GPU)
    zeros = torch.zeros_like(total)

    def step() -> None:
        got = cache.get_many(list(tensors), DictSource(tensors))
        torch.add(total, zeros, out=total)
        again = cache.get_many(list(tensors), DictSource({}))
        assert [one.data_ptr() for one in got] == [one.data_ptr() for one in again]
        del got, again
        cache.clear()
        cache.synchronize()

    for _ in range(_WARM_STEPS):
        step()
    before, pinned, free = allocations(), cache.buffer_stats()["pinned_capacity_bytes"], free_bytes()
    for _ in range(_STEPS):
        step()
    assert allocations() == before
    assert cache.buffer_stats()["pinned_capacity_bytes"] == pinned
    assert is_about(free_bytes(), free)
    got = cache.get_many(list(tensors), DictSource(tensors))
    assert all(same_bytes(one.cpu(), want) for one, want in zip(got, tensors.values(), strict=True))
    assert cache.buffer_stats()["overflows"] == 0


def test_a_second_read_copies_nothing_and_the_first_only_from_pinned_memory() -> None:
    events = json.loads(run_python("-m", "tests.support.gpu_profiled").splitlines()[-1])
    counts = {read: Counter(name for name in names if "memcpy" in name.lower()) for read, names in events.items()}
    if not counts["first"]:
        pytest.skip(f"the profiler sees no copies on this machine, only {events}")
    assert all(name.startswith("Memcpy HtoD (Pinned") for name in counts["first"]), counts
    assert events["again"], "the kernels that read"
    assert not counts["again"], counts


def test_a_second_read_is_not_counted_as_a_copy_either() -> None:
    cache = small_cache()
    first = fetch(cache, "a", 5)
    before = cache.buffer_stats()
    second = fetch(cache, "a", 5)
    after = cache.buffer_stats()
    assert second.data_ptr() == first.data_ptr()
    assert [after[name] - before[name] for name in ("h2d_bytes", "copies", "d2h_bytes", "hits")] == [0, 0, 0, 1]


def test_a_timed_copy_takes_as_long_as_it_can() -> None:
    torch.cuda.init()
    device = CudaDevice(GPU.index)
    nbytes = 64 * MIB
    arena, pinned, stream = device.arena(nbytes), device.pinned(nbytes), device.new_stream()
    device.copy_all([(arena.tensor, pinned.tensor)], stream)
    device.synchronize(device.record(stream))
    began = time.perf_counter()
    start = device.record(stream, timing=True)
    device.copy_all([(arena.tensor, pinned.tensor)], stream)
    end = device.record(stream, timing=True)
    device.synchronize(end)
    wall_s = time.perf_counter() - began
    # Not faster than a link of 1 TB/s, not longer than the host has waited.
    assert nbytes / 1e12 < device.elapsed_s(start, end) <= wall_s + 1e-4
    device.release_pinned(pinned)
    device.release_arena(arena)


def test_the_busy_seconds_of_copies_are_plausible() -> None:
    cache = small_cache(slab_bytes=64 * MIB, pool_bytes=256 * MIB, prealloc_bytes=0, staging_slots=2)
    before, began = cache.buffer_stats(), time.perf_counter()
    fetch(cache, "a", 5, 64 * MIB)
    fetch(cache, "b", 6, 64 * MIB)
    wall_s, after = time.perf_counter() - began, cache.buffer_stats()
    delta = stats_delta(before, after)
    assert delta["h2d_bytes"] == 128 * MIB
    # A slot's time is counted when it is taken again, so that of the last windows is missing.
    assert 0 < after["h2d_busy_seconds"] < wall_s
    assert 0.1 < delta["h2d_gb_per_s"] < 1000
