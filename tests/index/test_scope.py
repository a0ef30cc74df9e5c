"""Scopes: their end drops shards fetched inside, and no others."""

from __future__ import annotations

import contextvars
import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gpu_cache import FetchError, Scope, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor, clear_fetch_buffer, fetch_buffer_stats, scope
from gpu_cache.rpc.server import main as rpc_server
from tests.support.areal_fixtures import remote
from tests.support.fake_owner import FakeOwner
from tests.support.scoped import CONFIG, SOURCE, device_bytes, fetch, fetch_and_fail, names
from tests.support.sources import DictSource, gated


def test_the_end_of_a_scope_drops_shards_fetched_inside(cache: TensorCache) -> None:
    fetch(cache, "a")
    with cache.scope("step 17") as step:
        assert repr(step) == "Scope('step 17', 0 shards, 0 bytes)"
        fetch(cache, "abc")
        cache.prefetch(["d", "b"], SOURCE).result(30)
        assert cache.put("p", torch.ones(4))
        assert cache.get("a") is not None
        assert (step.num_shards, step.nbytes, names(step.keys())) == (4, 3 * 800 + 16, "bcdp")
        assert repr(step) == "Scope('step 17', 4 shards, 2,416 bytes)"
    assert names(cache.keys()) == "a", "it was cached before"
    assert (step.num_shards, step.nbytes, step.keys(), step.is_over) == (0, 0, [], True)
    assert repr(step) == "Scope('step 17', over)"
    stats = cache.buffer_stats()
    assert (stats["cleared"], stats["cleared_bytes"]) == (4, 2416)
    cache.clear()
    assert device_bytes(cache) == 0


def test_a_body_that_raises_ends_the_scope_too(cache: TensorCache) -> None:
    with pytest.raises(ZeroDivisionError), cache.scope("step"):
        fetch_and_fail(cache)
    assert len(cache) == 0
    with pytest.raises(FetchError), cache.scope("step"):
        fetch(cache, "abx")
    assert len(cache) == 0
    assert device_bytes(cache) == 0


def test_tensors_stay_valid_while_held(cache: TensorCache) -> None:
    with cache.scope("step"):
        kept = fetch(cache, "ab")[1]
    fetch(cache, "cdefgh")
    assert kept.tolist() == [1] * 100
    cache.clear()
    assert device_bytes(cache) > 0
    del kept
    assert device_bytes(cache) == 0


def test_kept_shards_outlive_the_scope(plain: TensorCache) -> None:
    with plain.scope("step") as step:
        fetch(plain, "a", keep=True)
        plain.prefetch(["b"], SOURCE, keep=True).result(30)
        fetch(plain, "cd")
        fetch(plain, "c", keep=True)  # found out later
        assert names(step.keys()) == "d"
    assert names(plain.keys()) == "abc"


def test_scopes_nest(plain: TensorCache) -> None:
    with plain.scope("outer") as outer:
        fetch(plain, "ab")
        with plain.scope("inner") as inner:
            fetch(plain, "bc")
            assert (names(outer.keys()), names(inner.keys())) == ("ab", "c")
        assert names(plain.keys()) == "ab", "b was a hit inside"
        with plain.scope("another"):
            fetch(plain, "cd")
            plain.clear(["a"])
            fetch(plain, "a")
        assert names(plain.keys()) == "b", "a was fetched again inside"
    assert len(plain) == 0


def test_shards_that_another_call_fetched_meanwhile_stay(plain: TensorCache) -> None:
    with plain.scope("step"):
        fetch(plain, "ab")
        plain.clear(["a"])
        contextvars.Context().run(fetch, plain, "a")
    assert names(plain.keys()) == "a"


def test_a_scope_is_of_one_cache(plain: TensorCache) -> None:
    other = TensorCache(CONFIG, device=HostDevice())
    with plain.scope("step"):
        fetch(plain, "a")
        with other.scope("of the other"):
            fetch(plain, "b")
            fetch(other, "a")
        assert (names(plain.keys()), len(other)) == ("ab", 0)
        fetch(other, "c")
    assert (len(plain), names(other.keys())) == (0, "c")


@pytest.mark.parametrize("waits", [False, True], ids=["no waiter", "a waiter"])
def test_a_prefetch_under_way_is_not_cached_when_it_lands(cache: TensorCache, waits: bool) -> None:
    source = DictSource(SOURCE.tensors)
    readers = gated(source)
    with ThreadPoolExecutor(1) as pool:
        with cache.scope("step") as step:
            future = cache.prefetch(["a", "b"], source)
            assert readers[0].has_arrived.wait(30)
            waiting = pool.submit(cache.get_many, ["a"], source) if waits else None
            while waits and cache.buffer_stats()["joined"] < 1:
                threading.Event().wait(0.001)
            assert (step.num_shards, step.keys()) == (0, [])
        readers[0].gate.set()
        assert future.result(30) == 2
        if waiting is not None:
            assert waiting.result(30)[0].tolist() == [0] * 100
            waiting = None
    assert len(cache) == 0
    assert device_bytes(cache) == 0


