"""The index: key -> entry, one flight per key. Owns the index lock; every decision about an entry is made here."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import torch

from gpu_cache.entry import Claim, Entry, EntryInfo, Holding, Landing
from gpu_cache.errors import failure_reason
from gpu_cache.lease import Lease
from gpu_cache.ledger import Ledger
from gpu_cache.mutation import Doubts
from gpu_cache.suspects import SuspectIndex


class ShardIndex(SuspectIndex):
    """Entries by key, in order of use.

    Args:
        alias: Makes tensors to hand out from entries' bases; must be quick, it runs under the lock.
        is_held: Whether somebody but the index holds a base.
        now: Seconds, monotonic.
        doubts: What is done about entries that somebody wrote into; None: nothing.
    Thread-safety: any thread. Methods that drop entries return them, so that tensors die outside the lock.
    Source: two-phase insert (reserve, then publish or abort) after vLLM's KV-cache off-loading.
    """

    def __init__(
        self,
        alias: Callable[[Iterable[torch.Tensor]], list[torch.Tensor]],
        is_held: Callable[[torch.Tensor], bool],
        now: Callable[[], float] = time.monotonic,
        doubts: Doubts | None = None,
    ) -> None:
        super().__init__(alias, Ledger(now), doubts or Doubts())
        # Guards every field, also those of _ledger and _doubts, and the fields of every entry.
        self._lock = threading.Lock()
        self._is_held = is_held
        self._num_removals = 0  # calls that dropped entries on request, whether or not there were any

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

    def claim(
        self,
        keys: Iterable[Hashable],
        found: Claim | None = None,
        deadline: float = 0.0,
        *,
        hands_out: bool = True,
    ) -> Claim:
        """Look distinct keys up: each is a hit, a join (somebody is fetching it) or a claim, which the caller must
        end with `publish`, `deliver` or `abort`. `found` is filled and returned: who passes it can do so whatever
        interrupts this, and can look up again what it lacks. Those who join a claim may give it up after `deadline`.

        Of a call that looks up again after something was cleared, claims are not indexed: the clear may have meant
        them, and a call that began before it must not bring them back.

        Where tensors are to be handed out, an entry that somebody wrote into is claimed as a miss of a new generation.

        Raises:
            MutatedError: There is one, and that is how the policy wants it. Nothing was claimed or counted.
        """
        found = Claim() if found is None else found
        ready: dict[Hashable, torch.Tensor] = {}
        unverified: list[Entry] = []
        checks = hands_out and self._doubts.is_on
        with self._lock:
            if checks and self._doubts.is_error:
                keys = self._doubts.refuse_changed(self._entries, keys)
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
                    if checks and base._version != entry.version:
                        if entry.is_fetch:
                            self._claim_anew_locked(entry, found, deadline, is_current)
                            continue
                        self._doubts.accept(entry)
                        unverified.append(entry)
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
        if unverified:
            self._doubts.tell_unverified(unverified)
        return found

    def keep(self, keys: Iterable[Hashable]) -> None:
        """Say that these are meant to outlive clears, cached or on their way: they are no leak."""
        with self._lock:
            for key in keys:
                if (entry := self._entries.get(key)) is not None:
                    self._ledger.kept(entry)

    def adopt(self, holding: Holding, entries: Iterable[Entry]) -> None:
        """Drop these when a scope ends; of one that is over, when the next one around it does."""
        with self._lock:
            holder: Holding | None = holding
            while holder is not None and holder.is_over:
                holder = holder.outer
            if holder is None:
                return
            holder.generations.update((entry.key, entry.generation) for entry in entries)
            if len(over := holder.generations) > holder.prune_at:
                holder.generations = {entry.key: entry.generation for entry in self._held_locked(holder)}
                holder.prune_at = max(holder.prune_at, 2 * len(holder.generations))
        del over  # keys may be anything, and die outside the lock

    def held_by(self, holding: Holding) -> list[Entry]:
        """The READY entries that a scope will drop."""
        with self._lock:
            return [entry for entry in self._held_locked(holding) if entry.base is not None]

    def end_scope(self, holding: Holding) -> list[Entry]:
        """Drop what was fetched inside a scope, but for what is meant to stay; return the READY ones, as `remove`."""
        with self._lock:
            self._num_removals += 1
            held, over = self._held_locked(holding), holding.generations
            holding.generations, holding.is_over = {}, True
            for entry in held:
                self._drop_locked(entry)
            dropped = [entry for entry in held if entry.base is not None]
            # What an outer scope holds has outlived no step yet.
            self._ledger.cleared(dropped, ends_step=holding.outer is None)
        del over  # keys may be anything, and die outside the lock
        return dropped

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
        """Give up on those of `entries` that are still PENDING; whoever waits for one gets `error`, or what it was to
        replace.
        """
        reason = failure_reason(error)
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            kept = [entry for entry in failed if self._falls_back_locked(entry, error)]
            self._ledger.failed(failed, reason)
        _wake(failed)
        self._doubts.tell_kept(kept, error)

    def release(self, entries: Iterable[Entry]) -> None:
        """The claiming call has handed these out, or will not: they may be evicted."""
        with self._lock:
            for entry in entries:
                entry.is_awaited = False

    def remove(self, keys: Iterable[Hashable], node: str | None = None) -> list[Entry]:
        """Drop entries by key (and node), and return the READY ones, for the caller to let die.

        A PENDING one will not be cached when it arrives. Unknown keys are ignored.
        """
        # Outside the lock: it may be a generator that asks the cache; and what is no key must not stop us half-way.
        wanted = dict.fromkeys(keys)
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
            return {**self._ledger.stats(), "mutations": self._doubts.num_found}

    def report(self) -> dict[str, Any]:
        """The index's part of a report, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), **self._ledger.details(), "mutations": self._doubts.num_found}

    def oldest(self, most: int, *, is_outlived: bool = False) -> list[EntryInfo]:
        """The oldest READY entries, oldest first; only those that outlived clears and should not, if so wanted."""
        with self._lock:
            wanted = (self._entries[key] for key in self._ledger.births)
            if is_outlived:
                wanted = (one for one in itertools.takewhile(self._ledger.is_outlived, wanted) if not one.is_kept)
            return [self._ledger.about(entry) for entry in itertools.islice(wanted, most)]

    def _held_locked(self, holding: Holding) -> list[Entry]:
        """What of a scope's is indexed still, in the generation that it fetched, and not meant to stay."""
        found = ((self._entries.get(key), generation) for key, generation in holding.generations.items())
        return [entry for entry, generation in found if entry and entry.generation == generation and not entry.is_kept]

    def _land_locked(self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any) -> list[Entry]:
        """Give entries their tensors, but for those that their calls gave up on meanwhile."""
        landed = []
        for entry, landing in landings:
            if entry.is_settled:
                continue
            entry.base, entry.lease, entry.completion = landing.base, landing.lease, completion
            entry.node, entry.nbytes, entry.version = node, landing.nbytes, landing.base._version
            landed.append(entry)
        self._ledger.landed(landed, node)
        return landed


def _wake(entries: Iterable[Entry]) -> None:
    """Resolve the flights of settled entries. Outside the lock: done-callbacks are somebody else's code."""
    for entry in entries:
        entry.suspect = None  # nor may a block that was replaced die under the lock
        if entry.flight is not None:
            entry.flight.set_result(None)  # not the entry: a cycle would keep its block until a collection
