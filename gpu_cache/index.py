"""The index: key -> entry, one flight per key. Owns the index lock; every decision about an entry is made here."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from gpu_cache.entry import Claim, Entry, Landing, State
from gpu_cache.lease import Lease
from gpu_cache.stats import BusyClock, LookupCounters, Survivors


class ShardIndex:
    """Entries by key, in order of use.

    Args:
        alias: Makes tensors to hand out from entries' bases; must be quick, it runs under the lock.
        is_held: Whether somebody but the index holds a base.
        now: Seconds, monotonic.
    Thread-safety: any thread. Methods that drop entries return them, so that tensors die outside the lock.
    Source: two-phase insert (reserve, then publish or abort) after vLLM's KV-cache off-loading.
    """

    def __init__(
        self,
        alias: Callable[[Iterable[torch.Tensor]], list[torch.Tensor]],
        is_held: Callable[[torch.Tensor], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._alias, self._is_held, self._now = alias, is_held, now
        # Guards every field below, and the fields of every entry.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()  # least recently used first
        self._births: OrderedDict[Hashable, float] = OrderedDict()  # READY entries, oldest first
        self._survivors = Survivors()
        self._generations = itertools.count(1)
        self._ready_bytes = 0
        self._has_fetched = False  # since the last clear
        self._num_removals = 0  # calls that dropped entries on request, whether or not there were any
        self._is_closed = False
        self._counters = LookupCounters()
        self._fetching = BusyClock(now)

    def __len__(self) -> int:
        with self._lock:
            return len(self._births)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._births

    def __repr__(self) -> str:
        pending = len(self._entries) - len(self._births)
        return f"ShardIndex({len(self._births)} ready, {pending} pending, {self._ready_bytes:,} bytes)"

    @property
    def is_closed(self) -> bool:
        """Whether nothing is indexed any more."""
        return self._is_closed

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached or on its way."""
        return not self._entries

    def keys(self) -> list[Hashable]:
        """Keys of the READY entries, oldest first."""
        with self._lock:
            return list(self._births)

    def missing(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of `keys` that have no READY entry. Counts nothing."""
        with self._lock:
            return [key for key in keys if key not in self._births]

    def find(self, key: Hashable) -> tuple[torch.Tensor, Entry] | None:
        """An alias of a READY entry, and the entry; counts as no look-up."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.base is None:
                return None
            self._entries.move_to_end(key)
            return self._alias([entry.base])[0], entry

    def claim(self, keys: Iterable[Hashable], found: Claim | None = None, deadline: float = 0.0) -> Claim:
        """Look distinct keys up: each is a hit, a join (somebody is fetching it) or a claim, which the caller must
        end with `publish`, `deliver` or `abort`. `found` is filled and returned: who passes it can do so whatever
        interrupts this, and can look up again what it lacks. Those who join a claim may give it up after `deadline`.

        Of a call that looks up again after something was cleared, claims are not indexed: the clear may have meant
        them, and a call that began before it must not bring them back.
        """
        found = Claim() if found is None else found
        ready: dict[Hashable, torch.Tensor] = {}
        with self._lock:
            entries, generations, hit_bytes = self._entries, self._generations, 0
            if found.num_removals is None:
                found.num_removals = self._num_removals
            is_current = found.num_removals == self._num_removals
            for key in keys:
                entry = entries.get(key)
                if entry is None:
                    entry = found.claimed[key] = Entry(key, next(generations), is_awaited=True, deadline=deadline)
                    if is_current:
                        entries[key] = entry  # second: whatever interrupts this, the caller can abort it
                elif (base := entry.base) is not None:
                    entries.move_to_end(key)
                    ready[key] = base
                    hit_bytes += entry.nbytes
                    if entry.completion is not None:
                        found.completions[entry.completion] = None
                else:
                    entry.num_joined += 1
                    entry.flight = entry.flight or Future()
                    found.joined[key] = entry
            found.hits.update(zip(ready, self._alias(ready.values()), strict=True))
            self._count_claim_locked(found, len(ready), hit_bytes)
        return found

    def came_from(self, entries: Iterable[Entry], node: str) -> None:
        """Say which node PENDING entries are asked of, so that clearing the node finds them."""
        with self._lock:
            for entry in entries:
                entry.node = node

    def reserve(self, key: Hashable) -> Entry | None:
        """A claim on one key that counts as no look-up; None if the key has an entry."""
        with self._lock:
            if key in self._entries:
                return None
            entry = self._entries[key] = Entry(key, next(self._generations), is_fetch=False, is_awaited=True)
            return entry

    def publish(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> None:
        """Make arrived shards READY; a clear that came meanwhile wins, then only those already waiting get them."""
        with self._lock:
            landed = self._land_locked(landings, node, completion)
            standing = [entry for entry in landed if self._stands_locked(entry)]
            if self._is_closed:
                for entry in standing:
                    self._drop_locked(entry)
            else:
                self._index_locked(standing)
        _wake(landed)

    def deliver(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> None:
        """Hand shards that arrived to those who wait for them, without caching: the pool had no room."""
        with self._lock:
            landed = self._land_locked(landings, node, completion)
            for entry in landed:
                self._drop_locked(entry)
            self._counters.overflows += len(landed)
            self._counters.overflow_bytes += sum(entry.nbytes for entry in landed)
        _wake(landed)

    def abort(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Give up on those of `entries` that are still PENDING; whoever waits for one gets `error`."""
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            for entry in failed:
                entry.error = error
                self._drop_locked(entry)
            self._counters.fetch_errors += sum(entry.is_fetch for entry in failed)
        _wake(failed)

    def release(self, entries: Iterable[Entry]) -> None:
        """The claiming call has handed these out, or will not: they may be evicted."""
        with self._lock:
            for entry in entries:
                entry.is_awaited = False

    def remove(self, keys: Iterable[Hashable], node: str | None = None) -> list[Entry]:
        """Drop entries by key (and node), and return the READY ones, for the caller to let die.

        A PENDING one will not be cached when it arrives. Unknown keys are ignored.
        """
        wanted = list(keys)  # outside the lock: it may be a generator that asks the cache
        with self._lock:
            self._num_removals += 1
            dropped = []
            for key in wanted:
                entry = self._entries.get(key)
                if entry is None or (node is not None and entry.node != node):
                    continue
                self._drop_locked(entry)
                if entry.base is not None:
                    dropped.append(entry)
            if wanted:
                self._count_cleared_locked(dropped)
            return dropped

    def remove_node(self, node: str | None) -> list[Entry]:
        """Drop every entry of a node, or all (None), and return the READY ones."""
        with self._lock:
            keys = [key for key, entry in self._entries.items() if node is None or entry.node == node]
        return self.remove(keys, node)

    def close(self) -> list[Entry]:
        """Drop every entry and index no more; returns the READY ones."""
        with self._lock:
            self._is_closed = True
        return self.remove_node(None)

    def forget_dead(self, leases: Iterable[Lease]) -> None:
        """Drop entries whose block died under them, as when `share_memory_()` swapped a tensor's storage."""
        dropped = []
        with self._lock:
            for lease in leases:
                entry = self._entries.get(lease.key)
                if entry is not None and entry.lease is lease:
                    self._drop_locked(entry)
                    dropped.append(entry)

    def evict(self, nbytes: int) -> list[Entry]:
        """Drop least recently used READY entries that nobody holds until their bytes suffice; return them."""
        with self._lock:
            victims: list[Entry] = []
            total = 0
            for entry in self._entries.values():
                if total >= nbytes:
                    break
                if entry.nbytes and entry.base is not None and not entry.is_awaited and not self._is_held(entry.base):
                    victims.append(entry)
                    total += entry.nbytes
            for entry in victims:
                self._drop_locked(entry)
            self._counters.evictions += len(victims)
            self._counters.evicted_bytes += sum(entry.nbytes for entry in victims)
            return victims

    def fetch_started(self) -> None:
        """A reader begins to deliver."""
        with self._lock:
            self._fetching.start()
            self._counters.fetches += 1

    def fetch_stopped(self) -> None:
        """A reader ended."""
        with self._lock:
            self._fetching.stop()

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`, consistent in itself."""
        with self._lock:
            outlived_entries, outlived_bytes = self._survivors.since(self._counters.clears - 2)
            born = next(iter(self._births.values()), None)
            return {
                **self._counters.as_dict(),
                "requested": self._counters.requested,
                "requested_bytes": self._counters.requested_bytes,
                "num_entries": len(self._births),
                "num_tensors": len(self._births),
                "total_bytes": self._ready_bytes,
                "fetch_busy_seconds": self._fetching.seconds,
                "oldest_entry_age_seconds": 0.0 if born is None else self._now() - born,
                "outlived_entries": outlived_entries,
                "outlived_bytes": outlived_bytes,
            }

    def _stands_locked(self, entry: Entry) -> bool:
        """Whether this generation of the key is the one that the index knows: not cleared, evicted or refetched."""
        current = self._entries.get(entry.key)
        return current is not None and current.generation == entry.generation

    def _count_claim_locked(self, found: Claim, num_hits: int, hit_bytes: int) -> None:
        self._counters.hits += num_hits
        self._counters.hit_bytes += hit_bytes
        self._counters.joined += len(found.joined)
        self._counters.misses += len(found.claimed)
        self._has_fetched = self._has_fetched or bool(found.claimed)

    def _land_locked(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> list[Entry]:
        """Give entries their tensors, but for those that their calls gave up on meanwhile."""
        landed = []
        fetched_bytes = joined_bytes = 0
        for entry, landing in landings:
            if entry.is_settled:
                continue
            entry.base, entry.lease, entry.completion = landing.base, landing.lease, completion
            entry.node, entry.nbytes = node, landing.nbytes
            fetched_bytes += entry.nbytes if entry.is_fetch else 0
            joined_bytes += entry.nbytes * entry.num_joined
            landed.append(entry)
        self._counters.miss_bytes += fetched_bytes
        self._counters.fetch_bytes += fetched_bytes
        self._counters.joined_bytes += joined_bytes
        return landed

    def _index_locked(self, entries: Sequence[Entry]) -> None:
        born, epoch, nbytes = self._now(), self._counters.clears, 0
        for entry in entries:
            entry.state, entry.born, entry.epoch = State.READY, born, epoch
            self._births[entry.key] = born
            nbytes += entry.nbytes
        self._ready_bytes += nbytes
        self._survivors.add(epoch, len(entries), nbytes)

    def _drop_locked(self, entry: Entry) -> None:
        """Forget an entry; PENDING ones keep flying, for those who wait."""
        if self._stands_locked(entry):
            del self._entries[entry.key]
        if entry.state is State.READY:
            del self._births[entry.key]
            self._ready_bytes -= entry.nbytes
            self._survivors.add(entry.epoch, -1, -entry.nbytes)
        entry.state = State.GONE

    def _count_cleared_locked(self, dropped: list[Entry]) -> None:
        """All clears between two fetches are one: a step clears its owners one by one."""
        if self._has_fetched:
            self._has_fetched = False
            self._counters.clears += 1
        self._counters.cleared += len(dropped)
        self._counters.cleared_bytes += sum(entry.nbytes for entry in dropped)


def _wake(entries: Iterable[Entry]) -> None:
    """Resolve the flights of settled entries. Outside the lock: done-callbacks are somebody else's code."""
    for entry in entries:
        if entry.flight is not None:
            entry.flight.set_result(None)  # not the entry: a cycle would keep its block until a collection
