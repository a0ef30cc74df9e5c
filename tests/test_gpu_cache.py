"""The cache on a real GPU. Everything here skips without one."""

from __future__ import annotations

import threading

import pytest
import torch

from gpu_cache import CacheConfig, TensorCache, TransferError
from gpu_cache.device import CudaDevice
from tests.support.sources import DictSource, same_bytes, some_tensors

pytestmark = pytest.mark.gpu

MIB = 1 << 20
CONFIG = CacheConfig(
    device="cuda:0", slab_bytes="8MiB", pool_bytes="64MiB", prealloc_bytes=0, staging_slots=3,
    staging_slot_bytes="1MiB", run_bytes="256KiB",
)  # fmt: skip


@pytest.fixture
def cache() -> TensorCache:
    torch.cuda.init()
    return TensorCache(CONFIG)


def test_shards_arrive_on_the_gpu_bit_for_bit(cache: TensorCache) -> None:
    tensors = some_tensors(300)
    tensors["large"] = torch.randint(0, 255, (20 * MIB,), dtype=torch.uint8)
    got = cache.get_many(list(tensors), DictSource(tensors))
    assert all(tensor.is_cuda for tensor in got)
    assert all(same_bytes(tensor.cpu(), want) for tensor, want in zip(got, tensors.values(), strict=True))
    stats = cache.buffer_stats()
    assert stats["is_pinned"] == 1
    assert stats["h2d_bytes"] >= stats["fetch_bytes"]


def test_every_byte_goes_back_to_the_driver(cache: TensorCache) -> None:
    cache.put("warm", torch.ones(1))
    cache.clear()
    cache.synchronize()
    before = torch.cuda.mem_get_info(0)[0]
    tensors = {number: torch.full((4 * MIB,), number, dtype=torch.uint8) for number in range(8)}
    got = cache.get_many(list(tensors), DictSource(tensors))
    assert torch.cuda.mem_get_info(0)[0] < before
    del got
    cache.clear()
    cache.synchronize()
    assert cache.buffer_stats()["device_bytes"] == 0
    assert torch.cuda.mem_get_info(0)[0] == before


def test_a_block_is_not_reused_while_a_kernel_still_reads_it(cache: TensorCache) -> None:
    side = torch.cuda.Stream()
    (block,) = cache.get_many(["a"], DictSource({"a": torch.full((MIB,), 5, dtype=torch.uint8)}))
    out = torch.zeros(MIB, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        out.copy_(block)
    cache.clear()
    del block
    others = {number: torch.full((MIB,), 9, dtype=torch.uint8) for number in range(7)}
    cache.get_many(list(others), DictSource(others))
    torch.cuda.synchronize()
    assert bool((out == 5).all())


def test_a_first_use_from_a_thread_that_never_chose_a_device(cache: TensorCache) -> None:
    got: list[torch.Tensor] = []
    source = DictSource({"a": torch.arange(1000)})
    thread = threading.Thread(target=lambda: got.extend(cache.get_many(["a"], source)))
    thread.start()
    thread.join(60)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        total = got[0].sum()
    side.synchronize()
    assert int(total) == 499_500


def test_a_lease_that_backward_frees_fires_on_the_autograd_thread(cache: TensorCache) -> None:
    weight = torch.ones(1000, device="cuda:0", requires_grad=True)
    source = DictSource({"a": torch.arange(1000.0)})
    loss = (weight * cache.get_many(["a"], source)[0]).sum()
    cache.clear()
    loss.backward()
    cache.synchronize()
    assert cache.buffer_stats()["device_bytes"] == 0
    assert weight.grad is not None
    assert torch.equal(weight.grad.cpu(), torch.arange(1000.0))


def test_a_captured_graph_reads_what_was_seen_to_arrive(cache: TensorCache) -> None:
    source = DictSource({"a": torch.ones(64), "b": torch.ones(64)})
    (seen,) = cache.get_many(["a"], source)
    out = torch.zeros(64, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (again,) = cache.get_many(["a"], source)
        out.add_(again)
        with pytest.raises(TransferError, match="cannot fetch 'b'"):
            cache.get_many(["b"], source)
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [1.0] * 64
    assert seen.data_ptr() == again.data_ptr()


def test_nothing_is_allocated_in_steady_state(cache: TensorCache) -> None:
    cache = TensorCache(CacheConfig(device="cuda:0", slab_bytes="8MiB", pool_bytes="64MiB", prealloc_bytes="16MiB"))
    tensors = some_tensors(200)

    def step() -> None:
        cache.get_many(list(tensors), DictSource(tensors))
        cache.clear()
        cache.synchronize()

    step()
    before = torch.cuda.memory_stats(0)["allocation.all.allocated"]
    pinned = cache.buffer_stats()["pinned_capacity_bytes"]
    for _ in range(20):
        step()
    assert torch.cuda.memory_stats(0)["allocation.all.allocated"] == before
    assert cache.buffer_stats()["pinned_capacity_bytes"] == pinned


def test_the_copy_stream_is_none_of_torchs_pool_of_priority_zero() -> None:
    device = CudaDevice(0)
    pooled = {torch.cuda.Stream(0).cuda_stream for _ in range(64)}
    assert device.new_stream().cuda_stream not in pooled
