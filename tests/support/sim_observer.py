"""What is looked at in a cache on the simulated device: bytes that become free, and where every byte is."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from gpu_cache import TensorCache
from gpu_cache.config import ReadyMode
from gpu_cache.engine import Engine
from gpu_cache.transfer import Completion
from tests.support.sim_device import SimDevice


def observe(cache: TensorCache, device: SimDevice) -> None:
    """See bytes given back, and slots handed out for receiving: the host may write both from then on."""
    engine = cache._open_engine()
    pool, staging = engine.pool, engine.staging
    assert staging is not None
    settle, acquire = pool._settle, staging.acquire
    settling = threading.Lock()  # nobody takes bytes between their give-back and the poison

    def watched_settle(done: Any) -> None:
        with settling:
            for freed in [freed for one in done if one in pool._quarantine for freed in one.ranges]:
                place = freed.slab.arena.tensor[freed.offset : freed.offset + freed.nbytes]
                device.host_write(place, "the give-back")
            settle(done)

    def watched_acquire(timeout_s: float) -> Any:
        slot = acquire(timeout_s)
        device.host_write(slot.pinned.tensor, "a refill")
        return slot

    pool._settle, staging.acquire = watched_settle, watched_acquire  # type: ignore[method-assign]
    _make_orderly(engine)


def _make_orderly(engine: Engine) -> None:
    """Take out what differs from run to run: the order of a set, and the clock."""
    settle = engine.settle

    def settle_one_by_one(completions: Iterable[Completion | None], ready: ReadyMode) -> None:
        for completion in dict.fromkeys(completions):
            settle([completion], ready)

    engine.settle = settle_one_by_one  # type: ignore[method-assign]
    engine.reaper._period_s = 3600.0


def check_accounts(cache: TensorCache, *, is_fetching: bool, is_over: bool) -> None:
    """No byte is lost; nothing is pending unless a fetch is under way, and nothing is in use when all is over."""
    engine, index = cache._engine, cache._index
    assert engine is not None
    assert engine.staging is not None
    accounts = engine.pool.accounts()
    reserved = accounts.pop("reserved")
    assert sum(accounts.values()) == reserved, f"accounts do not add up to {reserved}: {accounts}"
    if not is_fetching:
        assert accounts["pending"] == 0, accounts
        assert len(index) == len(index._entries), index
        assert engine.staging.stats()["pinned_bytes"] == 0
    if is_over:
        assert accounts["held"] == accounts["quarantined"] == 0, accounts
