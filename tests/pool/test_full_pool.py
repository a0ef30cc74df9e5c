"""A full pool: the victims, the order in which the cache looks for room, and promises that it keeps."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Iterator

import pytest
import torch

from gpu_cache import CacheConfig, CacheFullError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.pool.slab import SlabPool
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource

KIB = 1 << 10
CONFIG = CacheConfig(
    slab_bytes=32 * KIB, pool_bytes=32 * KIB, prealloc_bytes=32 * KIB, staging_slots=2, staging_slot_bytes=16 * KIB,
    run_bytes=8 * KIB,
)  # fmt: skip
SMALL: dict[Hashable, torch.Tensor] = {
    f"{run}{number}": torch.full((2 * KIB,), ord(run), dtype=torch.uint8) for run in "abcdef" for number in range(4)
}
SOURCE = DictSource(SMALL)


def run_of(name: str) -> list[Hashable]:
    """The shards of one run, which are asked for together."""
    return [f"{name}{number}" for number in range(4)]


@pytest.fixture(params=["host", "staged host", "simulated"])
def cache(request: pytest.FixtureRequest) -> TensorCache:
    device = SimDevice() if request.param == "simulated" else HostDevice(stages=request.param == "staged host")
    return TensorCache(CONFIG, device=device)


@pytest.fixture
def device() -> Iterator[SimDevice]:
    """A device that does nothing before a thread waits for it."""
    device = SimDevice()
    device.adversary.begin()
    yield device
    assert device.faults == []


def fill(cache: TensorCache, names: str = "abcd") -> None:
    for name in names:
        cache.get_many(run_of(name), SOURCE)


def test_the_least_recently_used_run_goes_as_a_whole(cache: TensorCache) -> None:
    fill(cache)
    cache.get_many(run_of("a"), SOURCE)
    fill(cache, "e")
    assert {key for key in SMALL if key in cache} == {*run_of("a"), *run_of("c"), *run_of("d"), *run_of("e")}
    assert (cache.buffer_stats()["evictions"], cache.buffer_stats()["overflows"]) == (4, 0)


def test_a_run_of_which_one_shard_is_held_stays_for_one_that_goes_whole(cache: TensorCache) -> None:
    fill(cache)
    held = cache.get_many(["a3"], SOURCE)
    for key in ("a0", "a1", "a2", "a3"):  # the others are the least recently used still
        cache._index._entries.move_to_end(key, last=False)
    fill(cache, "e")
    assert {key for key in SMALL if key in cache} == {*run_of("a"), *run_of("c"), *run_of("d"), *run_of("e")}
    assert bool((held[0] == ord("a")).all())


def test_nothing_goes_if_it_would_not_make_room(cache: TensorCache) -> None:
    fill(cache)
    held = cache.get_many(["a1", "b1", "c1", "d1"], SOURCE)
    large = torch.ones(16 * KIB, dtype=torch.uint8)
    (got,) = cache.get_many(["large"], DictSource({"large": large}))
    assert torch.equal(got, large)
    assert all(key in cache for name in "abcd" for key in run_of(name)), "what is cached would have gone for nothing"
    assert (cache.buffer_stats()["evictions"], cache.buffer_stats()["overflows"]) == (0, 1)
    assert len(held) == 4


def test_a_run_is_halved_until_room_can_be_made_for_its_parts(cache: TensorCache) -> None:
    fill(cache)
    held = cache.get_many(["a1", "b1", "c1", "d1"], SOURCE)  # leaves 4 KiB in a row, after each
    fill(cache, "e")
    assert cache.buffer_stats()["overflows"] == 0
    assert cache.buffer_stats()["evictions"] == 4
    assert all(key in cache for key in run_of("e"))
    assert len(held) == 4


def test_the_oldest_quarantine_is_waited_for_and_nothing_else(device: SimDevice) -> None:
    cache = TensorCache(CONFIG, device=device)
    fill(cache)
    for name in "ab":  # each is read, cleared and in quarantine behind its reader
        for tensor in cache.get_many(run_of(name), SOURCE):
            device.kernel(device.pooled[1], tensor, SMALL[f"{name}0"].numpy())
            del tensor
        cache.clear(run_of(name))
    assert cache.buffer_stats()["device_quarantined_bytes"] == 16 * KIB
    fill(cache, "e")
    stats = cache.buffer_stats()
    assert stats["device_quarantined_bytes"] == 8 * KIB, "the second one waits on"
    assert (stats["evictions"], stats["overflows"]) == (0, 0), "what was freed comes before what is cached"
    assert len(device.pooled[1].queue) > 0
    device.finish()


def test_nothing_is_evicted_while_its_bytes_could_not_be_reused(device: SimDevice) -> None:
    cache = TensorCache(CONFIG, device=device)
    fill(cache)
    device.captured = device.pooled[2]
    fill(cache, "e")
    assert (cache.buffer_stats()["evictions"], cache.buffer_stats()["overflows"]) == (0, 4)
    device.captured = None
    fill(cache, "f")
    assert (cache.buffer_stats()["evictions"], cache.buffer_stats()["overflows"]) == (4, 4)


def test_a_shard_whose_copy_is_under_way_goes_last(device: SimDevice) -> None:
    cache = TensorCache(dataclasses.replace(CONFIG, ready="stream"), device=device)
    fill(cache)
    for name in "bcd":
        for key in run_of(name):
            cache._index._entries[key].copy.completion.wait_host()
    cache._index._entries["a0"].copy.completion._event = device.record(
        device.pooled[1]
    )  # not done before a thread waits
    for key in ("a1", "a2", "a3"):
        cache._index._entries[key].copy.completion = cache._index._entries["a0"].copy.completion
    fill(cache, "e")
    assert all(key in cache for key in run_of("a"))
    assert not any(key in cache for key in run_of("b"))


def test_an_overflow_names_the_fill_of_the_pool(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    held = [cache.get_many(run_of(name), SOURCE) for name in "abcdef"]
    assert cache.buffer_stats()["overflows"] == 8
    with caplog.at_level(logging.WARNING):
        said = [record.getMessage() for record in caplog.records if "GPU_CACHE_POOL_BYTES" in record.getMessage()]
    assert len(said) == 1, "once a minute"
    assert "32,768 bytes is full" in said[0]
    figures = "32,768 held, 0 on their way, 0 waiting to be reused, 0 of these outside of it, 0 free"
    assert f"({figures}, the largest free range 0); raise pool_bytes" in said[0]
    assert "8,192 bytes are handed out uncached" in said[0]
    assert all(bool((tensor == tensor[0]).all()) for run in held for tensor in run)


def test_a_shard_longer_than_the_pool_says_so_and_no_clear_is_advised(
    cache: TensorCache, caplog: pytest.LogCaptureFixture
) -> None:
    long = torch.zeros(40 * KIB, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        cache.get_many(["long"], DictSource({"long": long}))
    (said,) = [record.getMessage() for record in caplog.records if "handed out uncached" in record.getMessage()]
    assert "the pool of 32,768 bytes is shorter than this run of 40,960 bytes; raise pool_bytes" in said
    assert "clear" not in said
    with pytest.raises(CacheFullError, match="need 40,960 bytes, 32,768 free of 32,768; the pool is shorter") as caught:
        cache.put("put", long)
    assert "clear" not in str(caught.value)


def test_free_bytes_in_pieces_are_told_as_such(cache: TensorCache, caplog: pytest.LogCaptureFixture) -> None:
    held = {key: cache.get_many([key], SOURCE) for name in "abcd" for key in run_of(name)}
    for key in list(held)[::2]:
        del held[key]
    cache.clear()
    cache.synchronize()
    with caplog.at_level(logging.WARNING):
        cache.get_many(["long"], DictSource({"long": torch.zeros(4 * KIB, dtype=torch.uint8)}))
    (said,) = [record.getMessage() for record in caplog.records if "handed out uncached" in record.getMessage()]
    assert "has 16,384 bytes free in pieces, 2,048 the largest" in said


def test_an_overflow_blames_a_device_without_memory_for_a_slab(caplog: pytest.LogCaptureFixture) -> None:
    device = SimDevice()
    cache = TensorCache(dataclasses.replace(CONFIG, prealloc_bytes=0), device=device)
    pool = cache._lazy.open().pool
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(pool, "_grow", lambda growth: _refuse(pool, growth))
        fill(cache, "a")
    said = [record.getMessage() for record in caplog.records if "handed out uncached" in record.getMessage()]
    assert "may grow by 32,768, and the device has no memory for that" in said[0]


def _refuse(pool: SlabPool, growth: int) -> bool:
    with pool._lock:
        pool._growing_bytes -= growth
    return False
