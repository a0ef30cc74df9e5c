"""Calls that are late, caches closed or dropped and processes forked while bytes still arrive: none go astray."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from gpu_cache import CacheClosedError, FetchError, cache
from gpu_cache.device.host import HostDevice
from gpu_cache.transfer import transfer
from tests.cache.test_process import run_python
from tests.support.interleave_actors import PATIENCE_S, in_background
from tests.support.interleave_stage import CONFIG, GATES, SHARDS, Stage, eventually, late_call
from tests.support.sources import DictSource, same_bytes

pytestmark = pytest.mark.usefixtures("quick_collections")

ONE_SHARD = dataclasses.replace(CONFIG, pool_bytes=32 << 10, slab_bytes=32 << 10)
ROOMY = dataclasses.replace(CONFIG, pool_bytes=256 << 10)


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_DIRECT_SLOTS", 4)


@pytest.fixture(params=["direct", "staged"])
def device(request: pytest.FixtureRequest) -> HostDevice:
    return HostDevice(stages=request.param == "staged")


def is_in_pool(stage: Stage, tensor: torch.Tensor) -> bool:
    """Whether it lies in the one slab of the pool, not in torch's own memory."""
    assert stage.cache._engine is not None
    (slab,) = stage.cache._engine.pool._slabs
    return 0 <= tensor.data_ptr() - slab.arena.tensor.data_ptr() < slab.nbytes


# Late calls.


@pytest.fixture
def time_is_up() -> Iterator[threading.Event]:
    with late_call() as is_up:
        yield is_up


@pytest.mark.parametrize("gate", GATES[1:])
def test_the_range_of_a_late_call_stays_taken_until_its_read_has_returned(
    device: HostDevice, gate: str, time_is_up: threading.Event
) -> None:
    stage, other = Stage(device, ONE_SHARD), DictSource(SHARDS)
    late = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at(gate)
    time_is_up.set()
    assert "not here within 60 s" in str(late.exception(PATIENCE_S))
    during = stage.cache.get_many(["b"], other)[0]
    assert not is_in_pool(stage, during), "the only range is still being received into"
    assert stage.cache.buffer_stats()["overflows"] == 1
    with pytest.raises(FetchError, match="need 30,208 bytes"):
        stage.cache.prefetch(["c"], other).result(PATIENCE_S)
    reader.release(1000)
    eventually(lambda: not stage.cache._tasks)
    assert "a" not in stage.cache
    after = stage.cache.get_many(["c"], other)[0]
    assert is_in_pool(stage, after)
    assert same_bytes(during, SHARDS["b"])
    assert same_bytes(after, SHARDS["c"])
    del during, after, late
    stage.check_nothing_lost()


def test_the_slot_of_a_late_call_stays_taken_until_its_read_has_returned(time_is_up: threading.Event) -> None:
    stage = Stage(HostDevice(stages=True), dataclasses.replace(CONFIG, staging_slots=1))
    late = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at("before a read")
    time_is_up.set()
    assert isinstance(late.exception(PATIENCE_S), FetchError)
    with pytest.raises(FetchError, match=r"no staging buffer came free|not here within"):
        stage.cache.get_many(["b"], DictSource(SHARDS), timeout_s=0.05)
    reader.release(1000)
    assert same_bytes(stage.cache.get_many(["b"], DictSource(SHARDS))[0], SHARDS["b"])
    stage.check_nothing_lost()


@pytest.mark.parametrize("gate", GATES)
def test_a_late_call_keeps_arrived_shards_and_gives_up_the_rest(
    device: HostDevice, gate: str, time_is_up: threading.Event
) -> None:
    stage = Stage(device, ROOMY)
    late = in_background(lambda: stage.cache.get_many(["a", "b", "c", "d"], stage.source))
    stage.at("before a read").release(2)  # "a" lands
    stage.at(gate)  # of "b", or of the second part, which is "d"
    time_is_up.set()
    error = late.exception(PATIENCE_S)
    assert isinstance(error, FetchError)
    assert set(error.failures) == ({"d"} if gate == "before specs" else {"b", "c", "d"})
    assert set(stage.cache.keys()) == {"a", "b", "c", "d"} - set(error.failures)
    stage.open_gates()
    eventually(lambda: not stage.cache._tasks)
    assert set(stage.cache.keys()) == {"a", "b", "c", "d"} - set(error.failures), "what is late is not cached"
    del error, late
    stage.check_nothing_lost()


def test_a_joiner_gives_up_and_the_fetch_goes_on(device: HostDevice) -> None:
    stage = Stage(device)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at("before a read")
    with pytest.raises(FetchError, match="'a'"):
        stage.cache.get_many(["a"], stage.source, timeout_s=0.02)
    stage.open_gates()
    assert same_bytes(first.result(PATIENCE_S)[0], SHARDS["a"])
    assert stage.cache.keys() == ["a"]
    del first
    stage.check_nothing_lost()


