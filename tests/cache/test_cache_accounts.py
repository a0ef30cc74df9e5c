"""Conservation over a whole cache: each byte of a shard is in an account, and a lost byte is missed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator

import pytest

from gpu_cache import FetchError, TensorCache
from gpu_cache.device.protocol import Arena
from gpu_cache.pool.block import aligned
from tests.support.sim_accounts import Ledger, check_accounts, check_lookups, nbytes_of
from tests.support.sim_device import SimDevice
from tests.support.sim_script import Step
from tests.support.sim_shards import Flight, broken, contents
from tests.support.sim_world import NODE, World
from tests.support.sources import GatedReader

KEY = "shard-6"  # 3,000 bytes
ROOM = aligned(nbytes_of([KEY]))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.begin(Step("get"))  # no stream gets on of its own accord
    yield world
    world.close()


def look(world: World, *, is_over: bool = False) -> tuple[int, int, int]:
    """Check the laws; pending, held and quarantined bytes."""
    check_accounts(world.cache, is_fetching=world.flight is not None, is_over=is_over)
    check_lookups(world.cache, world.ledger)
    assert world.device.faults == []
    assert world.cache._engine is not None
    accounts = world.cache._engine.pool.accounts()
    return accounts["pending"], accounts["held"], accounts["quarantined"]


def stand_still(world: World, keys: list[Hashable]) -> None:
    """Begin to fetch, up to the first read."""
    world.ledger.ask(keys)
    with world.wrapped(GatedReader) as readers:
        future = world.cache.prefetch(keys, world.source)
    world.fly(Flight(future, readers[0], keys, set(keys)))


def test_bytes_are_held_from_the_read_on_then_quarantined_then_free(world: World) -> None:
    assert look(world) == (0, 0, 0)
    stand_still(world, [KEY])
    assert look(world) == (0, ROOM, 0), "its tensor is built already, and leased"
    world.land()
    assert look(world) == (0, ROOM, 0)
    world.get([KEY], "stream", world.streams[1])
    world.read(world.held[0])
    world.cache.clear()
    assert look(world) == (0, ROOM, 0), "a caller holds it"
    world.held.clear()
    world.cache.clear()
    assert look(world) == (0, 0, ROOM), "a kernel reads it"
    world.cache.synchronize()
    assert look(world, is_over=True) == (0, 0, 0)


def test_a_shard_cleared_on_its_way_is_held_until_it_landed(world: World) -> None:
    stand_still(world, [KEY])
    world.cache.clear()
    assert look(world) == (0, ROOM, 0)
    world.land()
    world.cache.synchronize()
    assert look(world, is_over=True) == (0, 0, 0)
    assert world.ledger.arrived_bytes == nbytes_of([KEY]), "it was a miss all the same"


def test_a_broken_fetch_gives_its_ranges_back(world: World) -> None:
    keys: list[Hashable] = [KEY, "shard-9", "shard-8"]
    world.ledger.ask(keys)
    with world.wrapped(lambda reader: broken(reader, 1)):
        future = world.cache.prefetch(keys, world.source)
    with pytest.raises(FetchError, match="the connection broke"), world.ledger.receiving(keys):
        future.result(30)
    world.cache.synchronize()
    pending, held, quarantined = look(world)
    assert (pending, quarantined) == (0, 0)
    assert held == aligned(world.cache.buffer_stats()["total_bytes"]), "the others stay"


def test_each_kind_of_look_up_counts_once_and_with_its_bytes(world: World) -> None:
    world.get([KEY], "host", world.streams[0])
    world.get([KEY], "host", world.streams[0])
    stand_still(world, ["shard-7"])
    joiner = threading.Thread(target=world.cache.get_many, args=(["shard-7"], world.source))
    joiner.start()
    while not world.cache.buffer_stats()["joined"]:
        time.sleep(0.001)
    world.land()
    joiner.join(30)
    stats = world.cache.buffer_stats()
    assert (stats["hits"], stats["misses"], stats["joined"], stats["requested"]) == (1, 2, 1, 4)
    nbytes = {"hit_bytes": 3000, "miss_bytes": 3000 + 4096, "joined_bytes": 4096, "requested_bytes": 2 * (3000 + 4096)}
    assert {name: stats[name] for name in nbytes} == nbytes  # type: ignore[literal-required]


def test_a_shard_without_room_is_counted_and_held_outside_the_pool(world: World) -> None:
    big = [key for key, tensor in contents().items() if tensor.numel() >= 8000]
    for key in big:
        world.get([key], "host", world.streams[0])
        look(world)
    stats = world.cache.buffer_stats()
    assert stats["overflows"] > 0
    assert stats["device_reserved_bytes"] > stats["device_capacity_bytes"]
    world.held.clear()
    world.cache.clear()
    world.cache.synchronize()
    look(world, is_over=True)
    assert world.cache.buffer_stats()["device_reserved_bytes"] <= stats["device_capacity_bytes"]


def test_memory_that_the_device_refuses_is_in_no_account(world: World) -> None:
    world.device.refuse("arena", 1000)
    assert not world.get([KEY], "host", world.streams[0])
    assert look(world, is_over=True) == (0, 0, 0)
    world.device.refuse("arena", 0)
    assert world.get([KEY], "host", world.streams[0])
    assert look(world) == (0, ROOM, 0)
    assert world.cache.clear_node(NODE) == 1


def test_a_close_that_the_device_fails_is_finished_by_the_reaper(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.get([KEY], "host", world.streams[0])
    world.held.clear()
    assert world.cache._engine is not None
    world.cache._engine.reaper._period_s = 0.001
    failing = [RuntimeError("an error of earlier work")]

    def release(arena: Arena) -> None:
        if failing:
            raise failing.pop()
        SimDevice.release_arena(world.device, arena)

    monkeypatch.setattr(world.device, "release_arena", release)
    with pytest.raises(RuntimeError, match="an error of earlier work"):
        world.cache.close()
    thread = world.cache._engine.reaper._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()


def _lose_a_byte(cache: TensorCache) -> None:
    cache._engine.pool._held_bytes -= 1


def _free_what_is_held(cache: TensorCache) -> None:
    pool = cache._engine.pool
    pool._slabs[0].free.give(0, 512)
    pool._held_bytes -= 512


def _forget_a_lease(cache: TensorCache) -> None:
    cache._engine.pool._slabs[0].leases.clear()


def _leak_an_arena(cache: TensorCache) -> None:
    cache._engine.device.arena(512)


def _grow_too_far(cache: TensorCache) -> None:
    cache._engine.pool.capacity = 512


def _leave_pending(cache: TensorCache) -> None:
    assert cache._engine.pool.take(512)


def _leave_claimed(cache: TensorCache) -> None:
    assert cache._index.reserve("nobody's")


def _keep_a_slot(cache: TensorCache) -> None:
    cache._engine.staging.acquire(1.0)


def _count_a_hit(cache: TensorCache) -> None:
    cache._index._ledger.counters.hits += 1


def _count_its_bytes(cache: TensorCache) -> None:
    cache._index._ledger.counters.hit_bytes += 1


def _miss_its_bytes(cache: TensorCache) -> None:
    cache._index._ledger.counters.miss_bytes -= 1


def _forget_what_is_cached(cache: TensorCache) -> None:
    cache._index._ledger.ready_bytes -= 1


@pytest.mark.parametrize(
    "cook",
    [_lose_a_byte, _free_what_is_held, _forget_a_lease, _leak_an_arena, _grow_too_far, _leave_pending, _leave_claimed,
     _keep_a_slot, _count_a_hit, _count_its_bytes, _miss_its_bytes, _forget_what_is_cached],
)  # fmt: skip
def test_false_accounts_are_seen(world: World, cook: Callable[[TensorCache], None]) -> None:
    world.get([KEY], "host", world.streams[0])
    look(world)
    cook(world.cache)
    with pytest.raises(AssertionError, match="accounts do not add up"):
        look(world)


def test_a_ledger_counts_shards_that_came() -> None:
    ledger = Ledger()
    ledger.ask(["shard-0", "shard-3"])
    with ledger.receiving(["shard-0", "shard-3"]):
        pass
    assert (ledger.requested, ledger.arrived_bytes) == (2, 512 + 100)
