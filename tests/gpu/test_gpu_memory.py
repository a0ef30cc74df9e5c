"""Device memory: what the cache takes and gives back, as the driver counts it."""

from __future__ import annotations

import pytest
import torch

from gpu_cache import TensorCache
from tests.support.cuda_devices import in_thread
from tests.support.gpu_process import run_python
from tests.support.gpu_scene import (
    GPU,
    MIB,
    SHARD_BYTES,
    SLACK_BYTES,
    fetch,
    fetch_all,
    filled,
    is_about,
    is_all,
    roomy_cache,
    small_cache,
    steady_free_bytes,
)
from tests.support.sources import DictSource

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]

SLAB_BYTES = 64 * MIB


def rehearsed(cache: TensorCache) -> TensorCache:
    """The cache, after it has taken and given back: what the driver allocates by the way is there.

    It has what is preallocated, and no more.
    """
    assert is_all(fetch_all(cache, dict.fromkeys(range(4), SLAB_BYTES))[3], 3)  # loads kernels
    cache.clear()
    cache.trim(cache._lazy.open().config.prealloc_bytes or 0)
    cache.resume()
    return cache


def test_slabs_that_a_step_needed_are_kept_for_the_next_one_and_go_back_with_a_trim() -> None:
    cache = rehearsed(roomy_cache(prealloc_bytes=SLAB_BYTES))
    before = steady_free_bytes()
    shards = fetch_all(cache, dict.fromkeys(range(4), SLAB_BYTES))
    assert is_about(before - steady_free_bytes(), 3 * SLAB_BYTES)
    cache.clear()
    cache.synchronize()
    assert is_about(before - steady_free_bytes(), 3 * SLAB_BYTES), "they are held"
    del shards
    cache.synchronize()
    assert is_about(before - steady_free_bytes(), 3 * SLAB_BYTES), "they are kept"
    assert cache.buffer_stats()["device_reserved_bytes"] == 4 * SLAB_BYTES
    cache.trim(SLAB_BYTES)
    assert is_about(steady_free_bytes(), before)
    assert cache.buffer_stats()["device_reserved_bytes"] == SLAB_BYTES


def test_with_the_same_batches_torch_takes_no_memory_from_the_third_step_on() -> None:
    cache = roomy_cache(prealloc_bytes=SLAB_BYTES)
    seen = []
    for _ in range(6):
        fetch_all(cache, dict.fromkeys(range(4), SLAB_BYTES))
        cache.clear()
        cache.synchronize()
        seen.append(torch.cuda.memory_stats(GPU)["segment.all.allocated"])
    assert seen[2:] == [seen[1]] * 4


def test_trim_gives_the_preallocated_slabs_back_too_and_spares_torchs_memory() -> None:
    cache = rehearsed(roomy_cache(prealloc_bytes=2 * SLAB_BYTES))
    cached_by_torch = torch.empty(SLAB_BYTES, dtype=torch.uint8, device=GPU)
    del cached_by_torch
    before, reserved = steady_free_bytes(), torch.cuda.memory_reserved(GPU)
    assert cache.trim(to_bytes=SLAB_BYTES)
    assert is_about(steady_free_bytes(), before + SLAB_BYTES)
    assert cache.trim()
    assert is_about(steady_free_bytes(), before + 2 * SLAB_BYTES)
    assert is_about(torch.cuda.memory_reserved(GPU), reserved - 2 * SLAB_BYTES)
    assert not cache.trim()


def test_offload_gives_held_blocks_back_when_they_die_and_the_rest_at_once() -> None:
    cache = rehearsed(roomy_cache(prealloc_bytes=2 * SLAB_BYTES))
    cache.trim()
    before = steady_free_bytes()
    cache.resume()
    *others, kept = fetch_all(cache, dict.fromkeys(range(4), SLAB_BYTES))
    del others
    report = cache.offload()
    assert (report.freed_bytes, report.held_bytes) == (3 * SLAB_BYTES, SLAB_BYTES)
    assert is_about(before - steady_free_bytes(), SLAB_BYTES)
    assert is_all(kept, 3)
    del kept
    cache.synchronize()
    assert is_about(steady_free_bytes(), before)
    cache.resume()
    fetch(cache, 9, 9)
    assert is_about(before - steady_free_bytes(), 2 * SLAB_BYTES)


