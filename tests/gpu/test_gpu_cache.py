"""The cache on a real GPU, from end to end: bytes arrive, in every size and from every thread."""

from __future__ import annotations

import pytest
import torch

from gpu_cache import TensorCache
from tests.support.cuda_devices import in_thread
from tests.support.gpu_scene import GPU, MIB, filled, is_all, small_cache
from tests.support.sources import DictSource, same_bytes, some_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]


@pytest.fixture
def cache() -> TensorCache:
    return small_cache(
        slab_bytes="16MiB", pool_bytes="64MiB", prealloc_bytes=0, staging_slot_bytes="1MiB", run_bytes="256KiB"
    )


def test_shards_arrive_bit_for_bit(cache: TensorCache) -> None:
    tensors = some_tensors(300)
    tensors["large"] = torch.randint(0, 255, (20 * MIB + 1,), dtype=torch.uint8)
    tensors["empty"] = torch.empty(0, 3)
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.float64)
    tensors["flags"] = torch.rand(1001) < 0.5
    got = cache.get_many(list(tensors), DictSource(tensors))
    assert all(tensor.device == GPU for tensor in got)
    assert all(same_bytes(tensor.cpu(), want) for tensor, want in zip(got, tensors.values(), strict=True))
    stats = cache.buffer_stats()
    assert stats["is_pinned"] == 1
    assert stats["h2d_bytes"] >= stats["fetch_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_neighbours_keep_their_bytes_while_others_come_and_go(cache: TensorCache) -> None:
    kept = cache.get_many(range(64), DictSource({number: filled(number, 1000 + number) for number in range(64)}))
    cache.clear(range(0, 64, 2))
    del kept[::2]
    for value in range(100, 110):
        shards = {f"{value}-{number}": filled(value, 700 + 13 * number) for number in range(40)}
        got = cache.get_many(list(shards), DictSource(shards))
        assert all(is_all(tensor, value) for tensor in got)
        cache.clear(list(shards))
    assert all(is_all(tensor, number) for number, tensor in zip(range(1, 64, 2), kept, strict=True))


def test_a_thread_that_never_chose_a_device_gets_tensors_that_all_streams_may_read(cache: TensorCache) -> None:
    source = DictSource({"a": torch.arange(1000)})
    (tensor,) = in_thread(lambda: cache.get_many(["a"], source))
    side = torch.cuda.Stream(GPU)
    with torch.cuda.stream(side):
        total = tensor.sum()
    side.synchronize()
    assert int(total) == 499_500


def test_a_shard_that_is_put_is_the_one_that_is_got(cache: TensorCache) -> None:
    assert cache.put("a", torch.arange(12.0).view(3, 4).t(), node="here")
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found.cpu(), torch.arange(12.0).view(3, 4).t())
    assert cache.clear_node("here") == 1


def test_the_device_is_told_by_the_names_that_nvml_uses(cache: TensorCache) -> None:
    identity = cache._lazy.open().device.identity()
    assert identity.name == torch.cuda.get_device_name(GPU)
    assert identity.uuid.startswith("GPU-")
