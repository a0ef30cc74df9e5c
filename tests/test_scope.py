"""Scopes: what is fetched inside goes at the end, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import threading
import weakref
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from areal.infra.rpc import rpc_server, runtime
from areal.infra.rpc.rtensor import RTensor, clear_fetch_buffer, fetch_buffer_stats, scope
from gpu_cache import CacheConfig, FetchError, Scope, TensorCache
from gpu_cache.device import HostDevice
from tests.support.areal_fixtures import remote
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_owner import FakeOwner
from tests.support.sources import DictSource, gated, some_tensors
from tests.support.threads import run_threads

CONFIG = CacheConfig(
    slab_bytes="2MiB", pool_bytes="8MiB", prealloc_bytes=0, staging_slots=2, staging_slot_bytes="256KiB",
    run_bytes="64KiB",
)  # fmt: skip
SOURCE = DictSource({name: torch.full((100,), number) for number, name in enumerate("abcdefgh")})  # of 800 bytes


@pytest.fixture(params=["staged host", "fake cuda"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TensorCache]:
    if request.param == "fake cuda":
        device = cuda_device(FakeCuda(), tmp_path)
        cache = TensorCache(CONFIG, device=device)
        yield cache
        cache.close()
        device.fence_streams()
        assert not device._cuda.violations
    else:
        yield TensorCache(CONFIG, device=HostDevice(stages=True))


@pytest.fixture
def plain() -> TensorCache:
    """Where the device makes no difference."""
    return TensorCache(CONFIG, device=HostDevice())


def fetch(cache: TensorCache, keys: str, *, keep: bool = False) -> list[torch.Tensor]:
    return cache.get_many(list(keys), SOURCE, keep=keep)


def fetch_and_fail(cache: TensorCache) -> None:
    fetch(cache, "ab")
    raise ZeroDivisionError


def names(keys: list[Hashable]) -> str:
    return "".join(sorted(map(str, keys)))


def device_bytes(cache: TensorCache) -> int:
    cache.synchronize()
    return cache.buffer_stats()["device_bytes"]


def test_what_is_fetched_inside_goes_at_the_end(cache: TensorCache) -> None:
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


def test_it_goes_when_the_body_raises_too(cache: TensorCache) -> None:
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


def test_what_is_to_be_kept_is_kept(plain: TensorCache) -> None:
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
        assert names(plain.keys()) == "b", "a was fetched anew inside"
    assert len(plain) == 0


def test_what_somebody_else_fetched_meanwhile_stays(plain: TensorCache) -> None:
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


@pytest.mark.parametrize("waits", [False, True], ids=["nobody waits", "somebody waits"])
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


def test_tasks_inherit_it_and_threads_need_the_context(plain: TensorCache) -> None:
    async def scenario() -> None:
        with plain.scope("step") as step:
            await asyncio.gather(*(asyncio.to_thread(fetch, plain, name) for name in "abc"))
            await asyncio.create_task(asyncio.to_thread(fetch, plain, "d"))
            thread = threading.Thread(target=fetch, args=(plain, "e"))
            thread.start()
            thread.join()
            thread = threading.Thread(target=contextvars.copy_context().run, args=(fetch, plain, "f"))
            thread.start()
            thread.join()
            assert names(step.keys()) == "abcdf"

    asyncio.run(scenario())
    assert names(plain.keys()) == "e"


def test_tasks_side_by_side_have_scopes_of_their_own(plain: TensorCache) -> None:
    async def step(name: str, others: asyncio.Barrier) -> None:
        with plain.scope(name) as own:
            fetch(plain, name)
            await others.wait()
            assert own.keys() == [name]
            if name != "a":
                await asyncio.sleep(0)
        assert name not in plain

    async def scenario() -> None:
        await asyncio.gather(*(step(name, barrier) for barrier in [asyncio.Barrier(3)] for name in "abc"))

    asyncio.run(scenario())
    assert len(plain) == 0


def test_a_task_that_outlives_it_fetches_for_whoever_is_around(plain: TensorCache) -> None:
    async def late(may_go: asyncio.Event, keys: str) -> None:
        await may_go.wait()
        fetch(plain, keys)
        with plain.scope("of its own"):
            fetch(plain, "h")

    async def scenario() -> None:
        may_go = asyncio.Event()
        with plain.scope("outer"):
            with plain.scope("inner"):
                task = asyncio.create_task(late(may_go, "a"))
                last = asyncio.create_task(late(is_over := asyncio.Event(), "b"))
            may_go.set()
            await task
            assert names(plain.keys()) == "a"
        assert len(plain) == 0, "the outer one had it"
        is_over.set()
        await last
        assert names(plain.keys()) == "b", "there was no scope any more"

    asyncio.run(scenario())


def test_a_task_that_goes_on_and_on_keeps_no_scopes_that_are_over(plain: TensorCache) -> None:
    async def late() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            with plain.scope("inner") as inner:
                assert inner._holding is not None
                assert inner._holding.outer is None

    async def scenario() -> None:
        with plain.scope("outer"):
            task = asyncio.create_task(late())
        await task

    asyncio.run(scenario())


def test_one_that_is_left_in_another_context_frees_all_the_same(plain: TensorCache) -> None:
    stack = contextlib.ExitStack()

    def enter() -> None:
        stack.enter_context(plain.scope("step"))
        fetch(plain, "ab")

    contextvars.copy_context().run(enter)
    stack.close()
    assert len(plain) == 0
    fetch(plain, "a")
    assert names(plain.keys()) == "a"


def test_one_can_be_entered_once(plain: TensorCache) -> None:
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


def test_it_keeps_no_cache_and_no_shard_alive(plain: TensorCache) -> None:
    cache = TensorCache(CONFIG, device=HostDevice())
    dead = weakref.ref(cache)
    with cache.scope("step") as step:
        fetch(cache, "a")
    del cache, step
    gc.collect()
    assert dead() is None


def test_around_many_steps_it_remembers_only_what_is_cached(plain: TensorCache) -> None:
    with plain.scope("training") as training:
        fetch(plain, "ab")
        for step in range(60):
            tensors = {(step, number): torch.ones(1) for number in range(200)}
            plain.get_many(list(tensors), DictSource(tensors))
            plain.clear(tensors)
        assert training._holding is not None
        assert len(training._holding.generations) <= 4096
        assert names(training.keys()) == "ab"
    assert len(plain) == 0


def test_ends_of_inner_scopes_make_no_leak_of_what_the_outer_one_holds(plain: TensorCache) -> None:
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


def test_threads_in_scopes_of_their_own_leave_nothing(plain: TensorCache) -> None:
    tensors = some_tensors(64)
    source, keys = DictSource(tensors), list(tensors)

    def steps(first: int) -> None:
        for number in range(25):
            with plain.scope(f"{first} {number}"):
                begin = (first * 7 + number * 5) % 40
                future = plain.prefetch(keys[begin + 8 : begin + 24], source)
                plain.get_many(keys[begin : begin + 16], source)
                if number % 2:
                    future.result(30)

    run_threads([lambda first=first: steps(first) for first in range(6)])
    while plain._tasks:
        threading.Event().wait(0.001)
    assert len(plain) == 0
    assert device_bytes(plain) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_leaves_it_without_its_parents_locks(plain: TensorCache) -> None:
    with plain.scope("step") as step:
        fetch(plain, "a")
        stack = contextlib.ExitStack()
        stack.push(step)
        with plain._index._lock:  # as a thread may hold it when another forks
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                stack.close()
                os._exit(step.num_shards + 7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert step.num_shards == 1


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
