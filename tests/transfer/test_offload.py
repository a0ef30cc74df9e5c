"""Device memory given to another user for a while."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache, TransferError, TrimReport
from gpu_cache.config import MIB
from gpu_cache.device.cuda import CudaDevice
from tests.support.fake_cuda import FakeCuda
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource
from tests.support.tier_scene import cache_on_fake

pytestmark = pytest.mark.usefixtures("no_reaper")

CONFIG = CacheConfig(
    slab_bytes=MIB, pool_bytes=4 * MIB, prealloc_bytes=2 * MIB, staging_slots=2, staging_slot_bytes=MIB, run_bytes=MIB
)
SHARDS: dict[Hashable, torch.Tensor] = {n: torch.full((MIB,), n, dtype=torch.uint8) for n in range(4)}
SOURCE = DictSource(SHARDS)


@pytest.fixture
def cache(cuda: FakeCuda, tmp_path: Path) -> Iterator[TensorCache]:
    yield from cache_on_fake(cuda, tmp_path, CONFIG)


def reserved(cuda: FakeCuda, cache: TensorCache) -> int:
    """As the driver counts."""
    device = cache._lazy.open().device
    assert isinstance(device, CudaDevice)
    return cuda.reserved(device.torch_device.index)


def test_offload_frees_every_slab_and_the_next_use_takes_them_again(cuda: FakeCuda, cache: TensorCache) -> None:
    cache.get_many(list(SHARDS), SOURCE)
    assert reserved(cuda, cache) == 4 * MIB
    assert cache.offload() == TrimReport(4 * MIB, 0, 0)
    assert reserved(cuda, cache) == 0
    assert len(cache) == 0
    cache.get_many([0], SOURCE)
    assert reserved(cuda, cache) == MIB, "no more than it takes"
    cache.resume()
    assert reserved(cuda, cache) == MIB, "not before the next use"
    cache.get_many([1], SOURCE)
    cache.clear()
    cache.synchronize()
    assert reserved(cuda, cache) == 2 * MIB, "what is preallocated"


def test_a_slab_whose_shard_is_held_stays_and_goes_when_it_is_let_go(cuda: FakeCuda, cache: TensorCache) -> None:
    *_, held = cache.get_many(list(SHARDS), SOURCE)
    report = cache.offload()
    del _
    assert (report.held_bytes, report.num_held) == (4 * MIB, 4)
    assert not report
    cache.synchronize()
    assert reserved(cuda, cache) == MIB
    assert 3 not in cache, "or it would be held by the cache itself"
    del held
    cache.synchronize()
    assert reserved(cuda, cache) == 0


def test_offload_waits_for_readers() -> None:
    device = SimDevice()
    device.adversary.begin()
    cache = TensorCache(CONFIG, device=device)
    (tensor,) = cache.get_many([0], SOURCE)
    device.kernel(device.pooled[2], tensor, SHARDS[0].numpy())
    del tensor
    assert cache.offload().freed_bytes == 2 * MIB
    assert device.arena_bytes == 0
    assert device.faults == []


def test_a_shard_on_its_way_lands_after_all() -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    cache.get_many([0], SOURCE)
    entry = cache._index.reserve("on its way")
    assert entry is not None
    cache.offload()
    assert device.arena_bytes == 0
    assert not cache._index.is_empty
    cache._index.abort([entry], RuntimeError("given up"))


def test_nothing_is_given_back_during_a_capture_or_before_the_first_use(cuda: FakeCuda, cache: TensorCache) -> None:
    assert cache.offload() == cache.trim() == TrimReport()
    cache.resume()
    cache.get_many([0], SOURCE)
    device = cache._lazy.open().device
    with cuda.capture(device.fence_streams()[5]):
        for call in (cache.offload, cache.trim):
            with pytest.raises(TransferError, match="during CUDA graph capture"):
                call()
    assert 0 in cache
