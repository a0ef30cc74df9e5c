"""CUDA graphs: what a capture may read, what it refuses, and what goes on beside it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from gpu_cache import TensorCache, TransferError
from tests.support.cuda_devices import in_thread
from tests.support.gpu_process import run_python
from tests.support.gpu_scene import (
    GPU,
    MIB,
    SHARD_BYTES,
    allocate,
    fetch,
    filled,
    is_all,
    keep_busy,
    load_kernels,
    small_cache,
)
from tests.support.sources import DictSource

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]


@pytest.fixture
def cache() -> TensorCache:
    """Room for two shards."""
    cache = small_cache(pool_bytes=2 * SHARD_BYTES, prealloc_bytes=2 * SHARD_BYTES)
    load_kernels()
    return cache


@pytest.fixture
def total() -> torch.Tensor:
    """What captured kernels add to."""
    torch.cuda.init()
    return torch.zeros(SHARD_BYTES, dtype=torch.uint8, device=GPU)


def replayed(graph: torch.cuda.CUDAGraph, total: torch.Tensor) -> int:
    """The one value of all elements after a replay."""
    graph.replay()
    torch.cuda.synchronize(GPU)
    value = int(total[0])
    assert is_all(total, value)
    return value


def test_a_captured_read_is_replayed(cache: TensorCache, total: torch.Tensor) -> None:
    shard = fetch(cache, "a", 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = cache.get("a")
        (once_more,) = cache.get_many(["a"], DictSource({}))
        assert again is not None
        assert shard.data_ptr() == again.data_ptr() == once_more.data_ptr()
        total.add_(again)
    assert [replayed(graph, total), replayed(graph, total)] == [5, 10]


def test_a_replay_reads_its_callers_tensor_while_the_cache_moves_on(cache: TensorCache, total: torch.Tensor) -> None:
    kept = fetch(cache, "a", 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(kept)
    cache.clear()
    for value in range(10, 16):
        others = fetch(cache, value, value)
        cache.clear()
        assert replayed(graph, total) == 5 * (value - 9)
        assert is_all(others, value)
        del others
    assert is_all(kept, 5)
    assert cache.buffer_stats()["overflows"] == 0


REFUSED: dict[str, Callable[[TensorCache], object]] = {
    "fetch": lambda cache: fetch(cache, "absent", 1),
    "fetch, stream": lambda cache: fetch(cache, "absent", 1, ready="stream"),
    "prefetch": lambda cache: cache.prefetch(["absent"], DictSource({})),
    "put": lambda cache: cache.put("absent", torch.ones(1)),
    "synchronize": lambda cache: cache.synchronize(),
    "trim": lambda cache: cache.trim(),
    "close": lambda cache: cache.close(),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_capture_refuses_copies_and_waits_and_goes_on(
    cache: TensorCache, total: torch.Tensor, call: Callable[[TensorCache], object]
) -> None:
    shard = fetch(cache, "a", 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(shard)
        with pytest.raises(TransferError, match="during CUDA graph capture"):
            call(cache)
        total.add_(shard)
    assert replayed(graph, total) == 10
    assert is_all(fetch(cache, "absent", 7), 7)


def test_a_capture_refuses_a_copy_that_the_host_has_not_seen_done(cache: TensorCache, total: torch.Tensor) -> None:
    allocate(cache)
    keep_busy(cache._lazy.open().transfer.stream)
    shard = fetch(cache, "a", 5, ready="stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(TransferError, match="not seen complete before CUDA graph capture"):
            cache.get("a")
        total.add_(shard)
    assert replayed(graph, total) == 5
    assert cache.get("a") is not None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        total.add_(1)
        assert cache.get("a") is not None, "seen meanwhile"


def test_a_drop_during_a_capture_frees_the_bytes_after_it(cache: TensorCache, total: torch.Tensor) -> None:
    kept, dropped = fetch(cache, "kept", 5), fetch(cache, "dropped", 6)
    pool = cache._lazy.open().pool
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(kept)
        del dropped
        cache.clear(["dropped"])
        time.sleep(0.2)  # ten rounds of the reaper
        assert pool.accounts()["free"] == 0
    assert replayed(graph, total) == 5
    cache.synchronize()
    assert pool.accounts()["free"] == SHARD_BYTES


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_capture_survives_other_threads_calls(total: torch.Tensor, mode: str) -> None:
    cache = small_cache(pool_bytes=6 * SHARD_BYTES)
    load_kernels()
    kept = fetch(cache, "kept", 5)
    fetch(cache, "other", 6)
    graph = torch.cuda.CUDAGraph()

    def use() -> torch.Tensor:
        new = fetch(cache, "new", 7)  # takes a new slab
        cache.clear(["other"])
        assert cache.get("kept") is not None
        cache.put("small", torch.ones(1))
        cache.prefetch(["ahead"], DictSource({"ahead": filled(8, MIB)})).result(30)
        cache.clear(["small", "ahead"])
        cache.synchronize()
        return new

    with torch.cuda.graph(graph, capture_error_mode=mode):
        total.add_(kept)
        new = in_thread(use)
        total.add_(kept)
    assert replayed(graph, total) == 10
    assert is_all(new, 7)
    cache.synchronize()
    assert is_all(fetch(cache, "after", 9), 9)


FIRST_USE = """
import torch
from tests.support.cuda_devices import in_thread
from tests.support.gpu_scene import *
torch.cuda.init()
total, graph = torch.zeros(4, device=GPU), torch.cuda.CUDAGraph()
total.add_(0)
cache = small_cache()
with torch.cuda.graph(graph):
    total.add_(1)
    tensor = in_thread(lambda: fetch(cache, "a", 5))
    total.add_(1)
graph.replay()
print(total.tolist(), is_all(tensor, 5))
del tensor
cache.clear(); cache.synchronize(); cache.close()
print(cache)
"""


def test_the_first_use_of_a_cache_leaves_a_capture_in_another_thread_intact() -> None:
    first, second = run_python("-c", FIRST_USE).splitlines()
    assert first == "[2.0, 2.0, 2.0, 2.0] True"
    assert second.startswith("TensorCache(cuda:0")
