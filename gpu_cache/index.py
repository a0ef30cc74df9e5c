"""The index: key -> entry, one flight per key. Owns the index lock; every decision about an entry is made here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from sys import getrefcount
from types import MappingProxyType
from typing import Any

import torch

from gpu_cache.claims import ClaimingIndex
from gpu_cache.entry import Candidate, Entry, Landing, Parked, Promise, State
from gpu_cache.errors import PromiseError, failure_reason
from gpu_cache.lease import UNSHARED, Lease, num_owners
from gpu_cache.mutation import Doubts


class ShardIndex(ClaimingIndex):
    """Entries by key, in order of use.

    Args:
        alias: Makes tensors to hand out from entries' bases; must be quick, it runs under the lock.
        is_held: Whether somebody but the index holds a base.
        now: Seconds, monotonic.
        doubts: What is done about entries that somebody wrote into; None: nothing.
        is_held_beside_loan: The same, where the index has an alias of it to lend; None: as `is_held`.
        broken: The error for a key whose shard is not as promised, of the promise and of what there is.
    Thread-safety: any thread. Methods that drop entries return them, so that tensors die outside the lock.
    Source: two-phase insert (reserve, then publish or abort) after vLLM's KV-cache off-loading.
    """

    def __init__(
        self,
        alias: Callable[[Iterable[torch.Tensor]], list[torch.Tensor]],
        is_held: Callable[[torch.Tensor], bool],
        now: Callable[[], float] = time.monotonic,
        doubts: Doubts | None = None,
        is_held_beside_loan: Callable[[torch.Tensor], bool] | None = None,
        broken: Callable[[Hashable, Promise, Promise], Exception] = PromiseError,
    ) -> None:
        super().__init__(alias, now, doubts or Doubts())
        self._is_held, self._is_held_beside_loan = is_held, is_held_beside_loan or is_held
        self.broken = broken

    def publish(
        self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any, *, parked: bool = False
    ) -> list[Parked | Entry]:
        """Make arrived shards READY; a clear that came meanwhile wins, then only those already waiting get them.

        One that was brought back leaves the host tier, unless somebody holds it there, who may have written into it
        while it was copied, or is about to hand it out there: then only those who waited for the copy have that.

        Args:
            landings: Entries, and what arrived for each.
            node: Where from.
            completion: Of the copy that filled them; None: nothing to wait for.
            parked: Whether they are in the host tier now.
        Returns:
            What left the host tier with it, or gave way to another owner's, for the caller to let die.
        """
        with self._lock:
            landed, origins = self._land_locked(landings, node, completion, parked)
            left: list[Parked | Entry] = [*origins]
            left += [old for entry in landed if entry.replaces and (old := self._take_place_locked(entry))]
            standing = [entry for entry in landed if self._stands_locked(entry)]
            if self._is_closed:
                for entry in standing:
                    self._drop_locked(entry)
            else:
                self._ledger.indexed(standing, node)
            for entry in landed:
                if (resident := entry.resident) is not None and self._can_leave_locked(resident):
                    self._ledger.moved(resident, None)
                    resident.base, resident.loan, resident.lease = entry.base, entry.loan, entry.lease
                    resident.completion = completion
                    resident.num_awaiting, entry.is_shared = entry.num_awaiting, True
                    resident.version = entry.version
        _wake(landed)
        return left

    def deliver(
        self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any, *, parked: bool = False
    ) -> list[Parked]:
        """Hand shards that arrived to those who wait for them, without caching: the pool had no room.

        One from the host tier stays there. Returns what the caller is to let die.
        """
        with self._lock:
            landed, origins = self._land_locked(landings, node, completion, parked)
            for entry in landed:
                self._drop_locked(entry)
            self._ledger.overflowed(landed)
        _wake(landed)
        return origins

    def abort(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Give up on those of `entries` that are still PENDING; whoever waits for one gets `error`, or what it was to
        replace.
        """
        reason = failure_reason(error)
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            origins = [self._settle_move_locked(entry) for entry in failed]
            kept = [entry for entry in failed if self._falls_back_locked(entry, error)]
            self._ledger.failed(failed, reason)
        del origins
        _wake(failed)
        self._doubts.tell_kept(kept, error)

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
                if entry.state is State.READY:
                    dropped.append(entry)
                self._drop_locked(entry)
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
            dropped = [entry for entry, lease in known if entry is not None and lease is (entry.parked or entry).lease]
            for entry in dropped:
                self._drop_locked(entry)
            self._ledger.died(dropped)

    def candidates(self, most: int | None = None, *, parked: bool = False, held: bool = False) -> list[Candidate]:
        """What may be evicted, the least recently used first.

        Args:
            most: No more than so many.
            parked: From the host tier, not from the device.
            held: Also what somebody else holds, or is about to hand out.
        """
        with self._lock:
            places = ((entry, entry.parked if parked else entry) for entry in self._entries.values())
            found = (
                Candidate(
                    entry, place.base, place.lease, place.completion, held and self._is_in_use_locked(entry, place)
                )
                for entry, place in places
                if place is not None and place.base is not None
            )
            return list(itertools.islice((one for one in found if self._can_evict_locked(one, parked, held)), most))

    def evict(
        self,
        victims: Sequence[Candidate],
        refuges: Mapping[Hashable, Parked] = MappingProxyType({}),
        *,
        parked: bool = False,
        held: bool = False,
        loans: list[torch.Tensor | None] | None = None,
    ) -> bool:
        """Drop all of these, or none if one is elsewhere or held by now. They die with the caller's `victims`.

        Args:
            victims: From `candidates`, with the same `parked` and `held`.
            refuges: Copies in the host tier, by key. Of these the entries stay, and go there; but not of those that
                somebody holds or has written into by now, of which the copy may be of other bytes.
            parked: See `candidates`.
            held: See `candidates`.
            loans: Gets theirs, for the caller to let die.
        """
        loans = [] if loans is None else loans
        with self._lock:
            if not all(self._can_evict_locked(one, parked, held) for one in victims):
                return False
            self._ledger.evicted([one.entry for one in victims], parked=parked)
            for entry, *_ in victims:
                refuge = refuges.get(entry.key)
                is_copy = refuge is not None and entry.is_original
                is_copy = is_copy and not (held and self._is_in_use_locked(entry, entry))
                loans.append(entry.place.loan)
                entry.place.loan = None
                if refuge is None or not is_copy:
                    self._drop_locked(entry)
                    continue
                self._ledger.moved(entry, refuge)
                entry.base = entry.lease = entry.completion = None
            return True

    def _can_evict_locked(self, one: Candidate, parked: bool, held: bool) -> bool:
        entry = one.entry
        place = entry.parked if parked else entry
        if place is None or place.base is None or place.lease is not one.lease or not entry.nbytes or entry.moving:
            return False
        return self._stands_locked(entry) and (held or not self._is_in_use_locked(entry, place))

    def _is_in_use_locked(self, entry: Entry, place: Entry | Parked) -> bool:
        """Whether somebody holds its block, or is about to."""
        if entry.num_awaiting > 0 or place.base is None:
            return entry.num_awaiting > 0
        if (loan := place.loan) is None:
            return self._is_held(place.base)
        is_lent = getrefcount(loan) != UNSHARED or num_owners(loan) != 1
        return is_lent or self._is_held_beside_loan(place.base)

    def _settle_move_locked(self, entry: Entry) -> Parked | None:
        """It is brought back, or will not be; returns what it was copied from, which must not die under the lock."""
        origin, entry.origin = entry.origin, None
        if entry.resident is not None and entry.resident.moving is entry:
            entry.resident.moving = None
        return origin

    def _take_place_locked(self, entry: Entry) -> Entry | None:
        """Index what landed instead of another owner's shard; not if that went, or anything was dropped, meanwhile."""
        assert entry.replaces is not None
        old = self._entries.get(entry.key)
        if old is None or entry.replaces != (old.generation, self._num_removals):
            return None
        self._drop_locked(old)
        self._entries[entry.key] = entry
        return old

    def _can_leave_locked(self, resident: Entry) -> bool:
        """Whether a shard of the host tier, of which there is a copy on the device by now, may be known there only."""
        parked = resident.parked
        if parked is None or not self._stands_locked(resident) or self._is_in_use_locked(resident, parked):
            return False
        return not (self._doubts.is_on and resident.is_changed)

    def _land_locked(
        self, landings: Iterable[tuple[Entry, Landing]], node: str, completion: Any, parked: bool
    ) -> tuple[list[Entry], list[Parked]]:
        """Give entries their tensors, but for those that their calls gave up on meanwhile."""
        landed, origins = [], []
        for entry, landing in landings:
            if entry.is_settled:
                continue
            version = landing.version
            if parked:
                entry.parked = Parked(landing.base, landing.lease, completion, version, landing.loan)
            else:
                entry.base, entry.loan, entry.lease = landing.base, landing.loan, landing.lease
                entry.completion = completion
            entry.node, entry.nbytes, entry.version = node, landing.nbytes, version
            if entry.promise is None:
                owner = None if entry.is_fetch else node or None
                entry.promise = landing.base.dtype, tuple(landing.base.shape), owner
            landed.append(entry)
            if (origin := self._settle_move_locked(entry)) is not None:
                origins.append(origin)
        self._ledger.landed(landed, node)
        return landed, origins


def tensors_of(dropped: list[Entry]) -> list[torch.Tensor]:
    """Take the tensors from dropped entries that only the list refers to; a call may yet hand out those of others."""
    found: list[torch.Tensor] = []
    for entry in dropped:
        if getrefcount(entry) != UNSHARED:
            continue
        for place in (entry,) if entry.parked is None else (entry, entry.parked):
            if place.base is not None:
                found.append(place.base)
            if place.loan is not None:
                found.append(place.loan)
        entry.base = entry.loan = entry.parked = None
    return found


def _wake(entries: Iterable[Entry]) -> None:
    """Resolve the flights of settled entries. Outside the lock: done-callbacks are somebody else's code."""
    for entry in entries:
        entry.suspect = None  # nor may a block that was replaced die under the lock
        if entry.flight is not None:
            entry.flight.set_result(None)  # not the entry: a cycle would keep its block until a collection
