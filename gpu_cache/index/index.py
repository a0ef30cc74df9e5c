"""The index: key -> entry, one flight per key. Owns the index lock; every decision about an entry is made here."""

from __future__ import annotations

import contextlib
import copy as copying
import itertools
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from sys import getrefcount
from types import MappingProxyType
from typing import Any

import torch

from gpu_cache.errors import PromiseError, failure_reason, several
from gpu_cache.index import lending
from gpu_cache.index.entry import Candidate, Claim, Entry, Flight, Holding, Promise, State
from gpu_cache.index.ledger import Ledger
from gpu_cache.index.lending import Table
from gpu_cache.index.levels import Levels
from gpu_cache.index.mutation import DOUBTED, Mutations
from gpu_cache.native import blocks
from gpu_cache.pool.block import Copy
from gpu_cache.pool.completion import Completion
from gpu_cache.pool.lease import UNSHARED, Lease, aliases_of
from gpu_cache.process import no_collections
from gpu_cache.report.schema import EntryInfo


class ShardIndex:
    """Entries by key, in order of use: of the device, or of the level below it.

    A look-up at the upper level claims a copy of a shard that the lower level has. A look-up at the lower level takes
    the shard that the upper level has. A drop of a key drops it from both levels. A key is READY at one level at most.
    While a shard rises, its lower entry is READY, and its upper one PENDING, of the same generation.

    Args:
        is_held: Whether a base has more aliases than so many loans of the index.
        now: Seconds, monotonic.
        mutations: The policy about entries that a reader wrote into; None: nothing is done.
        broken: Makes the error for a key whose shard is not as promised, from the promise and the truth.
    Attributes:
        below: The lower level; None: there is none, or this is it.
        looks_for_writes: Whether shards that a reader wrote into are dropped, or raise.
    Thread-safety: any thread. Methods that drop entries return them, so that tensors die outside the lock.
    Source: two-phase insert (reserve, then publish or abort) after vLLM's KV-cache off-loading.
    """

    def __init__(
        self,
        is_held: Callable[[torch.Tensor, int], bool],
        now: Callable[[], float] = time.monotonic,
        mutations: Mutations | None = None,
        broken: Callable[[Hashable, Promise, Promise], Exception] = PromiseError,
    ) -> None:
        # Guards _levels with its tables and ledger, _mutations, and the fields of every entry; of both levels.
        self._lock = threading.Lock()
        self._entries, self._above, self._below = Table(), Table(), Table()  # a table without a level stays empty
        self._ledger = Ledger(now)
        self._levels = Levels(self._ledger, [self._entries])
        self._mutations = mutations or Mutations()
        self.looks_for_writes = self._mutations.is_on
        self._is_held, self.broken = is_held, broken
        self.below: ShardIndex | None = None
        self._is_low = False

    def add_level(self) -> ShardIndex:
        """Make the level below, before anything is indexed."""
        self.below = copying.copy(self)
        self.below._entries, self.below._above = self._below, self._entries
        self.below._below, self.below._is_low = Table(), True
        self._levels.tables.append(self._below)
        return self.below

    def __len__(self) -> int:
        with self._lock:
            return len(self._ledger.births)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._ledger.births

    def __repr__(self) -> str:
        num_ready = len(self._ledger.births)
        pending = sum(map(len, self._levels.tables)) - num_ready
        return f"ShardIndex({num_ready} ready, {pending} pending, {self._ledger.ready_bytes:,} bytes)"

    def keys(self) -> list[Hashable]:
        """Keys of the READY entries of both levels, oldest first."""
        with self._lock:
            return list(self._ledger.births)

    def has(self, key: Hashable) -> bool:
        """Whether a key is READY at this level."""
        with self._lock:
            return (entry := self._entries.get(key)) is not None and entry.copy is not None

    def note_fetch(self, node: str, *, begins: bool) -> None:
        """Count a reader of a node that begins to deliver, or has ended."""
        with self._lock:
            self._ledger.fetching(node, begins=begins)

    def note_answer(self, node: str, seconds: float, transport: str = "") -> None:
        """Count an answer of a node: its seconds from the request to the last byte, and its transport."""
        with self._lock:
            self._ledger.answered(node, seconds, transport)

    @property
    def is_closed(self) -> bool:
        """Whether the index is closed, and indexes nothing more."""
        return self._levels.is_closed

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached or on its way."""
        return not any(self._levels.tables)

    def hits(
        self, keys: Sequence[Hashable], expected: Mapping[Hashable, Promise]
    ) -> tuple[list[torch.Tensor], dict[Any, None]] | None:
        """Hand out a tensor of each key, in order, if all are plain hits; else None, and nothing is counted.

        A plain hit is at this level, is what the caller expects, and was not written into. A key may repeat.

        Returns:
            The tensors, and the completions that they are safe to read after, each once.
        """
        left: list[torch.Tensor | None] = []
        completions: dict[Any, None] = {}
        plain = expected if type(expected) is dict else dict(expected)
        with self._lock:
            found = lending.hits(self._entries, keys, plain, self._mutations.is_on, left, completions)
            if found is None:
                return None
            lent, nbytes = found
            self._ledger.counters.hits += len(lent)
            self._ledger.counters.hit_bytes += nbytes
        return lent, completions

    def claim(self, keys: Collection[Hashable], found: Claim | None = None, *, hands_out: bool = True) -> Claim:
        """Look distinct keys up: each is a hit, a join (another call is fetching it) or a claim.

        The caller must end each claim with `publish`, `deliver` or `abort`; joiners may give it up after its deadline.
        A caller that passes `found` can end its claims whatever interrupts this, and look up again what `found` lacks.

        At the lower level, a shard of the upper one is a hit, or a join while it is on its way. At the upper level, a
        shard of the lower one, also one on its way, is a claim of a copy. `found.below` has its entry.

        When a call looks up again after a clear, its claims are not indexed. The clear may have meant those keys, and a
        call that began before it must not bring them back.

        A cached shard of another dtype or shape than `found.expected` says is `refused`, and stays. A cached shard of
        another owner is a miss; the fetched one takes its place when it lands.

        Args:
            keys: No key repeats.
            found: Filled and returned; None: a new one.
            hands_out: Whether the caller gets the tensors. An entry that a reader wrote into is then dropped: a miss.
        Raises:
            MutatedError: A reader wrote into a shard, and the policy is "error". Nothing was claimed.
        """
        found = Claim() if found is None else found
        changed: list[Entry] = []
        left: list[torch.Tensor | None] = []
        with no_collections, self._lock:
            if hands_out:
                self._drop_changed_locked(keys, found.expected, changed)
                for entry in changed:
                    found.mutated[entry.key] = None
            if found.num_removals is None:
                found.num_removals = self._levels.num_removals
            ready, nbytes, num_low = self._look_up_locked(keys, found)
            found.hits.update(zip(ready, lending.lend(list(ready.values()), left), strict=True))
            self._ledger.claimed(found, len(ready), nbytes, num_low)
            if blocks is not None:
                blocks.untrack(list(found.claimed.values()))
        del left
        if changed:
            self._mutations.tell(changed)
        return found

    def lend(self, copies: Mapping[Hashable, Copy]) -> dict[Hashable, torch.Tensor]:
        """A tensor of each copy, for one reader."""
        left: list[torch.Tensor | None] = []
        with no_collections, self._lock:
            lent = lending.lend(list(copies.values()), left)
        del left
        return dict(zip(copies, lent, strict=True))

    def reserve(self, key: Hashable, deadline: float = 0.0) -> Entry | None:
        """Claim one key without counting a look-up; None if the key has an entry. `deadline` is as in a `Claim`.

        An entry that a reader wrote into is dropped first. Raises `MutatedError` as `claim` does.
        """
        entry, changed = None, list[Entry]()
        with self._lock:
            self._drop_changed_locked([key], {}, changed)
            if not self._levels.at(key):
                entry = Entry(key, next(self._levels.generations), Flight("put", deadline))
                self._entries[key] = entry
        if changed:
            self._mutations.tell(changed)
        return entry

    def publish(self, landings: Iterable[tuple[Entry, Copy]], node: str, completion: Completion | None) -> list[Entry]:
        """Make arrived shards READY. If a clear came meanwhile, only calls that already wait get them.

        A copy from the level below takes the place of the shard there. If a reader holds that shard, only calls that
        already wait get the copy. The reader may write into the shard, or may have done so.

        Args:
            landings: Entries, and the bytes of each.
            node: Where from.
            completion: Of the copy that filled them; None: nothing to wait for.
        Returns:
            Entries that left the level below, or gave way to another owner's shard, for the caller to let die.
        """
        with no_collections, self._lock:
            left: list[Entry] = []
            landed = self._land_locked(landings, node, completion)
            for entry in landed:
                if entry.flight.replaces:
                    self._take_place_locked(entry, left)
            # Not those that were cleared, evicted or refetched meanwhile.
            standing = [entry for entry in landed if self._entries.get(entry.key) is entry]
            rising = [] if self.below is None else [entry for entry in standing if entry.flight.is_copy]
            if self._levels.is_closed:
                left += self._levels.drop(standing).entries
            else:
                fresh = [entry for entry in standing if not entry.flight.is_copy] if rising else standing
                self._ledger.indexed(fresh, node, is_low=self._is_low)
                for entry in rising:
                    self._rise_locked(entry, left)
        _wake(landed)
        return left

    def deliver(self, landings: Iterable[tuple[Entry, Copy]], node: str, completion: Completion | None) -> None:
        """Hand arrived shards to the calls that wait for them, uncached: the pool had no room.

        A shard that was copied from the level below stays there.
        """
        with no_collections, self._lock:
            landed = self._land_locked(landings, node, completion)
            for entry in landed:
                self._levels.forget(entry)
            self._ledger.overflowed(landed)
        _wake(landed)

    def abort(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Give up on those of `entries` that are still PENDING; calls that wait for them get `error`."""
        reason = failure_reason(error)
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            for entry in failed:
                entry.flight = entry.flight.failed(error)
                if entry.flight.is_copy:
                    self._levels.let_go_below(entry)
                self._levels.forget(entry)
            if blocks is not None:
                blocks.track(failed)  # the frames of an error may refer to them
            self._ledger.failed(failed, reason)
        _wake(failed)

    def remove(self, keys: Iterable[Hashable], node: str | None = None) -> list[Entry]:
        """Drop entries by key (and node), and return the READY ones, for the caller to let die.

        A PENDING shard will not be cached when it arrives. Unknown keys are ignored.
        """
        # Outside the lock: a generator may ask the cache. Before any drop: an object that is no key raises here.
        wanted = dict.fromkeys(several(keys))
        with self._lock:
            self._levels.num_removals += 1
            found = [
                entry
                for table in self._levels.tables
                for entry in map(table.get, wanted)
                if entry is not None and (node is None or entry.node == node)
            ]
            dropped = self._levels.drop(found)
            if wanted:
                self._ledger.cleared(dropped)
            return dropped.entries

    def remove_node(self, node: str | None) -> list[Entry]:
        """Drop every entry of a node, or all (None), and return the READY ones."""
        with self._lock:
            entries = itertools.chain.from_iterable(table.values() for table in self._levels.tables)
            keys = [entry.key for entry in entries if node is None or entry.node == node]
        return self.remove(keys, node)

    def close(self) -> list[Entry]:
        """Drop every entry and index no more; returns the READY ones."""
        with self._lock:
            self._levels.is_closed = True
        return self.remove_node(None)

    def forget_dead(self, leases: Iterable[Lease]) -> None:
        """Drop entries whose block died, as when `share_memory_()` swapped a tensor's storage."""
        with self._lock:
            tables = [table for table in self._levels.tables if table]
            dead = [
                entry
                for lease in leases
                for table in tables
                if (entry := table.get(lease.key)) is not None and entry.copy and entry.copy.lease is lease
            ]
            if dead:
                self._ledger.died(self._levels.drop(dead))

    def candidates(self, most: int | None = None, *, held: bool = False) -> list[Candidate]:
        """Entries of this level that may be evicted, the least recently used first.

        Args:
            most: The most to return.
            held: Whether to return also shards that readers hold, or are about to get.
        """
        with self._lock:
            found = (
                Candidate(entry, entry.copy, held and self._is_in_use_locked(entry))
                for entry in self._entries.values()
                if entry.copy is not None
            )
            return list(itertools.islice((one for one in found if self._can_evict_locked(one, held)), most))

    def evict(
        self,
        victims: Sequence[Candidate],
        refuges: Mapping[Hashable, Copy] = MappingProxyType({}),
        *,
        held: bool = False,
    ) -> bool:
        """Drop all victims; or none, if one of them has moved or is held by now. They die with the caller's list.

        With `held` it drops those that are still there.

        Args:
            victims: From `candidates`, with the same `held`.
            refuges: Copies at the level below, by key; these entries move there. An entry that a reader holds, or has
                written into, does not move: its copy may be of other bytes.
            held: See `candidates`.
        """
        with self._lock:
            standing = [one.entry for one in victims if self._can_evict_locked(one, held)]
            if len(standing) < len(victims) and not held:
                return False
            self._ledger.evicted(standing, is_low=self._is_low)
            gone = []
            for entry in standing:
                is_copy = not (entry.is_changed or (held and self._is_in_use_locked(entry)))
                if is_copy and (refuge := refuges.get(entry.key)) is not None:
                    self._levels.sink(entry, refuge)
                else:
                    gone.append(entry)
            self._levels.drop(gone)
            return True

    def missing(
        self, keys: Iterable[Hashable], expected: Mapping[Hashable, Promise] = MappingProxyType({})
    ) -> list[Hashable]:
        """Those of `keys` that a call at this level would have to fetch, or to copy. Counts no look-up."""
        with self._lock:
            entries = [(key, self._entries.get(key) or self._above.get(key)) for key in keys]
            return [
                key
                for key, entry in entries
                if entry is None
                or entry.copy is None
                or not entry.is_owned_as(expected.get(key))
                or (self._mutations.is_on and not self._mutations.is_error and entry.is_changed)
            ]

    def find(self, key: Hashable) -> tuple[torch.Tensor, Completion | None] | None:
        """An alias of a shard that is READY at this level, safe to read after the completion. Counts no look-up.

        Raises `MutatedError` as `claim` does.
        """
        found, changed = None, list[Entry]()
        with self._lock:
            self._drop_changed_locked([key], {}, changed)
            entry = self._entries.get(key)
            if entry is not None and (at := entry.copy) is not None:
                self._entries.move_to_end(key)
                found = aliases_of([at.counted])[0], at.completion
        if changed:
            self._mutations.tell(changed)
        return found

    def aliases(self, keys: Iterable[Hashable]) -> list[tuple[Copy, torch.Tensor]]:
        """The copies of the READY shards among `keys`, and an alias of each. Counts no look-up."""
        with self._lock:
            found = [one.copy for key in keys for one in self._levels.at(key) if one.copy is not None]
            return list(zip(found, aliases_of([one.base for one in found]), strict=True))

    def compare_checksums(self, checksums: Iterable[tuple[Copy, int]]) -> None:
        """Note the first checksum of each copy. The next look-up finds a copy changed that has another one by now."""
        with self._lock:
            for one, checksum in checksums:
                if one.checksum is None:
                    one.checksum = checksum
                elif one.checksum != checksum:
                    one.version = DOUBTED

    def adopt(self, holding: Holding, entries: Iterable[Entry]) -> None:
        """Let a scope drop these at its end. If the scope is over, the next open one around it does."""
        with self._lock:
            holder: Holding | None = holding
            while holder is not None and holder.is_over:
                holder = holder.outer
            if holder is None:
                return
            holder.keys.update((one.generation, one.key) for one in entries)
            if len(over := holder.keys) > holder.prune_at:
                holder.keys = {entry.generation: entry.key for entry in self._levels.held(holder)}
                holder.prune_at = max(holder.prune_at, 2 * len(holder.keys))
        del over  # keys may be anything, and die outside the lock

    def held_by(self, holding: Holding) -> list[Entry]:
        """The READY entries that a scope will drop."""
        with self._lock:
            return [entry for entry in self._levels.held(holding) if entry.state is State.READY]

    def end_scope(self, holding: Holding) -> list[Entry]:
        """Drop the shards that were fetched inside a scope, but for kept ones; return the READY ones, as `remove`."""
        with self._lock:
            self._levels.num_removals += 1
            held, over = self._levels.held(holding), holding.keys
            holding.keys, holding.is_over = {}, True
            dropped = self._levels.drop(held)
            # The end of an inner scope ends no step: shards of the outer one have outlived nothing yet.
            self._ledger.cleared(dropped, ends_step=holding.outer is None)
        del over  # keys may be anything, and die outside the lock
        return dropped.entries

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), "mutations": self._mutations.num_found}

    def report(self) -> dict[str, Any]:
        """The index's part of a report, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), **self._ledger.details(), "mutations": self._mutations.num_found}

    def oldest(self, most: int, *, is_outlived: bool = False) -> list[EntryInfo]:
        """The oldest READY entries, oldest first. `is_outlived`: only those that outlived clears, and are not kept."""
        with self._lock:
            entries = (entry for key in self._ledger.births for entry in self._levels.at(key))
            wanted = (entry for entry in entries if entry.state is State.READY)
            if is_outlived:
                wanted = (one for one in itertools.takewhile(self._ledger.is_outlived, wanted) if not one.is_kept)
            return [self._ledger.about(entry) for entry in itertools.islice(wanted, most)]

    def keep(self, keys: Iterable[Hashable], found: Claim) -> None:
        """Mark shards that a call found, cached or on their way, as meant to outlive clears: they are no leak."""
        with self._lock:
            for key in keys:
                claimed = found.claimed.get(key)
                is_rival = claimed is not None and claimed.flight.replaces is not None
                for entry in [claimed] if claimed is not None and is_rival else self._levels.at(key):
                    if key not in found.refused:
                        self._ledger.kept(entry)

    def came_from(self, entries: Iterable[Entry], node: str) -> None:
        """Note the node that PENDING entries are asked of, so that a clear of the node finds them."""
        with self._lock:
            for entry in entries:
                if not entry.flight.is_copy:
                    entry.node = node

    def release(self, entries: Iterable[Entry]) -> None:
        """Note that a call has handed these out, or will not. It no longer keeps them from eviction."""
        with self._lock:
            for entry in entries:
                entry.num_awaiting -= 1

    def _look_up_locked(self, keys: Collection[Hashable], found: Claim) -> tuple[dict[Hashable, Copy], int, int]:
        """Join or claim missing shards; return the copies of the others, their bytes, and how many are below."""
        ready: dict[Hashable, Copy] = {}
        missing: list[Hashable] = []
        nbytes = num_low = 0
        for key, promise in zip(keys, map(found.expected.get, keys), strict=True):
            table = self._entries if key in self._entries else self._above
            if (entry := table.get(key)) is None:
                missing.append(key)
                continue
            # Equal ones are mostly one object: looking into two for each of thousands costs a quarter of the hit.
            if entry.promise is not promise and promise is not None and self._is_other_locked(entry, promise, found):
                continue
            if (at := entry.copy) is None:
                entry.join()
                found.joined[key] = entry
                continue
            table.move_to_end(key)
            ready[key] = at
            nbytes += at.nbytes
            num_low += (is_low := self._is_low and table is self._entries)
            if at.completion is not None:
                found.completions[at.completion] = is_low
        self._claim_locked(missing, found)
        return ready, nbytes, num_low

    def _claim_locked(self, missing: list[Hashable], found: Claim) -> None:
        """Claim missing shards: each a fetch, or a copy of the shard below."""
        flight, pending = Flight(deadline=found.deadline), State.PENDING  # one flight for all fetches
        generations, claimed, below = self._levels.generations, found.claimed, self._below
        is_indexed = found.num_removals == self._levels.num_removals
        for key, promise in zip(missing, map(found.expected.get, missing), strict=True):
            if (low := below.get(key)) is None:
                entry = Entry(key, next(generations), flight, pending, "", promise)
            elif promise is not None and self._is_other_locked(low, promise, found):
                continue
            else:
                entry = self._copy_of_locked(low, found)
            claimed[key] = entry
            if is_indexed:
                self._entries[key] = entry  # second: whatever interrupts this, the caller can abort it

    def _copy_of_locked(self, low: Entry, found: Claim) -> Entry:
        """Claim a copy of a shard that is below, or will be. It stays there until the copy has landed or failed."""
        if low.copy is None:
            low.join()
        else:
            low.num_awaiting += 1
        found.below[low.key] = low
        flight = Flight("follow" if low.copy is None else "rise", found.deadline)
        return Entry(low.key, low.generation, flight, node=low.node, promise=low.promise)

    def _is_other_locked(self, entry: Entry, promise: Promise, found: Claim) -> bool:
        """Refuse an entry that is not as the caller expects, or claim the shard of the expected owner.

        Returns whether it did either. `Fetch` compares a shard that is on its way once it is here.
        """
        if entry.promise == promise:
            return False
        if not entry.is_owned_as(promise):
            self._claim_rival_locked(entry, promise, found)
            return True
        if entry.copy is not None and not entry.is_tensor_of(promise):
            assert entry.promise is not None
            found.refused[entry.key] = entry.promise
            return True
        return False

    def _claim_rival_locked(self, entry: Entry, promise: Promise, found: Claim) -> None:
        """Claim the same key of another owner. The entry stays until the claim has landed, which may never happen."""
        is_indexed = found.num_removals == self._levels.num_removals
        replaces = (entry.generation, self._levels.num_removals) if is_indexed else None
        flight = Flight(deadline=found.deadline, replaces=replaces)
        found.claimed[entry.key] = Entry(entry.key, next(self._levels.generations), flight, promise=promise)

    def _drop_changed_locked(
        self, keys: Iterable[Hashable], expected: Mapping[Hashable, Promise], changed: list[Entry]
    ) -> None:
        """Drop those of `keys` that a reader wrote into, of the owner that the caller means. Policy "ignore": none.

        Args:
            keys: May be indexed.
            expected: See `claim`.
            changed: Gets the dropped entries, for the caller to let die outside the lock, after `Mutations.tell`.
        Raises:
            MutatedError: There are some, and the policy is "error": none was dropped, and `changed` is empty.
        """
        if self._mutations.is_on:
            changed += lending.changed_in(self._levels.tables, keys, expected)
        if changed:
            self._mutations.found(changed)
            self._levels.drop(changed)

    def _can_evict_locked(self, one: Candidate, held: bool) -> bool:
        entry = one.entry
        if entry.copy is not one.copy or not one.copy.nbytes or self._entries.get(entry.key) is not entry:
            return False
        return held or not self._is_in_use_locked(entry)

    def _is_in_use_locked(self, entry: Entry) -> bool:
        """Whether a reader holds its block, or is about to."""
        return entry.num_awaiting > 0 or (entry.copy is not None and lending.is_lent(entry.copy, self._is_held))

    def _take_place_locked(self, entry: Entry, left: list[Entry]) -> None:
        """Index a landed shard in the place of another owner's, unless a drop on request came meanwhile."""
        old = next(iter(self._levels.at(entry.key)), None)
        if old is not None and entry.flight.replaces == (old.generation, self._levels.num_removals):
            left += self._levels.drop([old]).entries
            self._entries[entry.key] = entry

    def _rise_locked(self, entry: Entry, left: list[Entry]) -> None:
        """Let a landed copy take the place of the shard below; forget the copy if it may not."""
        low = self._below.get(entry.key)
        if low is None or low.generation != entry.generation or not self._can_rise_locked(low):
            self._levels.forget(entry)
            return
        self._levels.rise(entry, low)
        left.append(low)

    def _can_rise_locked(self, low: Entry) -> bool:
        if low.state is not State.READY or self._is_in_use_locked(low):
            return False
        return not (self._mutations.is_on and low.is_changed)

    def _land_locked(
        self, landings: Iterable[tuple[Entry, Copy]], node: str, completion: Completion | None
    ) -> list[Entry]:
        """Give entries their bytes, but for entries that their calls gave up on meanwhile."""
        landed = []
        for entry, one in landings:
            if entry.copy is not None or entry.flight.error is not None:  # as `is_settled`, for thousands
                continue
            one.completion = completion
            entry.copy, entry.node = one, node
            if entry.promise is None:
                owner = None if entry.is_fetch else node or None
                entry.promise = one.base.dtype, tuple(one.base.shape), owner
            landed.append(entry)
        if self.below is not None:
            for entry in landed:
                if entry.flight.is_copy:
                    self._levels.let_go_below(entry)
        self._ledger.landed(landed, node)
        return landed


def tensors_of(dropped: list[Entry]) -> list[torch.Tensor]:
    """Take the tensors from dropped entries. An entry that more than the list refers to keeps its own, for a call."""
    found: list[torch.Tensor] = []
    for entry in dropped:
        if getrefcount(entry) == UNSHARED and (one := entry.copy) is not None:
            found += one.tensors
            entry.copy = None
            del one
    return found


def _wake(entries: Iterable[Entry]) -> None:
    """Resolve the futures of settled entries. Outside the lock: done-callbacks may do anything."""
    waited_for = [landed for entry in entries if (landed := entry.flight.landed) is not None]
    with contextlib.ExitStack() as stack:  # each, also behind one whose callback raises, as `sys.exit` does
        for landed in waited_for:
            stack.callback(landed.set_result, None)  # not the entry: a cycle would keep its block until a collection
