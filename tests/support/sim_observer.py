"""Looks into a cache on the simulated device: at bytes that become free, and at moments bad for a collection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from gpu_cache import TensorCache
from gpu_cache.config import ReadyMode
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.slab import SlabPool
from gpu_cache.transfer.engine import Engine
from tests.support.sim_clock import POISON
from tests.support.sim_device import SimDevice


class WatchedLock:
    """A lock that tells when its critical section begins and ends, from inside."""

    def __init__(self, moment: Callable[[], None]) -> None:
        self._lock, self._moment = threading.Lock(), moment

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        is_taken = self._lock.acquire(blocking, timeout)
        if is_taken:
            self._moment()
        return is_taken

    def release(self) -> None:
        self._moment()
        self._lock.release()


def observe(cache: TensorCache, device: SimDevice) -> None:
    """See bytes given back, and slots handed out for receiving: the host may write both from then on.

    Args:
        cache: The cache to look at.
        device: That it is on.
    """
    engine = cache._lazy.open()
    pool, staging = engine.pool, engine.staging
    assert staging is not None
    acquire = staging.acquire
    for each in [pool] if engine.tier is None else [pool, engine.tier.pool]:
        _watch_give_backs(each, device)

    def watched_acquire(*args: Any) -> Any:
        slot = acquire(*args)
        device.host_write(slot.pinned.tensor, "a refill")
        return slot

    staging.acquire = watched_acquire  # type: ignore[method-assign]
    _watch_locks(cache, engine, device.adversary.moment)
    _make_orderly(cache, engine)


def _watch_give_backs(pool: SlabPool, device: SimDevice) -> None:
    settle, settling = pool._settle, threading.Lock()  # no thread takes bytes between their give-back and the poison

    def watched_settle(done: Any) -> None:
        with settling:
            for freed in [freed for one in done if one in pool._quarantine for freed in one.ranges]:
                place = freed.slab.arena.tensor[freed.offset : freed.offset + freed.nbytes]
                if device.knows(place):
                    device.host_write(place, "the give-back")
                else:  # ordinary memory, for want of room in the host tier
                    place.fill_(POISON)
            settle(done)

    pool._settle = watched_settle  # type: ignore[method-assign]


def _watch_locks(cache: TensorCache, engine: Engine, moment: Callable[[], None]) -> None:
    assert engine.staging is not None
    cache._index._lock = WatchedLock(moment)  # type: ignore[assignment]
    _watch_lock(engine.pool, moment)
    _watch_lock(engine.staging, moment)
    if engine.tier is not None:
        _watch_lock(engine.tier.pool, moment)
        engine.tier.index._lock = cache._index._lock
        engine.tier.transfer.copied._lock = WatchedLock(moment)  # type: ignore[assignment]
    engine.transfer.copied._lock = WatchedLock(moment)  # type: ignore[assignment]


def _watch_lock(of: Any, moment: Callable[[], None]) -> None:
    of._lock = WatchedLock(moment)
    of._changed = threading.Condition(of._lock)


def _make_orderly(cache: TensorCache, engine: Engine) -> None:
    """Take out what differs from run to run: the order of a set, the clock, what a thread does after its last word."""
    settle = engine.settle

    def settle_one_by_one(completions: Mapping[Completion, object], ready: ReadyMode) -> None:
        for completion, is_on_host in completions.items():
            settle({completion: is_on_host}, ready)

    engine.settle = settle_one_by_one  # type: ignore[method-assign]
    engine.reaper._period_s = 3600.0
