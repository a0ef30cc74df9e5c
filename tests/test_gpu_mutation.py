"""Writes into shards on a real GPU: compared there, behind the write, and the trainer waits for none of it."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import Prefer, ReadyMode
from tests.support.sources import DictSource, same_bytes

pytestmark = pytest.mark.gpu

CONFIG = CacheConfig(device="cuda", slab_bytes="32MiB", prealloc_bytes=0, pool_bytes="256MiB")


def wait_until_told(cache: TensorCache) -> int:
    """How many writes were found, once all comparisons are over."""
    deadline = time.monotonic() + 30
    while cache._engine is None or cache._engine.comparisons.is_busy:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return cache.buffer_stats()["mutations"]


@pytest.mark.parametrize("ready", ["host", "stream"])
@pytest.mark.parametrize("changes", [True, False])
def test_a_write_on_a_side_stream_is_found_and_the_original_handed_out(ready: ReadyMode, changes: bool) -> None:
    tensors = {"a": torch.randn(3_000_001), "b": torch.randint(0, 9, (5,), dtype=torch.uint8)}
    cache, source = TensorCache(CONFIG), DictSource(tensors)
    written = cache.get_many(list(tensors), source)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tensor in written:
            tensor.add_(int(changes))
    fresh = cache.get_many(list(tensors), source, ready=ready)
    assert all(same_bytes(got.cpu(), want) for got, want in zip(fresh, tensors.values(), strict=True))
    assert wait_until_told(cache) == (2 if changes else 0)
    assert len(source.asked) == 2


def test_checksums_see_what_the_counter_misses() -> None:
    tensors = {"a": torch.randn(100)}
    cache, source = TensorCache(CacheConfig(device="cuda", prealloc_bytes=0, debug_checksum=True)), DictSource(tensors)
    cache.get_many(["a"], source)[0].data.zero_()
    assert same_bytes(cache.get_many(["a"], source)[0].cpu(), tensors["a"])
    assert wait_until_told(cache) == 1


@pytest.mark.parametrize("prefer", ["host", "device"])
def test_a_write_on_the_host_is_found_by_a_comparison_on_the_gpu(prefer: Prefer) -> None:
    tensors = {"a": torch.randn(3_000_001), "b": torch.randn(5)}
    cache = TensorCache(dataclasses.replace(CONFIG, host_tier_bytes=64 << 20))
    source = DictSource(tensors)
    written, harmless = cache.get_many(list(tensors), source, prefer="host")
    written[7] = -1
    harmless.add_(0)
    fresh = cache.get_many(list(tensors), source, prefer=prefer)
    assert {tensor.device.type for tensor in fresh} == {"cpu" if prefer == "host" else "cuda"}
    assert all(same_bytes(got.cpu(), want) for got, want in zip(fresh, tensors.values(), strict=True))
    assert wait_until_told(cache) == 1