def test_an_evicted_shard_waits_in_pinned_memory_and_comes_back() -> None:
    config = {"pool_bytes": 2 * SLAB_BYTES, "prealloc_bytes": 2 * SLAB_BYTES, "host_tier_bytes": 4 * SLAB_BYTES}
    cache = roomy_cache(**config)
    for number in range(4):
        fetch(cache, number, number, SLAB_BYTES)
    below = cache._index.below
    assert below is not None
    parked = [entry.copy.base for entry in below._entries.values() if entry.copy is not None]
    assert len(parked) == 2
    assert all(base.is_pinned() for base in parked)
    del parked
    for number in range(4):
        assert is_all(fetch(cache, number, 99, SLAB_BYTES), number), "not fetched again"
    stats = cache.buffer_stats()
    assert (stats["misses"], stats["host_hits"], stats["overflows"]) == (4, 4, 0)
    assert stats["d2h_bytes"] == 6 * SLAB_BYTES
    report = cache.offload()
    assert report.held_bytes == 0
    assert cache.buffer_stats()["device_reserved_bytes"] == 0
    assert is_all(fetch(cache, 3, 99, SLAB_BYTES), 3)


def test_a_batch_on_the_host_is_pinned_and_takes_nothing_of_the_device() -> None:
    cache = rehearsed(roomy_cache(host_tier_bytes=4 * SLAB_BYTES))
    source = DictSource({number: filled(number, SLAB_BYTES) for number in range(4)})
    before, first = steady_free_bytes(), cache.buffer_stats()
    batch = cache.get_many(list(range(4)), source, prefer="host")
    assert is_about(steady_free_bytes(), before)
    assert all(tensor.is_pinned() for tensor in batch)
    assert all(is_all(tensor.to(GPU, non_blocking=True), number) for number, tensor in enumerate(batch))
    del batch
    assert is_all(fetch(cache, 2, 99, SLAB_BYTES), 2), "copied, not fetched"
    stats = cache.buffer_stats()
    assert (stats["fetches"] - first["fetches"], stats["host_hits"]) == (1, 1)
    assert stats["h2d_bytes"] - first["h2d_bytes"] == SLAB_BYTES


def test_close_gives_held_blocks_back_when_they_die_and_the_rest_at_once() -> None:
    rehearsed(roomy_cache()).close()
    before = steady_free_bytes()
    cache = roomy_cache(prealloc_bytes=SLAB_BYTES)
    *others, kept = fetch_all(cache, dict.fromkeys(range(4), SLAB_BYTES))
    del others
    staged = [slot.pinned.tensor for slot in cache._lazy.open().staging._slots]
    assert all(tensor.is_pinned() for tensor in staged)
    cache.close()
    assert is_about(before - steady_free_bytes(), SLAB_BYTES)
    assert is_all(kept, 3)
    assert not any(tensor.is_pinned() for tensor in staged)
    del kept
    assert is_about(steady_free_bytes(), before)


def test_reserved_bytes_explain_what_the_driver_is_short_of() -> None:
    cache = rehearsed(roomy_cache())
    before = steady_free_bytes()
    assert cache.buffer_stats()["device_reserved_bytes"] == 0
    shards = []
    for number, nbytes in enumerate((MIB, SLAB_BYTES, 100 * MIB + 4096, 200 * MIB)):
        shards.append(fetch(cache, number, number, nbytes))
        stats = cache.buffer_stats()
        taken = before - steady_free_bytes()
        assert is_about(taken, stats["device_reserved_bytes"], SLACK_BYTES + len(shards) * 2 * MIB)
        assert stats["device_reserved_bytes"] <= stats["device_capacity_bytes"]
        assert stats["device_bytes"] == sum(shard.numel() for shard in shards)
    assert all(is_all(shard, number) for number, shard in enumerate(shards))


