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

from gpu_cache.entry import Claim, Entry, EntryInfo, Landing, State
from gpu_cache.errors import failure_reason
from gpu_cache.lease import Lease
from gpu_cache.ledger import Ledger


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
        self._alias, self._is_held = alias, is_held
        # Guards every field below, and the fields of every entry.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()  # least recently used first
        self._ledger = Ledger(now)
        self._generations = itertools.count(1)
        self._num_removals = 0  # calls that dropped entries on request, whether or not there were any
        self._is_closed = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._ledger.births)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._ledger.births

    def __repr__(self) -> str:
        num_ready = len(self._ledger.births)
        pending = len(self._entries) - num_ready
        return f"ShardIndex({num_ready} ready, {pending} pending, {self._ledger.ready_bytes:,} bytes)"

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
            return list(self._ledger.births)

    def missing(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of `keys` that have no READY entry. Counts nothing."""
        with self._lock:
            return [key for key in keys if key not in self._ledger.births]

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
            self._ledger.claimed(found, len(ready), hit_bytes)
        return found

    def keep(self, keys: Iterable[Hashable]) -> None:
        """Say that these are meant to outlive clears, cached or on their way: they are no leak."""
        with self._lock:
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    self._ledger.kept(entry)

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
            return self._entries.setdefault(key, Entry(key, next(self._generations), is_fetch=False, is_awaited=True))

    def publish(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> None:
        """Make arrived shards READY; a clear that came meanwhile wins, then only those already waiting get them."""
        with self._lock:
            landed = self._land_locked(landings, node, completion)
            standing = [entry for entry in landed if self._stands_locked(entry)]
            if self._is_closed:
                for entry in standing:
                    self._drop_locked(entry)
            else:
                self._ledger.indexed(standing, node)
        _wake(landed)

    def deliver(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> None:
        """Hand shards that arrived to those who wait for them, without caching: the pool had no room."""
        with self._lock:
            landed = self._land_locked(landings, node, completion)
            for entry in landed:
                self._drop_locked(entry)
            self._ledger.overflowed(landed)
        _wake(landed)

    def abort(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Give up on those of `entries` that are still PENDING; whoever waits for one gets `error`."""
        reason = failure_reason(error)
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            for entry in failed:
                entry.error = error
                self._drop_locked(entry)
            self._ledger.failed(failed, reason)
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
                self._ledger.cleared(dropped)
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
        with self._lock:
            known = [(self._entries.get(lease.key), lease) for lease in leases]
            dropped = [entry for entry, lease in known if entry is not None and entry.lease is lease]
            for entry in dropped:
                self._drop_locked(entry)
            self._ledger.died(dropped)

    def candidates(self) -> list[Entry]:
        """READY entries with bytes that nobody holds, the least recently used first."""
        with self._lock:
            return [entry for entry in self._entries.values() if self._can_evict_locked(entry)]

    def evict(self, victims: Sequence[Entry]) -> bool:
        """Drop all of these entries, or none if one is gone or held by now; the caller lets them die."""
        with self._lock:
            if not all(self._stands_locked(entry) and self._can_evict_locked(entry) for entry in victims):
                return False
            for entry in victims:
                self._drop_locked(entry)
            self._ledger.evicted(victims)
            return True

    def evict_all(self) -> list[Entry]:
        """Drop every READY entry with bytes, also those that are held, and return them, for the caller to let die."""
        with self._lock:
            victims = [entry for entry in self._entries.values() if entry.base is not None and entry.nbytes]
            for entry in victims:
                self._drop_locked(entry)
            self._ledger.evicted(victims)
            return victims

    def note_fetch(self, node: str, *, begins: bool) -> None:
        """A reader of a node begins to deliver, or has ended."""
        with self._lock:
            self._ledger.fetching(node, begins=begins)

    def note_answer(self, node: str, seconds: float) -> None:
        """An answer of a node took so long, from the request to its last byte."""
        with self._lock:
            self._ledger.answered(node, seconds)

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return self._ledger.stats()

    def report(self) -> dict[str, Any]:
        """The index's part of a report, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), **self._ledger.details()}

    def oldest(self, most: int, *, is_outlived: bool = False) -> list[EntryInfo]:
        """The oldest READY entries, oldest first; only those that outlived clears and should not, if so wanted."""
        with self._lock:
            wanted = (self._entries[key] for key in self._ledger.births)
            if is_outlived:
                wanted = (one for one in itertools.takewhile(self._ledger.is_outlived, wanted) if not one.is_kept)
            return [self._ledger.about(entry) for entry in itertools.islice(wanted, most)]

    def _stands_locked(self, entry: Entry) -> bool:
        """Whether this generation of the key is the one that the index knows: not cleared, evicted or refetched."""
        current = self._entries.get(entry.key)
        return current is not None and current.generation == entry.generation

    def _can_evict_locked(self, entry: Entry) -> bool:
        if entry.base is None or not entry.nbytes or entry.is_awaited:
            return False
        return not self._is_held(entry.base)

    def _land_locked(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> list[Entry]:
        """Give entries their tensors, but for those that their calls gave up on meanwhile."""
        landed = []
        for entry, landing in landings:
            if entry.is_settled:
                continue
            entry.base, entry.lease, entry.completion = landing.base, landing.lease, completion
            entry.node, entry.nbytes = node, landing.nbytes
            landed.append(entry)
        self._ledger.landed(landed, node)
        return landed

    def _drop_locked(self, entry: Entry) -> None:
        """Forget an entry; PENDING ones keep flying, for those who wait."""
        if self._stands_locked(entry):
            del self._entries[entry.key]
        if entry.state is State.READY:
            self._ledger.dropped(entry)
        entry.state = State.GONE


def _wake(entries: Iterable[Entry]) -> None:
    """Resolve the flights of settled entries. Outside the lock: done-callbacks are somebody else's code."""
    for entry in entries:
        if entry.flight is not None:
            entry.flight.set_result(None)  # not the entry: a cycle would keep its block until a collection
