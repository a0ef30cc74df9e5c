"""`prefer="host"` beside other calls, and where something goes wrong."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gpu_cache import CacheClosedError, CacheFullError, FetchError, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.pool.block import Range
from tests.support.interleave_actors import in_background
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource, GatedReader, gated, same_bytes
from tests.support.tier_scene import (
    CONFIG,
    SHARDS,
    fill,
    is_in,
    on_host,
    parked,
    run_of,
    stands,
    wait_for_joins,
)


@pytest.fixture
def staged() -> TensorCache:
    return TensorCache(CONFIG, device=HostDevice(stages=True))


class Gate:
    """Threads that look for room in the device's pool wait here."""

    def __init__(self, cache: TensorCache) -> None:
        self._arrived, self._gate = threading.Event(), threading.Event()
        pool = cache._lazy.open().pool
        self._take, pool.take = pool.take, self._wait_and_take  # type: ignore[method-assign]

    def _wait_and_take(self, nbytes: int) -> Range | None:
        self._arrived.set()
        assert self._gate.wait(30)
        return self._take(nbytes)

    def wait(self) -> None:
        """Until a thread stands here."""
        assert self._arrived.wait(30)

    def open(self) -> None:
        self._gate.set()


def test_a_write_during_the_copy_harms_only_its_waiters(source: DictSource) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    (held,) = cache.get_many(["a1"], source, prefer="host")
    device.adversary.begin()
    assert cache.prefetch(["a1"], source).result(30) == 1
    assert cache._lazy.open().transfer.stream.queue, "the copy has yet to run"
    held.zero_()
    device.finish()
    del held
    fill(cache, source, "a")
    assert source.asked == [["a1"], run_of("a")]
    assert device.faults == []


@pytest.mark.parametrize("prefers", ["device", "host"])
def test_a_call_joins_a_fetch_for_the_other_tier(cache: TensorCache, source: DictSource, prefers: str) -> None:
    """A call for the device copies shards that came to the host. A call for the host takes shards of the device."""
    first, second = ("host", "device") if prefers == "device" else ("device", "host")
    readers = gated(source)
    fetching = in_background(lambda: cache.get_many(run_of("a"), source, prefer=first))
    stands(readers, 1)
    joining = in_background(lambda: cache.get_many(run_of("a"), source, prefer=second))
    wait_for_joins(cache, 4)
    readers[0].gate.set()
    got, others = joining.result(30), fetching.result(30)
    for tensors in (got, others):
        assert all(same_bytes(tensor, SHARDS[key]) for key, tensor in zip(run_of("a"), tensors, strict=True))
    assert is_in("device", cache, got)
    assert is_in(first, cache, others)
    assert len(source.asked) == 1


def test_a_clear_wins_over_shards_that_the_host_receives(cache: TensorCache, source: DictSource) -> None:
    readers = gated(source)
    future = cache.prefetch(run_of("a"), source, prefer="host")
    assert readers[0].has_arrived.wait(30)
    cache.clear(["a0", "a1"])
    readers[0].gate.set()
    assert future.result(30) == 4
    assert parked(cache) == {"a2", "a3"}
    assert cache.clear() == 2
    cache.synchronize()
    stats = cache.buffer_stats()
    assert (stats["host_bytes"], stats["num_entries"], stats["total_bytes"]) == (0, 0, 0)
    assert cache._index.report()["host_entries"] == 0


def test_an_overflow_of_the_tier_is_copied_for_a_call_that_joined_it(source: DictSource) -> None:
    cache = TensorCache(CONFIG, device=SimDevice())
    held = on_host(cache, source, "abcdefgh")
    readers = gated(source)
    fetching = in_background(lambda: cache.get_many(["i0"], source, prefer="host"))
    stands(readers, 1)
    joining = in_background(lambda: cache.get_many(["i0"], source))
    wait_for_joins(cache, 1)
    readers[0].gate.set()
    (copied,) = joining.result(30)
    assert is_in("device", cache, [copied])
    assert same_bytes(copied, SHARDS["i0"])
    assert same_bytes(fetching.result(30)[0], SHARDS["i0"])
    assert "i0" not in cache, "a reader has the original, and may have written into it"
    assert (len(readers), len(held)) == (1, 32)


def test_a_shard_that_fails_leaves_the_others_cached(cache: TensorCache, source: DictSource) -> None:
    missing: list[Hashable] = ["nowhere"]
    with pytest.raises(FetchError, match="nowhere is not at node-a:1"):
        cache.get_many([*run_of("a"), *missing], source, prefer="host")
    assert parked(cache) == set(run_of("a"))
    (found, lacking) = cache.get_many(["a0", *missing], source, prefer="host", on_error="none")
    assert (found is not None, lacking) == (True, None)
    del found
    cache.clear()
    cache.synchronize()
    assert cache.buffer_stats()["host_bytes"] == 0