# Caches that end.


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "deaf"])
@pytest.mark.parametrize("gate", GATES)
def test_closing_ends_every_call_and_takes_no_range_from_under_a_read(
    device: HostDevice, gate: str, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_CLOSE_WAIT_S", PATIENCE_S if is_cut else 0.02)
    stage = Stage(device)
    calls = [in_background(lambda: stage.cache.get_many(["a"], stage.source))]
    reader = stage.at(gate)
    calls.append(in_background(lambda: stage.cache.get_many(["a", "b"], DictSource(SHARDS))))
    calls.append(stage.cache.prefetch(["a"], stage.source))
    eventually(lambda: stage.cache.buffer_stats()["joined"] == 2 and "b" in stage.cache)
    if is_cut:
        monkeypatch.setattr(reader, "cancel", lambda: reader.break_off(ConnectionAbortedError()))
    stage.cache.close()
    assert stage.cache._engine is not None
    pool = stage.cache._engine.pool
    if not is_cut:
        assert calls[1].exception(PATIENCE_S) is not None, "close waits for no deaf reader"
        assert (pool.accounts()["held"] > 0) == (gate != "before specs")
        reader.release(1000)
    assert all(isinstance(call.exception(PATIENCE_S), CacheClosedError) for call in calls)
    assert len(stage.source.readers) == 1
    eventually(lambda: not stage.cache._tasks)
    calls.clear()
    gc.collect()
    eventually(lambda: not any(pool.accounts().values()))
    eventually(lambda: stage.cache.buffer_stats()["pinned_capacity_bytes"] == 0)


@pytest.mark.parametrize("gate", GATES)
def test_a_cache_that_is_dropped_during_a_prefetch_gives_everything_back(device: HostDevice, gate: str) -> None:
    stage = Stage(device)
    future = stage.cache.prefetch(["a", "b"], stage.source)
    reader = stage.at(gate)
    engine, gone = stage.cache._engine, weakref.ref(stage.cache)
    assert engine is not None
    del stage.cache
    gc.collect()
    assert gone() is None, "a fetch under way does not keep its cache"
    eventually(lambda: gate != "before specs" or not engine.reaper._thread.is_alive())
    reader.release(1000)
    assert isinstance(future.exception(PATIENCE_S), CacheClosedError | None)
    eventually(lambda: not any(engine.pool.accounts().values()))
    eventually(lambda: engine.staging is None or engine.staging.stats()["pinned_capacity_bytes"] == 0)


# Processes that fork.

FORK = """
import gc, os, sys, threading, torch
from gpu_cache import CacheClosedError
from gpu_cache.device.host import HostDevice
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import GATES, SHARDS, Stage
from tests.support.sources import DictSource, same_bytes

gc.freeze()  # collections are quick then

def refuses(call):
    try:
        call()
    except CacheClosedError:
        return True

def in_child(stage, kept):
    cache = stage.cache
    calls = [lambda: cache.get("d"), lambda: cache.get_many(["a"], stage.source), lambda: cache.put("x", kept)]
    print("child", *map(refuses, calls), cache.clear(), cache.clear_node("node:1"), bool(cache.trim()), end=" ")
    cache.synchronize(), cache.close(), repr(cache)

def fork(stages, gate):
    stage = Stage(HostDevice(stages))
    cache = stage.cache
    cache.put("d", SHARDS["d"])
    kept = cache.get("d")
    first = in_background(lambda: cache.get_many(["a"], stage.source))
    stage.at(gate)
    second = in_background(lambda: cache.get_many(["a"], stage.source))
    while not cache.buffer_stats()["joined"]:
        pass
    engine = cache._engine
    locks = [cache._index._lock, engine.pool._lock, engine.reaper._lock, cache._lazy._lock]
    locks += [engine.staging._lock] if stages else []
    for lock in locks:
        lock.acquire()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        in_child(stage, kept)
        fresh = Stage(HostDevice(stages))
        got = fresh.cache.get_many(["a", "d"], DictSource(SHARDS))
        print(*(same_bytes(*pair) for pair in zip([*got, kept], [SHARDS["a"], SHARDS["d"], SHARDS["d"]])))
        del got, kept, cache, first, second, stage, engine, locks, lock
        gc.collect()
        fresh.check_nothing_lost()
        sys.exit()
    for lock in locks:
        lock.release()
    status = os.waitpid(child, 0)[1]
    stage.open_gates()
    (mine,), (yours,) = first.result(30), second.result(30)
    is_right = same_bytes(mine, SHARDS["a"]) and same_bytes(kept, SHARDS["d"])
    print("parent", status, mine.data_ptr() == yours.data_ptr(), is_right)
    del mine, yours, first, second, kept
    stage.check_nothing_lost()

for stages in (False, True):
    for gate in GATES:
        fork(stages, gate)
"""


def test_a_fork_during_a_fetch_with_every_lock_held_leaves_parent_and_child_in_order() -> None:
    once = "child True True True 0 0 False True True True\nparent 0 True True\n"
    assert run_python(FORK) == once * 2 * len(GATES)