def test_an_overflow_is_taken_from_torch_and_goes_back_to_it() -> None:
    cache = small_cache()
    held = fetch(cache, "held", 1)
    reserved, allocated = torch.cuda.memory_reserved(GPU), torch.cuda.memory_allocated(GPU)
    beyond = fetch(cache, "beyond", 2, SLAB_BYTES)
    stats = cache.buffer_stats()
    assert (stats["overflows"], stats["device_reserved_bytes"]) == (1, SHARD_BYTES + SLAB_BYTES)
    assert is_about(torch.cuda.memory_allocated(GPU), allocated + SLAB_BYTES)
    assert (is_all(held, 1), is_all(beyond, 2)) == (True, True)
    del beyond
    cache.synchronize()
    steady_free_bytes()
    assert cache.buffer_stats()["device_reserved_bytes"] == SHARD_BYTES
    assert is_about(torch.cuda.memory_allocated(GPU), allocated)
    assert torch.cuda.memory_reserved(GPU) >= reserved - SLACK_BYTES


def test_a_release_during_a_capture_waits_for_its_end_and_leaves_it_intact() -> None:
    cache = small_cache()
    device = cache._lazy.open().device
    arena, later = device.arena(SLAB_BYTES), device.arena(SLAB_BYTES)
    data, graph = torch.zeros(4, device=GPU), torch.cuda.CUDAGraph()
    data.add_(0)
    torch.cuda.empty_cache()  # as the capture will
    before = steady_free_bytes()
    with torch.cuda.graph(graph):
        data.add_(1)
        reserved = torch.cuda.memory_reserved(GPU)
        in_thread(lambda: device.release_arena(arena))
        assert is_about(torch.cuda.memory_reserved(GPU), reserved), "given back during the capture"
    graph.replay()
    assert data.tolist() == [1.0] * 4
    device.release_arena(later)
    assert is_about(steady_free_bytes(), before + 2 * SLAB_BYTES)


def test_a_clear_during_a_capture_gives_its_slabs_back_after_it() -> None:
    cache = rehearsed(roomy_cache())
    torch.cuda.empty_cache()  # as the capture will
    before = steady_free_bytes()
    fetch_all(cache, dict.fromkeys(range(3), SLAB_BYTES))
    data, graph = torch.zeros(4, device=GPU), torch.cuda.CUDAGraph()
    data.add_(0)
    with torch.cuda.graph(graph):
        data.add_(1)
        in_thread(lambda: (cache.clear(), cache.synchronize(), cache.trim()))
    graph.replay()
    assert data.tolist() == [1.0] * 4
    del graph
    cache.synchronize()
    assert is_about(steady_free_bytes(), before)


EXPANDABLE = """
import torch
from tests.support.gpu_scene import *
cache = roomy_cache()
fetch_all(cache, dict.fromkeys(range(3), 64 * MIB))
cache.clear(); cache.trim(); cache.resume()
before = steady_free_bytes()
fetch_all(cache, dict.fromkeys(range(3), 64 * MIB))
taken = before - steady_free_bytes()
cache.clear(); cache.trim()
print(is_about(taken, 192 * MIB, 64 * MIB), is_about(steady_free_bytes(), before))
"""


def test_slabs_go_back_with_expandable_segments_too() -> None:
    assert run_python("-c", EXPANDABLE, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") == "True True\n"


SAVED = """
import torch
from torch_memory_saver import torch_memory_saver
from gpu_cache import TensorCache
from tests.support.gpu_scene import *
weights = torch.ones(64 * MIB, dtype=torch.uint8, device=GPU)
auto = TensorCache()
auto.put("a", torch.ones(3))
cache = roomy_cache()
fetch(cache, "warm", 1)
cache.clear(); cache.trim()
before = steady_free_bytes()
kept = fetch(cache, "kept", 3, 64 * MIB)
torch_memory_saver.pause()
readable = is_all(kept.cpu(), 3)
torch_memory_saver.resume()
del kept
cache.clear(); cache.trim()
print(auto.device_name, readable, is_about(steady_free_bytes(), before))
"""


def test_under_torch_memory_saver_slabs_stay_mapped_and_go_back() -> None:
    saver = pytest.importorskip("torch_memory_saver", reason="torch_memory_saver is not installed")
    with saver.configure_subprocess():
        assert run_python("-c", SAVED, TMS_INIT_ENABLE="1").splitlines()[-1] == "cpu True True"