def test_a_scope_is_entered_once(plain: TensorCache) -> None:
    step = plain.scope("step")
    assert (repr(step), step.is_over, step.keys()) == ("Scope('step', not entered)", False, [])
    with step, pytest.raises(RuntimeError, match="was entered before"):
        step.__enter__()
    with pytest.raises(RuntimeError, match="Scope\\('step', over\\) was entered before"):
        step.__enter__()
    assert isinstance(step, Scope)


def test_evicted_and_overflowing_shards_are_no_trouble(cache: TensorCache) -> None:
    tensors = {number: torch.full((1 << 17,), number) for number in range(16)}  # 16 MiB through 8
    source = DictSource(tensors)
    with cache.scope("step") as step:
        for number in tensors:
            assert cache.get_many([number], source)[0][0] == number
        held = cache.get_many(list(tensors), source)
        assert 0 < step.num_shards < 16
        assert step.nbytes <= 8 << 20
    assert len(cache) == 0
    assert [int(tensor[-1]) for tensor in held] == list(range(16))
    held.clear()
    assert device_bytes(cache) == 0


def test_a_cache_that_is_closed_inside_ends_well(plain: TensorCache) -> None:
    with plain.scope("step") as step:
        fetch(plain, "a")
        plain.close()
        assert step.num_shards == 0
    assert step.is_over


def test_a_scope_keeps_no_cache_and_no_shard_alive(plain: TensorCache) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    dead = weakref.ref(cache)
    with cache.scope("step") as step:
        fetch(cache, "a")
    del cache, step
    gc.collect()
    assert dead() is None


def test_a_scope_around_many_steps_remembers_only_cached_shards(plain: TensorCache) -> None:
    with plain.scope("training") as training:
        fetch(plain, "ab")
        for step in range(60):
            tensors = {(step, number): torch.ones(1) for number in range(200)}
            plain.get_many(list(tensors), DictSource(tensors))
            plain.clear(tensors)
        assert training._holding is not None
        assert len(training._holding.keys) <= 4096
        assert names(training.keys()) == "ab"
    assert len(plain) == 0


def test_ends_of_inner_scopes_make_no_leak_of_the_outer_ones_shards(plain: TensorCache) -> None:
    with plain.scope("step"):
        fetch(plain, "a")
        for name in "bcde":
            with plain.scope("micro-batch"):
                fetch(plain, name)
        assert plain.buffer_stats()["outlived_entries"] == 0
    assert plain.buffer_stats()["clears"] == 1
    fetch(plain, "a")
    for name in "bc":
        with plain.scope("step"):
            fetch(plain, name)
    assert plain.buffer_stats()["outlived_entries"] == 1, "of a, which no scope holds"


def test_a_written_shard_belongs_to_the_scope_that_fetched_it_again(plain: TensorCache) -> None:
    """It is an ordinary miss there, as an evicted one is."""
    with plain.scope("outer") as outer:
        written, other = fetch(plain, "ac")
        with plain.scope("inner") as inner:
            written.add_(1)
            assert fetch(plain, "ab")[0].eq(0).all()
            assert (names(inner.keys()), names(outer.keys())) == ("ab", "c")
        assert names(plain.keys()) == "c"
        other.add_(1)
        fetch(plain, "c")
        assert names(outer.keys()) == "c"
    assert names(plain.keys()) == ""


def test_shards_in_the_host_tier_go_too() -> None:
    cache = TensorCache(dataclasses.replace(CONFIG, host_tier_bytes=1 << 20), device=HostDevice(stages=True))
    with cache.scope("step") as held:
        fetch(cache, "ab")
        cache.offload()
        assert cache._index.below is not None
        assert cache._index.below.has("a")
        assert held.num_shards == 2
    assert len(cache) == 0
    cache.synchronize()
    assert cache.buffer_stats()["host_bytes"] == 0


def test_a_scope_of_handles_evicts_here_and_leaves_the_owner_alone() -> None:
    owner = FakeOwner()
    owner.store.update({"a": torch.ones(3), "b": torch.ones(3), "w": torch.ones(3)})
    with rpc_server.start(owner=owner) as server:
        handles = {name: remote(server.address, name, torch.ones(3)) for name in "abw"}
        weights = handles.pop("w").to_local()
        with scope("step 17") as step:
            RTensor.prefetch(handles).result(30)
            RTensor.localize(handles)
            assert (step.num_shards, step.nbytes) == (2, 24)
        assert fetch_buffer_stats() == {"num_entries": 1}
        assert len(owner.store) == 3
        assert clear_fetch_buffer() == 1
        assert torch.equal(weights, handles["a"].data)
        with scope("before"):
            runtime.configure(device="cpu")
            remote(server.address, "a", torch.ones(3)).to_local()
        assert fetch_buffer_stats() == {"num_entries": 1}, "of the new cache"