def test_the_tier_works_in_memory_that_cannot_be_pinned(source: DictSource) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    device.refuse("slot", 100)
    got = on_host(cache, source, "a")
    assert cache.buffer_stats()["overflows"] == 4
    assert len(got) == 4
    device.refuse("slot", 0)
    on_host(cache, source, "a")
    assert parked(cache) == set(run_of("a"))


def test_a_storage_that_is_swapped_during_its_copy_keeps_its_bytes(staged: TensorCache, source: DictSource) -> None:
    """As by a queue of torch.multiprocessing: the block dies, and another shard's bytes come to its place."""
    (held,) = staged.get_many(["b1"], source, prefer="host")
    gate = Gate(staged)
    copying = in_background(lambda: staged.get_many(["b1"], source))
    gate.wait()
    held.share_memory_()
    others = staged.get_many(["c1", "d1", "e1"], source, prefer="host")
    gate.open()
    assert same_bytes(copying.result(30)[0], SHARDS["b1"])
    assert same_bytes(held, SHARDS["b1"])
    assert len(others) == 3


def test_a_dead_block_is_not_cached_as_its_successor(
    staged: TensorCache, source: DictSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (held,) = staged.get_many(["b1"], source, prefer="host")
    engine = staged._lazy.open()
    assert engine.tier is not None
    tier, inside, gate = engine.tier.pool, threading.Event(), threading.Event()
    tell = tier._on_dead

    def tell_late(dead: list[object]) -> None:
        if dead:
            inside.set()
            assert gate.wait(30)
        tell(dead)  # type: ignore[arg-type]

    monkeypatch.setattr(tier, "_on_dead", tell_late)
    held.share_memory_()
    del held
    draining = in_background(tier.drain)
    assert inside.wait(30)
    staged.get_many(["c1"], source, prefer="host")
    assert same_bytes(staged.get_many(["b1"], source)[0], SHARDS["b1"])
    gate.set()
    draining.result(30)
    assert same_bytes(staged.get_many(["b1"], source)[0], SHARDS["b1"])


def test_a_shard_that_died_during_its_eviction_is_copied_from_its_new_place(source: DictSource) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    fill(cache, source, "a")
    engine = cache._lazy.open()
    assert engine.tier is not None
    victims = cache._index.candidates()
    cache.get("a1").share_memory_()  # type: ignore[union-attr]
    pool = engine.pool
    taken = pool.take_freed(2048)
    assert taken is not None
    taken.slab.arena.tensor[taken.offset :][:2048].fill_(255)
    refuges = engine.tier.take_in(victims)
    assert all(same_bytes(refuges[key].base, SHARDS[key]) for key in run_of("a"))
    pool.abandon(taken)


def test_a_hit_in_the_tier_waits_for_no_copy(staged: TensorCache, source: DictSource) -> None:
    (held,) = staged.get_many(["b1"], source, prefer="host")
    gate = Gate(staged)
    copying = in_background(lambda: staged.get_many(["b1"], source))
    gate.wait()
    (same,) = staged.get_many(["b1"], source, prefer="host")
    assert same.data_ptr() == held.data_ptr()
    gate.open()
    assert is_in("device", staged, copying.result(30))
    assert parked(staged) == {"b1"}


def test_a_shard_that_landed_in_the_other_tier_is_no_failure(staged: TensorCache, source: DictSource) -> None:
    readers = gated(source)
    fetching = in_background(lambda: staged.get_many(["a0"], source, prefer="host"))
    stands(readers, 1)
    joining = in_background(lambda: staged.get_many(["a0", "nowhere"], source, on_error="none"))
    wait_for_joins(staged, 1)
    readers[0].gate.set()
    found, lacking = joining.result(30)
    assert is_in("device", staged, [found])
    assert same_bytes(found, SHARDS["a0"])
    assert lacking is None
    assert len(fetching.result(30)) == 1


def test_no_call_goes_on_beyond_its_time(staged: TensorCache, source: DictSource) -> None:
    """The shard came to the tier, but no time is left to copy it."""
    readers = gated(source)
    fetching = in_background(lambda: staged.get_many(["a0"], source, prefer="host"))
    stands(readers, 1)
    gate = Gate(staged)
    joining = in_background(lambda: staged.get_many(["a0"], source, timeout_s=0.2))
    wait_for_joins(staged, 1)
    readers[0].gate.set()
    with pytest.raises(FetchError, match=r"not here within 0.2 s \[1 of 1 shards failed: 'a0'"):
        joining.result(30)
    gate.open()
    assert len(fetching.result(30)) == 1


def test_a_prefetch_brings_the_shards_that_fit(staged: TensorCache, source: DictSource) -> None:
    held = on_host(staged, source, "a")
    with pytest.raises(FetchError, match=r"raise host_tier_bytes \(GPU_CACHE_HOST_TIER_BYTES\)") as caught:
        staged.prefetch([key for name in "bcdefghi" for key in run_of(name)], source, prefer="host").result(30)
    assert caught.value.failures.keys() == set(run_of("i"))
    assert isinstance(caught.value.failures["i0"], CacheFullError)
    assert parked(staged) == {key for name in "abcdefgh" for key in run_of(name)}
    assert len(held) == 4


@pytest.mark.parametrize("prefers", ["device", "host"])
def test_a_write_while_it_is_copied_is_seen_by_the_next_call(source: DictSource, prefers: str) -> None:
    device = SimDevice()
    cache = TensorCache(CONFIG, device=device)
    (held,) = cache.get_many(["a1"], source, prefer="host")
    device.adversary.begin()
    assert cache.prefetch(["a1"], source).result(30) == 1
    held.zero_()
    (fresh,) = cache.get_many(["a1"], source, prefer=prefers)  # type: ignore[call-overload]
    device.finish()
    assert device.faults == []
    assert source.asked == [["a1"], ["a1"]]
    assert is_in(prefers, cache, [fresh])
    assert cache._index.report()["host_entries"] == int(prefers == "host")
    assert cache.buffer_stats()["mutations"] == 1


def test_a_written_shard_is_not_copied_back(staged: TensorCache, source: DictSource) -> None:
    """Nor what a prefetch makes of it, which hands nothing out and looks at no versions."""
    (held,) = staged.get_many(["b1"], source, prefer="host")
    held.zero_()
    del held
    assert staged.prefetch(["b1"], source).result(30) == 1
    assert same_bytes(staged.get_many(["b1"], source)[0], SHARDS["b1"])
    assert (parked(staged), staged.buffer_stats()["mutations"]) == (set(), 1)


def test_a_forked_child_may_read_a_held_host_shard(source: DictSource) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    (held,) = cache.get_many(["b1"], source, prefer="host")
    pid = os.fork()
    if pid == 0:
        os._exit(int(not torch.equal(held, SHARDS["b1"])))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_short_call_does_not_give_up_a_put(staged: TensorCache, source: DictSource) -> None:
    gate = Gate(staged)
    putting = in_background(lambda: staged.put("a1", SHARDS["a1"], timeout_s=60))
    gate.wait()
    with pytest.raises(FetchError, match="not here within"):
        staged.get_many(["a1"], source, timeout_s=0.05)
    gate.open()
    assert putting.result(30) is True


def follow(cache: TensorCache, source: DictSource, readers: list[GatedReader]) -> tuple[Future[Any], Future[Any]]:
    """A call that fetches "a0" to the host, and one for the device that waits for it."""
    fetching = in_background(lambda: cache.get_many(["a0"], source, prefer="host"))
    stands(readers, 1)
    following = in_background(lambda: cache.get_many(["a0"], source))
    wait_for_joins(cache, 1)
    return fetching, following


def test_a_call_for_the_device_retries_a_failed_fetch_for_the_host(staged: TensorCache, source: DictSource) -> None:
    def fail() -> None:
        raise FetchError("the connection broke")

    readers = gated(source)
    fetching, following = follow(staged, source, readers)
    readers[0].after_gate = fail
    readers[0].gate.set()
    with pytest.raises(FetchError, match="the connection broke"):
        fetching.result(30)
    stands(readers, 2)
    readers[1].gate.set()
    assert is_in("device", staged, following.result(30))
    assert parked(staged) == set()
    stats = staged.buffer_stats()
    assert (stats["misses"], stats["joined"], stats["host_hits"], stats["fetch_errors"]) == (2, 1, 0, 1)


@pytest.mark.parametrize("ending", ["clear", "clear_node", "scope"])
def test_a_drop_on_request_means_both_levels(staged: TensorCache, source: DictSource, ending: str) -> None:
    readers = gated(source)
    with staged.scope("step") if ending == "scope" else contextlib.nullcontext():
        fetching = staged.prefetch(["a0"], source, prefer="host")
        stands(readers, 1)
        following = in_background(lambda: staged.get_many(["a0"], source))
        wait_for_joins(staged, 1)
        if ending != "scope":
            assert (staged.clear() if ending == "clear" else staged.clear_node(source.node)) == 0
    readers[0].gate.set()
    assert fetching.result(30) == 1
    assert same_bytes(following.result(30)[0], SHARDS["a0"])
    del following
    assert len(staged) == 0
    staged.synchronize()
    stats = staged.buffer_stats()
    assert (stats["host_bytes"], stats["device_bytes"], stats["num_entries"]) == (0, 0, 0)


def test_a_shard_meant_to_stay_stays_so_when_it_rises(staged: TensorCache, source: DictSource) -> None:
    with staged.scope("step"):
        staged.get_many(["a0", "a1"], source, prefer="host", keep=True)
        staged.get_many(["a0"], source)
    assert (parked(staged), set(staged.keys())) == ({"a1"}, {"a0", "a1"})


def test_a_call_that_waits_for_the_host_ends_with_the_cache(staged: TensorCache, source: DictSource) -> None:
    readers = gated(source)
    fetching, following = follow(staged, source, readers)
    closing = in_background(staged.close)
    with pytest.raises((FetchError, CacheClosedError)):
        following.result(30)
    readers[0].gate.set()
    with pytest.raises((FetchError, CacheClosedError)):
        fetching.result(30)
    closing.result(30)
