"""Leased tensors die, by garbage collection, inside every critical section: no deadlock, no byte lost."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_cache import CacheClosedError, CacheConfig, CacheFullError, FetchError, TensorCache, process, reaper
from gpu_cache.device import private_pools as cuda_pools
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena, Device
from gpu_cache.index import index
from gpu_cache.pool import slab
from gpu_cache.report import publish
from gpu_cache.transfer import engine, inflight, staging, transfer
from gpu_cache.transfer.inflight import Turn
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.interleave_actors import in_background
from tests.support.interleave_garbage import CollectingLock, Garbage, Place, critical_sections
from tests.support.interleave_stage import Stage, eventually
from tests.support.sim_device import SimDevice
from tests.support.sources import DictSource, GatedReader, gated, same_bytes
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("quick_collections")

DEADLOCK_S = 60.0
CONFIG = CacheConfig(
    slab_bytes="32KiB", pool_bytes="128KiB", prealloc_bytes="32KiB", run_bytes="4KiB", staging_slots=2,
    staging_slot_bytes="8KiB", host_tier_bytes="64KiB",
)  # fmt: skip
SHARDS: dict[Hashable, torch.Tensor] = {
    f"s{n}": torch.full((100 * (n % 9) + 1,), n, dtype=torch.uint8) for n in range(60)
}
LARGE: dict[Hashable, torch.Tensor] = {f"l{n}": torch.full((20_000,), n + 100, dtype=torch.uint8) for n in range(12)}
SMALL: dict[Hashable, torch.Tensor] = {f"stock-{n}": torch.full((8,), n % 256, dtype=torch.uint8) for n in range(20)}
ALL = SHARDS | LARGE | SMALL
SPARE: dict[Hashable, torch.Tensor] = {f"spare-{n}": torch.full((8,), n % 256, dtype=torch.uint8) for n in range(800)}
STAGING, CUDA_POOLS = "gpu_cache/transfer/staging.py", "gpu_cache/device/private_pools.py"


class Workload:
    """Everything that a cache can do, with tensors in stock that die meanwhile.

    Args:
        cache: Whose locks collect garbage.
        donor: Another one, whose locks do not; has tensors to die when the first has none.
        garbage: What is collected.
    """

    def __init__(self, cache: TensorCache, donor: TensorCache, garbage: Garbage) -> None:
        self._cache, self._donor, self._garbage = cache, donor, garbage
        self._source = DictSource(ALL)
        self._stock_up_elsewhere()

    def run(self) -> None:
        for step in (
            self._fetch,
            self._join,
            self._put,
            self._fail,
            self._wait,
            self._wait_for_staging,
            self._find_slots_busy,
            self._overflow,
            self._clear,
            self._look,
        ):
            self.stock_up()
            step()

    def stock_up(self) -> None:
        """Have tensors of both caches to die."""
        self._stock_up_elsewhere()
        self._garbage.stock += self._cache.get_many(list(SMALL), self._source)
        self._cache.clear(SMALL)

    def _stock_up_elsewhere(self) -> None:
        self._garbage.stock[:] = self._donor.get_many(list(SPARE), DictSource(SPARE))
        self._donor.clear()

    def _fetch(self) -> None:
        for _ in range(2):
            tensors = self._cache.get_many(list(SHARDS), self._source)
            assert all(map(same_bytes, tensors, SHARDS.values()))
        self._cache.prefetch(["l0", "l1"], self._source).result(DEADLOCK_S)

    def _join(self) -> None:
        readers = gated(self._source)
        future = self._cache.prefetch(["l2"], self._source)
        waiting = in_background(lambda: self._cache.get_many(["l2"], self._source))
        eventually(lambda: readers[0].has_arrived.is_set() and self._cache._index._entries["l2"].flight.num_joined)
        self._source.wrap = lambda reader: reader
        readers[0].gate.set()
        assert future.result(DEADLOCK_S) == 1
        assert same_bytes(waiting.result(DEADLOCK_S)[0], LARGE["l2"])

    def _put(self) -> None:
        self._cache.clear(["l3"])
        assert self._cache.put("l3", LARGE["l3"])
        assert not self._cache.put("l3", LARGE["l3"])
        found = self._cache.get("l3")
        assert found is not None
        assert same_bytes(found, LARGE["l3"])

    def _fail(self) -> None:
        """A shard that the source lacks, and a connection that breaks with its range placed."""
        with pytest.raises(FetchError):
            self._cache.get_many(["s1", "nowhere"], self._source)
        self._cache.clear(["l4", "l5"])

        def broken(reader: Any) -> GatedReader:
            failing = GatedReader(reader)
            failing.gate.set()
            failing.after_gate = lambda: (_ for _ in ()).throw(ConnectionResetError())
            return failing

        self._source.wrap = broken
        with pytest.raises(FetchError):
            self._cache.get_many(["l4", "l5"], self._source)  # the second has its range already
        self._source.wrap = lambda reader: reader

    def _wait(self) -> None:
        """For a turn that another reader holds, until it is looked at."""
        assert self._cache._engine is not None
        budget, turn = self._cache._engine.transfer.inflight, Turn("other:1")
        with budget.granted(budget.limit_bytes, turn, time.monotonic() + DEADLOCK_S):
            waiting = in_background(lambda: self._cache.get_many(["l6"], self._source))
            eventually(lambda: len(budget._stalls._marks))
        waiting.result(DEADLOCK_S)

    def _wait_for_staging(self) -> None:
        """For a staging buffer that another reader holds, until it is looked at."""
        assert self._cache._engine is not None
        if (ring := self._cache._engine.staging) is None:
            return
        slots = [ring.acquire(DEADLOCK_S, Turn("other:1")) for _ in range(CONFIG.staging_slots)]
        waiting = in_background(lambda: self._cache.get_many(["l7"], self._source))
        eventually(lambda: len(ring._stalls._marks))
        for slot in slots:
            ring.release(slot)
        waiting.result(DEADLOCK_S)

    def _find_slots_busy(self) -> None:
        """Every copy is still under way: as if the device were late."""
        assert self._cache._engine is not None
        device, stream = self._cache._engine.device, self._cache._engine.transfer.stream
        if (ring := self._cache._engine.staging) is None:
            return
        slot = ring.acquire(DEADLOCK_S)
        slot.guard = device.record(stream, timing=True)
        ring.release(slot)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(device, "query", lambda event: False)
            ring.release(ring.acquire(DEADLOCK_S))

    def _overflow(self) -> None:
        """More than the pool has room for, first held and then not."""
        held = self._cache.get_many(list(LARGE), self._source)
        assert all(map(same_bytes, held, LARGE.values()))
        with pytest.raises(CacheFullError):
            self._cache.put("large", torch.zeros(200_000, dtype=torch.uint8))
        del held
        self._cache.get_many(list(LARGE), self._source)

    def _clear(self) -> None:
        self._cache.clear()
        with self._cache.scope() as scope:
            self._cache.get_many(["s1", "s2"], self._source)
            assert scope.num_shards == 2
        assert self._cache.clear(["s1", "unknown"]) == 0
        self._cache.get_many(["s2"], self._source)
        self._cache.clear_node(self._source.node, ["s2"])
        self._cache.clear_node(self._source.node)
        self._cache.clear()
        self._cache.synchronize()
        self._cache.trim(32 << 10)
        self._fail_to_release()

    def _fail_to_release(self) -> None:
        assert self._cache._engine is not None
        pool = self._cache._engine.pool
        release, failures = pool._device.release_arena, [RuntimeError("not now")]

        def fail_once(arena: Arena) -> None:
            if failures:
                raise failures.pop()
            release(arena)

        pool._device.release_arena = fail_once  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="not now"):
            self._cache.trim()
        self._cache.resume()
        self._cache.get_many(["s1"], self._source)
        self._cache.offload()
        assert self._cache.get("s1") is not None
        assert self._cache.get("nowhere") is None
        self._cache.resume()
        self._cache.get_many(["s1"], self._source)
        self._cache.clear()

    def _look(self) -> None:
        assert "s1" not in self._cache
        assert len(self._cache) == len(self._cache.keys()) == 0
        assert self._cache._index.missing(["s1"]) == ["s1"]
        assert self._cache._engine is not None
        assert self._cache._engine.pool.free_bytes
        assert self._cache._engine.pool.accounts()["reserved"]
        assert repr(self._cache._engine.staging)
        assert repr(self._cache._engine.transfer.inflight)
        self._cache._engine.transfer.inflight.wake()
        self._cache.buffer_stats()
        self._cache.get_many(["s2"], self._source, keep=True)
        assert self._cache.entries(oldest=1)
        assert self._cache.summary()
        index, pool = self._cache._index, self._cache._engine.pool
        index.compare_checksums([(one, 1) for one, _ in index.aliases(["s2"])])
        index.has("s2")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pool, "_allocate", out_of_memory)
            with pytest.raises(CacheFullError):
                pool.take_overflow(512)
        self._cache._engine.gather()
        self._cache.reset_peak_stats()
        self._cache.clear()


def out_of_memory(nbytes: int, *, private: bool) -> Any:
    raise torch.OutOfMemoryError


@pytest.fixture
def donor() -> TensorCache:
    return TensorCache(dataclasses.replace(CONFIG, pool_bytes="1MiB"), device=HostDevice())


@pytest.fixture
def garbage(donor: TensorCache, monkeypatch: pytest.MonkeyPatch) -> Garbage:
    """Garbage that locks collect if they are made from here on."""
    garbage = Garbage()
    for module in (index, inflight, publish, slab, staging, reaper, engine, transfer):
        monkeypatch.setattr(module, "threading", garbage.threading())
    pools = cuda_pools.PrivatePools
    monkeypatch.setattr(pools, "_lock", CollectingLock(pools._lock, garbage))
    pause = process.no_collections
    monkeypatch.setattr(pause, "_lock", CollectingLock(pause._lock, garbage))
    return garbage


def make_device(name: str, tmp_path: Path) -> Device:
    if name == "fake cuda":
        return cuda_device(FakeCuda(), tmp_path)
    return SimDevice(seed=1) if name == "simulated" else HostDevice(stages=name == "staged host")


def sections_of(name: str) -> set[Place]:
    """The critical sections that a device of this name leads to."""
    unused = {"host": {STAGING, CUDA_POOLS}, "fake cuda": set[str]()}.get(name, {CUDA_POOLS})
    return {place for place in critical_sections("gpu_cache", but="gpu_cache/rpc") if place[0] not in unused}


@pytest.mark.parametrize("name", ["host", "staged host", "simulated", "fake cuda"])
def test_tensors_die_in_every_critical_section(name: str, donor: TensorCache, garbage: Garbage, tmp_path: Path) -> None:
    cache = TensorCache(CONFIG, device=make_device(name, tmp_path))
    workload = Workload(cache, donor, garbage)
    in_background(workload.run).result(DEADLOCK_S)
    workload.stock_up()
    in_background(cache.close).result(DEADLOCK_S)
    never = sections_of(name) - {place for place, count in garbage.collected.items() if count}
    assert not never, "nothing died there"
    garbage.stock.clear()
    for one in (cache, donor):
        assert one._engine is not None
        gc.collect()
        in_background(one._engine.pool.synchronize).result(DEADLOCK_S)
        accounts = one._engine.pool.accounts()
        assert accounts["free"] == accounts["reserved"], accounts
    if isinstance(device := cache._engine.device, SimDevice):
        assert not device.faults


def test_tensors_die_in_critical_sections_that_threads_compete_for(donor: TensorCache, garbage: Garbage) -> None:
    cache = TensorCache(CONFIG, device=HostDevice(stages=True))
    keys, source = list(SHARDS), DictSource(SHARDS)

    def work(number: int) -> None:
        for step in range(8):
            wanted = keys[number * 10 + step :][:20]
            assert all(map(same_bytes, cache.get_many(wanted, source), map(SHARDS.get, wanted)))
            cache.clear(wanted[::3])

    garbage.stock[:] = donor.get_many(list(SPARE), DictSource(SPARE))
    donor.clear()
    run_threads([lambda number=number: work(number) for number in range(3)], DEADLOCK_S)
    assert not garbage.stock, "all died"
    cache.clear()
    in_background(cache.synchronize).result(DEADLOCK_S)
    assert cache.buffer_stats()["device_bytes"] == 0


@pytest.mark.parametrize("stages", [False, True], ids=["direct", "staged"])
def test_a_cache_may_die_in_its_own_critical_sections(garbage: Garbage, stages: bool) -> None:
    """Of a fetch that goes on without it."""
    for num_sections in itertools.count():
        stage = Stage(HostDevice(stages))
        future = stage.cache.prefetch(["a"], stage.source)
        stage.at("before a read")
        engine = stage.cache._engine
        assert engine is not None
        garbage.stock += [stage.cache, *(Spared() for _ in range(num_sections))]
        del stage.cache
        stage.open_gates()
        assert isinstance(future.exception(DEADLOCK_S), CacheClosedError | None)
        eventually(lambda: "gpu-cache-fetch" not in [thread.name for thread in threading.enumerate()])
        if garbage.stock:
            break  # so many sections there are not
        eventually(lambda: not any(engine.pool.accounts().values()))  # noqa: B023
    assert num_sections > 5
    garbage.stock.clear()


class Spared:
    """Dies in the place of what is to die later."""
