"""The host tier: evicted shards come back by a copy, and know no other life than those on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import pytest
import torch

from gpu_cache import FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.index.entry import Candidate
from gpu_cache.pool.block import Copy
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource, same_bytes
from tests.support.tier_scene import CONFIG, KIB, SHARDS, fill, parked, run_of


def test_an_evicted_shard_comes_back_without_a_fetch(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    assert parked(cache) == {*run_of("a"), *run_of("b")}
    before, asked = cache.buffer_stats(), len(source.asked)
    fill(cache, source, "a")
    stats = cache.buffer_stats()
    assert len(source.asked) == asked
    assert parked(cache) == {*run_of("b"), *run_of("c")}
    assert (stats["host_hits"], stats["misses"], stats["fetches"]) == (4, 24, 6)
    assert stats["copies"] - before["copies"] == 1, "a run of them in one copy"
    assert stats["h2d_bytes"] - before["h2d_bytes"] == 8 * KIB
    assert (stats["d2h_bytes"], stats["evictions"]) == (24 * KIB, 12)
    assert stats["hit_bytes"] == 4 * 2000
    assert stats["requested_bytes"] == stats["hit_bytes"] + stats["miss_bytes"] == 28 * 2000
    assert stats["total_bytes"] == 24 * 2000


def test_the_tier_drops_the_least_recently_used_shard(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdefghijkl")
    fill(cache, source, "l")
    assert parked(cache) == {key for name in "abcdefgh" for key in run_of(name)}
    fill(cache, source, "a")
    assert parked(cache) == {key for name in "cdefghi" for key in run_of(name)}, "the tier was full when i came in"
    assert cache._index.report()["host_evictions"] == 4
    config = dataclasses.replace(CONFIG, host_tier_bytes=8 * KIB)
    small = TensorCache(config, device=HostDevice())
    fill(small, source, "abcdef")
    assert parked(small) == set(run_of("b"))
    assert small._index.report()["host_evictions"] == 4
    assert "a0" not in small
    assert small.buffer_stats()["host_bytes"] == 8 * KIB == small.buffer_stats()["host_capacity_bytes"]


def test_a_clear_drops_from_the_tier_too(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    assert cache.clear(["a0", "c0"]) == 2
    assert cache.clear_node(source.node, run_of("b")) == 4
    assert parked(cache) == {"a1", "a2", "a3"}
    assert cache.clear() == 3 + 15
    cache.synchronize()
    stats = cache.buffer_stats()
    assert (stats["host_bytes"], stats["device_bytes"], stats["num_entries"], stats["total_bytes"]) == (0, 0, 0, 0)
    assert cache._index.report()["host_entries"] == 0


def test_one_shard_is_brought_back_by_get_and_a_missing_one_is_none(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    found = cache.get("a2")
    assert found is not None
    assert same_bytes(found, SHARDS["a2"])
    assert cache.get("k0") is None


def test_a_prefetch_brings_back(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    assert cache.prefetch(run_of("a"), source).result(30) == 4
    assert parked(cache).isdisjoint(run_of("a"))


def test_a_shard_without_room_on_the_device_stays_in_the_tier(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    held = cache.get_many([key for name in "cdef" for key in run_of(name)], source)
    got = cache.get_many(run_of("a"), source)
    assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), got, strict=True))
    assert parked(cache) == {*run_of("a"), *run_of("b")}
    assert cache.buffer_stats()["overflows"] == 4
    assert len(held) == 16
    del held, got
    fill(cache, source, "a")
    assert cache.buffer_stats()["host_hits"] == 8
    assert parked(cache).isdisjoint(run_of("a"))


def test_a_shard_that_cannot_be_copied_back_fails_and_stays(source: DictSource) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    fill(cache, source, "abcdef")
    device.refuse("copy", 2)
    with pytest.raises(FetchError, match="refuses: copy"):
        cache.get_many(run_of("a"), source)
    device.refuse("copy", 0)
    assert parked(cache) >= set(run_of("a"))
    fill(cache, source, "a")
    assert device.faults == []


def test_an_eviction_waits_for_nothing_while_the_tier_has_room(source: DictSource) -> None:
    device = SimDevice()
    device.adversary.begin()
    cache = TensorCache(CONFIG, device=device)
    fill(cache, source, "abcd")
    engine = cache._lazy.open()
    assert engine.tier is not None
    victims = engine.room._index.candidates()
    refuges = engine.tier.take_in(victims)
    assert len(refuges) == 16
    assert engine.tier.transfer.stream.queue, "the copies are enqueued"
    assert engine.room._index.evict(victims, refuges)
    del victims, refuges
    fill(cache, source, "a")
    assert device.faults == []


def test_a_clear_wins_over_a_shard_on_its_way_back(source: DictSource) -> None:
    cache = TensorCache(CONFIG, device=SimDevice())
    fill(cache, source, "abcdef")
    claim = cache._index.claim(["a0"])
    (entry,) = claim.claimed.values()
    joined = cache._index.claim(["a0"]).joined["a0"]
    assert joined is entry
    assert cache.clear(["a0"]) == 1
    cache._index.abort([entry], RuntimeError("given up"))
    assert "a0" not in cache
    claim = cache._index.claim(["a1"])
    cache._index.abort(claim.claimed.values(), RuntimeError("given up"))
    assert "a1" in parked(cache), "only those who waited know"
    fill(cache, source, "a")


def test_a_clear_during_an_offload_keeps_no_other_shard_on_the_device(
    cache: TensorCache, source: DictSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get_many(run_of("a"), source)
    assert cache._engine is not None
    room, left = cache._engine.room, run_of("a")
    take_in = room._refuge
    assert take_in is not None

    def cleared_meanwhile(victims: Sequence[Candidate]) -> Mapping[Hashable, Copy]:
        refuges = take_in(victims)
        cache.clear([left.pop()])  # another one each time
        return refuges

    monkeypatch.setattr(room, "_refuge", cleared_meanwhile)
    cache.offload()
    assert parked(cache) == set(left) == set(run_of("a")[:3])


def test_offload_moves_shards_that_no_reader_holds(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcd")
    (held,) = cache.get_many(["b1"], source)
    cache.offload()
    assert parked(cache) == {key for name in "abcd" for key in run_of(name)} - {"b1"}, "its holder may write into it"
    assert same_bytes(held, SHARDS["b1"])
    del held
    cache.synchronize()
    assert cache.buffer_stats()["device_reserved_bytes"] == 0
    cache.resume()
    asked = len(source.asked)
    fill(cache, source, "abcd")
    assert source.asked[asked:] == [["b1"]]


def test_ages_and_leaks_are_those_of_the_shard_not_of_its_place(source: DictSource) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    fill(cache, source, "abcd")
    born = dict(cache._index._ledger.births)
    fill(cache, source, "efab")
    assert [cache._index._ledger.births[key] for key in run_of("a")] == [born[key] for key in run_of("a")]
    assert list(cache.keys()) == [key for name in "abcdef" for key in run_of(name)], "oldest first"
    (oldest,) = cache.entries(oldest=1)
    assert (oldest.key, oldest.dtype, oldest.shape) == ("a0", torch.int32, (500,))


def test_a_host_without_memory_for_the_tier_evicts_without_it(source: DictSource) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    fill(cache, source, "abcd")
    device.refuse("slot", 100)
    fill(cache, source, "ef")
    assert parked(cache) == set()
    assert cache._lazy.open().details()["host_alloc_failures"] > 0


def test_the_tier_outlives_a_close_until_nothing_is_held(cache: TensorCache, source: DictSource) -> None:
    fill(cache, source, "abcdef")
    engine = cache._lazy.open()
    assert engine.tier is not None
    cache.close()
    assert engine.tier.pool.accounts()["reserved"] == 0
