"""Writes into shards on a real GPU: others get the original bytes, behind whatever the writer has yet to run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache
from gpu_cache.config import Prefer, ReadyMode
from tests.support.sources import DictSource, same_bytes

pytestmark = pytest.mark.gpu

CONFIG = CacheConfig(device="cuda", slab_bytes="32MiB", prealloc_bytes=0, pool_bytes="256MiB")


@pytest.mark.parametrize("ready", ["host", "stream"])
def test_after_a_write_on_a_side_stream_others_get_the_original(ready: ReadyMode) -> None:
    """The bytes that were written to are let go, and are reused behind the side stream only."""
    tensors = {name: torch.randn(3_000_001) for name in "abc"}
    cache, source = TensorCache(CONFIG), DictSource(tensors)
    written = cache.get_many(["a", "b"], source)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for number in range(2):
            written[number].add_(1)
    written.clear()
    fresh = cache.get_many(["a", "b"], source, ready=ready)
    fresh += cache.get_many(["c"], source, ready=ready)
    torch.cuda.synchronize()
    assert all(same_bytes(got.cpu(), want) for got, want in zip(fresh, tensors.values(), strict=True))
    assert cache.buffer_stats()["mutations"] == 2
    assert source.asked == [["a", "b"], ["a", "b"], ["c"]]


def test_checksums_see_writes_that_the_counter_misses() -> None:
    tensors = {"a": torch.randn(100)}
    cache, source = TensorCache(CacheConfig(device="cuda", prealloc_bytes=0, debug_checksum=True)), DictSource(tensors)
    cache.get_many(["a"], source)[0].data.zero_()
    assert same_bytes(cache.get_many(["a"], source)[0].cpu(), tensors["a"])
    assert cache.buffer_stats()["mutations"] == 1


@pytest.mark.parametrize("prefer", ["host", "device"])
def test_after_a_write_in_the_host_tier_others_get_the_original(prefer: Prefer) -> None:
    tensors = {"a": torch.randn(3_000_001), "b": torch.randn(5)}
    cache = TensorCache(dataclasses.replace(CONFIG, host_tier_bytes=64 << 20))
    source = DictSource(tensors)
    written, _ = cache.get_many(list(tensors), source, prefer="host")
    written[7] = -1
    fresh = cache.get_many(list(tensors), source, prefer=prefer)
    assert {tensor.device.type for tensor in fresh} == {"cpu" if prefer == "host" else "cuda"}
    assert all(same_bytes(got.cpu(), want) for got, want in zip(fresh, tensors.values(), strict=True))
    assert cache.buffer_stats()["mutations"] == 1
    assert source.asked == [["a", "b"], ["a"]]
