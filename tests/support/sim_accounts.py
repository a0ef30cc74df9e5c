"""The laws of conservation: every byte is in one place, and every look-up is counted once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np

from gpu_cache import FetchError, TensorCache
from gpu_cache.config import ALIGNMENT
from gpu_cache.pool.block import Slab, aligned
from gpu_cache.pool.slab import SlabPool
from tests.support.sim_device import SimDevice
from tests.support.sim_shards import contents


@dataclasses.dataclass(slots=True)
class Ledger:
    """A program's requests and their results: a model of the cache's counters, which it never reads."""

    requested: int = 0
    arrived_bytes: int = 0
    awaited_bytes: int = 0  # at most so many may have come besides

    def ask(self, keys: Sequence[Hashable]) -> None:
        """Count a look-up of distinct keys."""
        self.requested += len(keys)

    @contextlib.contextmanager
    def receiving(self, keys: Iterable[Hashable]) -> Iterator[None]:
        """Count what comes of looked-up keys: all but the failures, if this ends in a `FetchError`."""
        failed: Iterable[Hashable] = ()
        try:
            yield
        except FetchError as error:
            failed = error.failures
            raise
        finally:
            self.arrived_bytes += nbytes_of(set(keys).difference(failed))


def nbytes_of(keys: Iterable[Hashable]) -> int:
    """Bytes of shards by key."""
    return sum(contents()[key].numel() for key in keys)


def check_accounts(cache: TensorCache, *, is_fetching: bool, is_over: bool) -> None:
    """No byte is lost; nothing is pending unless a fetch is under way, and nothing is in use when all is over."""
    engine, index = cache._engine, cache._index
    assert engine is not None
    assert engine.staging is not None
    assert isinstance(engine.device, SimDevice)
    accounts = engine.pool.accounts()
    reserved = accounts.pop("reserved")
    _agree(sum(accounts.values()), reserved, "the places of all bytes, and what is reserved", accounts)
    _agree(engine.pool._reserved_bytes <= engine.pool.capacity, True, "reserved, and the capacity", engine.pool)
    if not cache._index.is_closed:  # else its reaper is at work between two looks
        _agree(_places(engine.pool), accounts, "where each byte is, and the sums kept of it", accounts)
        _agree(engine.device.arena_bytes, reserved, "the device's arenas, and what is reserved", accounts)
    if engine.tier is not None:
        parked = engine.tier.pool.accounts()
        taken = parked.pop("reserved")
        _agree(sum(parked.values()), taken, "the places of all bytes of the tier, and what it has taken", parked)
        _agree(
            engine.tier.pool._reserved_bytes <= engine.tier.pool.capacity, True, "the tier, and its capacity", parked
        )
        if not cache._index.is_closed:
            _agree(_places(engine.tier.pool), parked, "where each byte of the tier is, and the sums kept of it", parked)
        accounts = {place: number + parked[place] for place, number in accounts.items()}
    if not is_fetching:
        _agree(accounts["pending"], 0, "pending, and no fetch under way", accounts)
        _agree(len(index), sum(map(len, index._levels.tables)), "READY entries, and all", index)
        _agree(engine.staging.stats()["pinned_bytes"], 0, "slots in use, and no fetch under way", engine.staging)
    if is_over:
        _agree(accounts["held"] + accounts["quarantined"], 0, "in use, and all is over", accounts)


def check_lookups(cache: TensorCache, ledger: Ledger) -> None:
    """Requested = hits + host hits + joins + misses, in counts and in bytes, and as the ledger has it."""
    stats = cache.buffer_stats()
    kinds = {name: int(stats[name]) for name in ("hits", "host_hits", "joined", "misses")}  # type: ignore[literal-required]
    _agree(sum(kinds.values()), stats["requested"], "kinds of look-up, and all", kinds)
    _agree(ledger.requested, stats["requested"], "shards asked for, and look-ups", kinds)
    nbytes = stats["hit_bytes"] + stats["joined_bytes"] + stats["miss_bytes"]
    _agree(nbytes, stats["requested_bytes"], "bytes of each kind of look-up, and of all", stats)
    early_bytes = nbytes - ledger.arrived_bytes
    assert 0 <= early_bytes <= ledger.awaited_bytes, (
        f"accounts do not add up: {nbytes} bytes were counted, {ledger.arrived_bytes} came"
    )
    keys = cache.keys()
    _agree(stats["num_entries"], len(keys), "entries, and keys", keys)
    _agree(stats["total_bytes"], nbytes_of(keys), "bytes cached, and bytes of the keys", keys)
    below = cache._index.below
    parked = set() if below is None else set(filter(below.has, keys))
    for where, some in (("device_bytes", set(keys) - parked), ("host_bytes", parked)):
        held = sum(aligned(contents()[key].numel()) for key in some)
        assert held <= stats[where], f"accounts do not add up: {held} bytes are cached, fewer are {where}"  # type: ignore[literal-required]


def _places(pool: SlabPool) -> dict[str, int]:
    """Bytes by place, counted one granule after another; raises if one is in two places."""
    counts = np.zeros(4, dtype=np.int64)
    for slab in (*pool._slabs, *pool._overflows):
        owner = np.zeros(slab.nbytes // ALIGNMENT, dtype=np.uint8)
        for place, start, nbytes in _ranges(pool, slab):
            granules = owner[start // ALIGNMENT : (start + nbytes) // ALIGNMENT]
            assert not granules.any(), f"accounts do not add up: bytes {start} to {start + nbytes} are in two places"
            granules[:] = place
        counts += np.bincount(owner, minlength=4) * ALIGNMENT
    return dict(zip(("pending", "free", "held", "quarantined"), counts.tolist(), strict=True))


def _ranges(pool: SlabPool, slab: Slab) -> Iterator[tuple[int, int, int]]:
    """Place (1 free, 2 held, 3 quarantined), start and length of what the pool knows of; the rest is pending."""
    yield from ((1, start, nbytes) for start, nbytes in slab.free._size_at.items())
    yield from ((2, lease.offset, lease.nbytes) for lease in slab.leases.values())
    freed = (one for held in pool._quarantine for one in held.ranges if one.slab is slab)
    yield from ((3, one.offset, one.nbytes) for one in freed)


def _agree(left: object, right: object, what: str, details: object) -> None:
    assert left == right, f"accounts do not add up: {what}: {left} and {right}; {details}"
