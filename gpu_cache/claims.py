"""The part of an index that looks keys up: each is a hit, a join or a claim."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

import torch

from gpu_cache.entry import Claim, Entry, Parked, Promise
from gpu_cache.lease import UNSHARED, num_owners
from gpu_cache.scoped_index import ScopedIndex


class ClaimingIndex(ScopedIndex):
    """Entries, one flight for each key that is asked for."""

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
        is_checked, nbytes, latest = self._doubts.is_on, 0, None
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
            self._ledger.hit(len(lent), nbytes)
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

        Where tensors are to be handed out, an entry that somebody wrote into is claimed as a miss of a new generation.
        With `on_host` what is in the host tier is a hit there; else a claim, of a copy to the device.

        Raises:
            MutatedError: There is one, and that is how the policy wants it. Nothing was claimed or counted.
        """
        found = Claim() if found is None else found
        ready: dict[Hashable, Entry | Parked] = {}
        unverified: list[Entry] = []
        checks = hands_out and self._doubts.is_on
        with self._lock:
            if checks and self._doubts.is_error:
                keys = list(keys)
                self._doubts.refuse_changed(self._entries, self._meant_locked(keys, found))
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
                if (base := place.base) is None or (entry.moving is not None and not on_host):
                    self._join_locked(entry.moving or entry, found)
                    continue
                if checks and (base if place.loan is None else place.loan)._version != place.version:
                    if entry.is_fetch:
                        self._claim_anew_locked(entry, found)
                        continue
                    self._doubts.accept(entry)
                    unverified.append(entry)
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
        if unverified:
            self._doubts.tell_unverified(unverified)
        return found

    def lend(self, places: Mapping[Hashable, Entry | Parked]) -> dict[Hashable, torch.Tensor]:
        """A tensor for one reader, of each of the shards that are there."""
        left: list[torch.Tensor | None] = []
        with self._lock:
            lent = {key: self._loan_locked(place, left) for key, place in places.items()}
        del left
        return lent

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

    def _meant_locked(self, keys: Iterable[Hashable], found: Claim) -> list[Hashable]:
        """Those of `keys` that are indexed for the owner that the caller means."""
        known = [entry for key in keys if (entry := self._entries.get(key)) is not None]
        return [entry.key for entry in known if entry.is_owned_as(found.expected.get(entry.key))]

    def _claim_rival_locked(self, entry: Entry, promise: Promise, found: Claim) -> None:
        """Claim the same key of another owner. The entry stays until that has landed: it may never."""
        rival = found.claimed[entry.key] = Entry(
            entry.key, next(self._generations), num_awaiting=1, deadline=found.deadline, promise=promise,
            lineage=entry.lineage or entry.generation,
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

    def reserve(self, key: Hashable, deadline: float = 0.0) -> Entry | None:
        """A claim on one key that counts as no look-up; None if the key has an entry. `deadline` as for `claim`."""
        with self._lock:
            if key in self._entries:
                return None
            entry = Entry(key, next(self._generations), is_fetch=False, num_awaiting=1, deadline=deadline)
            return self._entries.setdefault(key, entry)
