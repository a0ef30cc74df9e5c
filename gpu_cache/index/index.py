"""The index: key -> entry, one flight per key. Owns the index lock; every decision about an entry is made here."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from sys import getrefcount
from types import MappingProxyType
from typing import Any
from weakref import getweakrefcount

import torch

from gpu_cache.errors import PromiseError, failure_reason
from gpu_cache.index.entry import Candidate, Claim, Entry, Holding, Parked, Promise, State
from gpu_cache.index.ledger import Ledger
from gpu_cache.index.mutation import DOUBTED, Mutations
from gpu_cache.pool.block import Landing
from gpu_cache.pool.lease import UNSHARED, Lease, num_owners
from gpu_cache.report.schema import EntryInfo


class ShardIndex:
    """Entries by key, in order of use.

    Args:
        alias: Makes tensors to hand out from entries' bases; must be quick, it runs under the lock.
        is_held: Whether somebody but the index holds a base.
        now: Seconds, monotonic.
        mutations: What is done about entries that a reader wrote into; None: nothing.
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
        mutations: Mutations | None = None,
        is_held_beside_loan: Callable[[torch.Tensor], bool] | None = None,
        broken: Callable[[Hashable, Promise, Promise], Exception] = PromiseError,
    ) -> None:
        # Guards _entries, _ledger, _num_removals, _is_closed, and the fields of every entry.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()  # least recently used first
        self._ledger = Ledger(now)
        self._generations = itertools.count(1)
        self._num_removals = 0  # calls that dropped entries on request, whether or not there were any
        self._is_closed = False
        self._alias, self._mutations = alias, mutations or Mutations()
        self._is_held, self._is_held_beside_loan = is_held, is_held_beside_loan or is_held
        self.broken = broken

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

    def keys(self) -> list[Hashable]:
        """Keys of the READY entries, oldest first."""
        with self._lock:
            return list(self._ledger.births)

    def is_parked(self, key: Hashable) -> bool:
        """Whether a key is in the host tier."""
        with self._lock:
            return (entry := self._entries.get(key)) is not None and entry.parked is not None

    def note_fetch(self, node: str, *, begins: bool) -> None:
        """A reader of a node begins to deliver, or has ended."""
        with self._lock:
            self._ledger.fetching(node, begins=begins)

    def note_answer(self, node: str, seconds: float) -> None:
        """An answer of a node took so long, from the request to its last byte."""
        with self._lock:
            self._ledger.answered(node, seconds)

    @property
    def is_closed(self) -> bool:
        """Whether nothing is indexed any more."""
        return self._is_closed

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached or on its way."""
        return not self._entries

    def hits(
        self, keys: Sequence[Hashable], expected: Mapping[Hashable, Promise]
    ) -> tuple[list[torch.Tensor], dict[Any, None]] | None:
        """The way of most calls: a tensor of each key, in order, if all are plain hits; else None, and `claim` decides.

        A plain hit is on the device, is what the caller expects, and was not written into. A key may repeat. Nothing is
        counted unless all are plain hits.

        Returns:
            The tensors, and the completions that they are safe to read after, each once.
        """
        lent: list[torch.Tensor] = []
        left: list[torch.Tensor | None] = []  # loans that readers keep, to die outside the lock
        completions: dict[Any, None] = {}
        is_checked, nbytes, latest = self._mutations.is_on, 0, None
        with self._lock:
            find, touch = self._entries.get, self._entries.move_to_end
            for key, promise in zip(keys, map(expected.get, keys), strict=True):
                entry = find(key)
                if entry is None or (base := entry.base) is None:
                    return None
                # Equal ones are mostly one object: looking into two for each of thousands costs a quarter of the hit.
                if promise is not None and entry.promise is not promise and entry.promise != promise:
                    return None
                loan = entry.loan
                if is_checked and (base if loan is None else loan)._version != entry.version:
                    return None
                # As `_loan_locked`, whose call would cost a tenth of the hit.
                if (
                    loan is None
                    or getrefcount(loan) != UNSHARED
                    or num_owners(loan) != 1
                    or getweakrefcount(loan)
                    or loan.requires_grad
                    or loan.grad is not None
                    or loan.__dict__
                ):
                    loan = self._alias_locked(entry, base, left)
                else:
                    loan.data = base
                lent.append(loan)
                touch(key)
                nbytes += entry.nbytes
                if (completion := entry.completion) is not latest and completion is not None:
                    completions[completion], latest = None, completion
            self._ledger.counters.hits += len(lent)
            self._ledger.counters.hit_bytes += nbytes
        return lent, completions

    def claim(
        self,
        keys: Collection[Hashable],
        found: Claim | None = None,
        deadline: float = 0.0,
        *,
        hands_out: bool = True,
        on_host: bool = False,
    ) -> Claim:
        """Look distinct keys up: each is a hit, a join (somebody is fetching it) or a claim, which the caller must
        end with `publish`, `deliver` or `abort`. `found` is filled and returned: who passes it can do so whatever
        interrupts this, and can look up again what it lacks. Those who join a claim may give it up after `deadline`.

        Of a call that looks up again after something was cleared, claims are not indexed: the clear may have meant
        them, and a call that began before it must not bring them back.

        A cached shard of another dtype or shape than `found.expected` says is `refused`, and stays. One of another
        owner is a miss; what is fetched takes its place when it lands.

        Where tensors are to be handed out, an entry that a reader wrote into is dropped, and is a miss. With `on_host`
        what is in the host tier is a hit there; else a claim, of a copy to the device.

        Raises:
            MutatedError: There is one, and that is how the policy wants it. Nothing was claimed.
        """
        found = Claim() if found is None else found
        ready: dict[Hashable, Entry | Parked] = {}
        changed: list[Entry] = []
        with self._lock:
            if hands_out and self._mutations.is_on:
                self._drop_changed_locked(keys, found.expected, changed)
                found.mutated.update((entry.key, None) for entry in changed)
            entries, hit_bytes, num_parked = self._entries, 0, 0
            self._begin_locked(found, deadline)
            for key, promise in zip(keys, map(found.expected.get, keys), strict=True):
                if (entry := entries.get(key)) is None:
                    self._claim_locked(key, promise, found)
                    continue
                # Equal ones are mostly one object: looking into two for each of thousands costs a quarter of the hit.
                if (
                    entry.promise is not promise
                    and promise is not None
                    and self._is_other_locked(entry, promise, found)
                ):
                    continue
                place = entry.parked or entry
                if place.base is None or (entry.moving is not None and not on_host):
                    self._join_locked(entry.moving or entry, found)
                    continue
                entries.move_to_end(key)
                if place is not entry and not on_host:
                    self._bring_back_locked(entry, found)
                    continue
                ready[key] = place
                hit_bytes += entry.nbytes
                num_parked += place is not entry
                if place.completion is not None:
                    (found.completions if place is entry else found.host_completions)[place.completion] = None
            left: list[torch.Tensor | None] = []
            for key, place in ready.items():
                found.hits[key] = self._loan_locked(place, left)
            self._ledger.claimed(found, len(ready), hit_bytes, num_parked)
        del left
        self._mutations.tell(changed)
        return found

    def lend(self, places: Mapping[Hashable, Entry | Parked]) -> dict[Hashable, torch.Tensor]:
        """A tensor for one reader, of each of the shards that are there."""
        left: list[torch.Tensor | None] = []
        with self._lock:
            lent = {key: self._loan_locked(place, left) for key, place in places.items()}
        del left
        return lent

    def reserve(self, key: Hashable, deadline: float = 0.0) -> Entry | None:
        """A claim on one key that counts as no look-up; None if the key has an entry. `deadline` as for `claim`."""
        with self._lock:
            if key in self._entries:
                return None
            entry = Entry(key, next(self._generations), is_fetch=False, num_awaiting=1, deadline=deadline)
            return self._entries.setdefault(key, entry)

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
        """Give up on those of `entries` that are still PENDING; whoever waits for one gets `error`."""
        reason = failure_reason(error)
        with self._lock:
            failed = [entry for entry in entries if not entry.is_settled]
            origins = [self._settle_move_locked(entry) for entry in failed]
            for entry in failed:
                entry.error = error
                self._drop_locked(entry)
            self._ledger.failed(failed, reason)
        del origins
        _wake(failed)

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
                is_copy = refuge is not None and not entry.is_changed
                is_copy = is_copy and not (held and self._is_in_use_locked(entry, entry))
                loans.append(entry.place.loan)
                entry.place.loan = None
                if refuge is None or not is_copy:
                    self._drop_locked(entry)
                    continue
                self._ledger.moved(entry, refuge)
                entry.base = entry.lease = entry.completion = None
            return True

    def missing(
        self,
        keys: Iterable[Hashable],
        expected: Mapping[Hashable, Promise] = MappingProxyType({}),
        *,
        on_host: bool = False,
    ) -> list[Hashable]:
        """Those of `keys` that a call would have to fetch, or (unless `on_host`) to copy. Counts nothing."""
        with self._lock:
            entries = [(key, self._entries.get(key)) for key in keys]
            return [
                key
                for key, entry in entries
                if entry is None
                or (entry.place if on_host else entry).base is None
                or not entry.is_owned_as(expected.get(key))
                or (self._mutations.is_on and not self._mutations.is_error and entry.is_changed)
            ]

    def find(self, key: Hashable) -> tuple[torch.Tensor, Entry] | None:
        """An alias of a READY entry, and the entry; counts as no look-up. Raises `MutatedError` as `claim` does."""
        found, changed = None, list[Entry]()
        with self._lock:
            if self._mutations.is_on:
                self._drop_changed_locked([key], {}, changed)
            entry = self._entries.get(key)
            if entry is not None and entry.base is not None:
                self._entries.move_to_end(key)
                assert entry.counted is not None
                found = self._alias([entry.counted])[0], entry
        self._mutations.tell(changed)
        return found

    def aliases(self, keys: Iterable[Hashable]) -> list[tuple[Entry, Any, torch.Tensor]]:
        """READY entries, the completion and an alias of each; counts as no look-up."""
        with self._lock:
            entries = [entry for entry in map(self._entries.get, keys) if entry is not None]
            found = [(entry, place, place.base) for entry in entries if (place := entry.place).base is not None]
            aliases = self._alias([base for _, _, base in found])
            return [(entry, place.completion, alias) for (entry, place, _), alias in zip(found, aliases, strict=True)]

    def compare_checksums(self, checksums: Iterable[tuple[Entry, int]]) -> None:
        """Note an entry's first checksum; let one that has another by now be found changed."""
        with self._lock:
            for entry, checksum in checksums:
                if entry.checksum is None:
                    entry.checksum = checksum
                elif entry.checksum != checksum:
                    entry.place.version = DOUBTED

    def adopt(self, holding: Holding, entries: Iterable[Entry]) -> None:
        """Drop these when a scope ends; of one that is over, when the next one around it does."""
        with self._lock:
            holder: Holding | None = holding
            while holder is not None and holder.is_over:
                holder = holder.outer
            if holder is None:
                return
            holder.keys.update((one.generation, one.key) for one in entries)
            if len(over := holder.keys) > holder.prune_at:
                holder.keys = {entry.generation: entry.key for entry in self._held_locked(holder)}
                holder.prune_at = max(holder.prune_at, 2 * len(holder.keys))
        del over  # keys may be anything, and die outside the lock

    def held_by(self, holding: Holding) -> list[Entry]:
        """The READY entries that a scope will drop."""
        with self._lock:
            return [entry for entry in self._held_locked(holding) if entry.state is State.READY]

    def end_scope(self, holding: Holding) -> list[Entry]:
        """Drop what was fetched inside a scope, but for what is meant to stay; return the READY ones, as `remove`."""
        with self._lock:
            self._num_removals += 1
            held, over = self._held_locked(holding), holding.keys
            holding.keys, holding.is_over = {}, True
            dropped = [entry for entry in held if entry.state is State.READY]
            for entry in held:
                self._drop_locked(entry)
            # What an outer scope holds has outlived no step yet.
            self._ledger.cleared(dropped, ends_step=holding.outer is None)
        del over  # keys may be anything, and die outside the lock
        return dropped

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), "mutations": self._mutations.num_found}

    def report(self) -> dict[str, Any]:
        """The index's part of a report, consistent in itself."""
        with self._lock:
            return {**self._ledger.stats(), **self._ledger.details(), "mutations": self._mutations.num_found}

    def oldest(self, most: int, *, is_outlived: bool = False) -> list[EntryInfo]:
        """The oldest READY entries, oldest first; only those that outlived clears and should not, if so wanted."""
        with self._lock:
            wanted = (self._entries[key] for key in self._ledger.births)
            if is_outlived:
                wanted = (one for one in itertools.takewhile(self._ledger.is_outlived, wanted) if not one.is_kept)
            return [self._ledger.about(entry) for entry in itertools.islice(wanted, most)]

    def keep(self, keys: Iterable[Hashable], found: Claim) -> None:
        """Say that what a call found is meant to outlive clears, cached or on its way: it is no leak."""
        with self._lock:
            for key in keys:
                claimed = found.claimed.get(key)
                entry = claimed if claimed is not None and claimed.replaces else self._entries.get(key)
                if entry is not None and key not in found.refused:
                    self._ledger.kept(entry)

    def came_from(self, entries: Iterable[Entry], node: str) -> None:
        """Say which node PENDING entries are asked of, so that clearing the node finds them."""
        with self._lock:
            for entry in entries:
                entry.node = node

    def release(self, entries: Iterable[Entry]) -> None:
        """A call that claimed or joined these has handed them out, or will not: it keeps them from eviction no more."""
        with self._lock:
            for entry in entries:
                entry.num_awaiting -= 1
                if entry.is_shared and entry.resident is not None:
                    entry.resident.num_awaiting -= 1

    def _loan_locked(self, place: Entry | Parked, left: list[torch.Tensor | None]) -> torch.Tensor:
        """The loan of a place, if no reader has it; else an alias, which is the loan from now on.

        An alias for each reader would cost twice the time. And dropping it would give the GIL away, in the reader's
        thread. A reader may have changed how a loan looks (`t_`, `resize_`, `data`): it is made to look like the base
        again, by a call that keeps the GIL. Loans that autograd knows of stay with their reader.
        Source: our measurement, torch 2.13: a loan 0.45 us, an alias and its drop 1.1, beside a busy thread 56 to 210.

        Args:
            place: A shard that is there.
            left: Gets the loan that was given up, for the caller to let die outside the lock.
        """
        loan, base = place.loan, place.base
        assert base is not None
        if (
            loan is None
            or getrefcount(loan) != UNSHARED
            or num_owners(loan) != 1
            or getweakrefcount(loan)
            or loan.requires_grad
            or loan.grad is not None
            or loan.__dict__
        ):
            return self._alias_locked(place, base, left)
        loan.data = base
        return loan

    def _alias_locked(self, place: Entry | Parked, base: torch.Tensor, left: list[torch.Tensor | None]) -> torch.Tensor:
        """Lend what a reader keeps a loan of, too."""
        (alias,) = self._alias([base if place.loan is None else place.loan])
        if place.loan is not None:
            alias.data = base
        left.append(place.loan)
        place.loan = alias
        return alias

    def _begin_locked(self, found: Claim, deadline: float) -> None:
        if found.num_removals is None:
            found.num_removals = self._num_removals
        found.is_current, found.deadline = found.num_removals == self._num_removals, deadline

    def _claim_locked(self, key: Hashable, promise: Promise | None, found: Claim) -> None:
        """Claim what is not there."""
        entry = found.claimed[key] = Entry(
            key, next(self._generations), num_awaiting=1, deadline=found.deadline, promise=promise
        )
        if found.is_current:
            self._entries[key] = entry  # second: whatever interrupts this, the caller can abort it

    def _is_other_locked(self, entry: Entry, promise: Promise, found: Claim) -> bool:
        """Refuse an entry that is not what the caller expects, or claim the shard of the owner that is meant.

        Whether either was done. What is on its way is compared when it is here.
        """
        if entry.promise == promise:
            return False
        if not entry.is_owned_as(promise):
            self._claim_rival_locked(entry, promise, found)
            return True
        if entry.has_arrived and not entry.is_tensor_of(promise):
            assert entry.promise is not None
            found.refused[entry.key] = entry.promise
            return True
        return False

    def _drop_changed_locked(
        self, keys: Iterable[Hashable], expected: Mapping[Hashable, Promise], changed: list[Entry]
    ) -> None:
        """Drop those of `keys` that a reader wrote into, and that are of the owner that the caller means.

        Args:
            keys: May be indexed.
            expected: By the caller.
            changed: Gets the dropped entries, for the caller to let die outside the lock, after `Mutations.tell`.
        Raises:
            MutatedError: There are some, and the policy is "error": none was dropped, and `changed` is empty.
        """
        changed += self._changed_locked(keys, expected)
        self._mutations.found(changed)
        for entry in changed:
            self._drop_locked(entry)

    def _changed_locked(self, keys: Iterable[Hashable], expected: Mapping[Hashable, Promise]) -> list[Entry]:
        """See `_drop_changed_locked`, which may raise: this frame, which refers to blocks, is over by then."""
        changed = []
        for entry in map(self._entries.get, keys):
            if entry is None:
                continue
            place = entry.parked or entry
            # As `is_changed`, whose calls would double what this costs.
            counted = place.base if (loan := place.loan) is None else loan
            if counted is not None and counted._version != place.version and entry.is_owned_as(expected.get(entry.key)):
                changed.append(entry)
        return changed

    def _claim_rival_locked(self, entry: Entry, promise: Promise, found: Claim) -> None:
        """Claim the same key of another owner. The entry stays until that has landed: it may never."""
        rival = found.claimed[entry.key] = Entry(
            entry.key, next(self._generations), num_awaiting=1, deadline=found.deadline, promise=promise,
        )  # fmt: skip
        if found.is_current:
            rival.replaces = entry.generation, self._num_removals

    def _join_locked(self, entry: Entry, found: Claim) -> None:
        """Wait with whoever fetches it, or brings it back."""
        found.joined[entry.key] = entry
        entry.num_joined, entry.num_awaiting = entry.num_joined + 1, entry.num_awaiting + 1
        entry.flight = entry.flight or Future()

    def _bring_back_locked(self, entry: Entry, found: Claim) -> None:
        """Claim what is in the host tier, for the device."""
        moving = Entry(entry.key, next(self._generations), is_fetch=False, num_awaiting=1, deadline=found.deadline)
        moving.resident, moving.origin, moving.promise = entry, entry.parked, entry.promise
        found.claimed[entry.key] = entry.moving = moving

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
        return not (self._mutations.is_on and resident.is_changed)

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

    def _stands_locked(self, entry: Entry) -> bool:
        """Whether this generation of the key is the one that the index knows: not cleared, evicted or refetched."""
        current = self._entries.get(entry.key)
        return current is not None and current.generation == entry.generation

    def _drop_locked(self, entry: Entry) -> None:
        """Forget an entry; PENDING ones keep flying, for those who wait."""
        if self._stands_locked(entry):
            del self._entries[entry.key]
        if entry.state is State.READY:
            self._ledger.dropped(entry)
        entry.state = State.GONE

    def _held_locked(self, holding: Holding) -> list[Entry]:
        """What of a scope's is indexed still, in the generation that it fetched, and not meant to stay."""
        found = ((self._entries.get(key), generation) for generation, key in holding.keys.items())
        return [entry for entry, generation in found if entry and generation == entry.generation and not entry.is_kept]


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
        if entry.flight is not None:
            entry.flight.set_result(None)  # not the entry: a cycle would keep its block until a collection
