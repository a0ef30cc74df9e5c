"""The part of an index that deals with entries that somebody wrote into."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from gpu_cache.entry import Claim, Entry, Promise, State
from gpu_cache.index_view import IndexView
from gpu_cache.mutation import DOUBTED, Doubts


class SuspectIndex(IndexView):
    """Entries, of which one that was written to is replaced by another generation: the suspect flies along with that.

    What cannot be fetched is settled with the suspect's tensor, so that those who wait get what is there.
    """

    def __init__(
        self,
        alias: Callable[[Iterable[torch.Tensor]], list[torch.Tensor]],
        now: Callable[[], float],
        doubts: Doubts,
    ) -> None:
        super().__init__(now)
        self._alias, self._doubts = alias, doubts
        self._generations = itertools.count(1)
        self._num_removals = 0  # calls that dropped entries on request, whether or not there were any
        self._is_closed = False

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`, consistent in itself."""
        return {**super().stats(), "mutations": self._doubts.num_found}

    def report(self) -> dict[str, Any]:
        """The index's part of a report, consistent in itself."""
        return {**super().report(), "mutations": self._doubts.num_found}

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
                or self._doubts.wants_refetch(entry)
            ]

    def find(self, key: Hashable) -> tuple[torch.Tensor, Entry] | None:
        """An alias of a READY entry, and the entry; counts as no look-up. Raises `MutatedError` as `claim` does."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.base is None:
                return None
            is_changed = self._doubts.is_on and entry.is_changed
            if is_changed:
                self._doubts.found_without_source(self._entries, entry)
            self._entries.move_to_end(key)
            assert entry.counted is not None
            found = self._alias([entry.counted])[0], entry
        if is_changed:
            self._doubts.tell_unverified([entry])
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

    def compared(self, old: Entry, error: Exception | None) -> None:
        """What was fetched again differs from the old entry; with an error: that is not known."""
        if error is not None:
            self._doubts.tell_unknown(old, error)
            return
        with self._lock:
            self._doubts.num_found += 1
        self._doubts.tell_changed(old)

    def _claim_anew_locked(self, entry: Entry, found: Claim) -> None:
        """Another generation of a READY entry, which it replaces if that can be fetched."""
        key = entry.key
        anew = found.claimed[key] = Entry(
            key, next(self._generations), node=entry.node, is_kept=entry.is_kept, num_awaiting=1,
            deadline=found.deadline, suspect=entry, lineage=entry.lineage or entry.generation,
            promise=found.expected.get(key),
        )  # fmt: skip
        found.doubted.append((anew, entry))
        self._drop_locked(entry)
        if found.is_current:
            self._entries[key] = anew

    def _stands_locked(self, entry: Entry) -> bool:
        """Whether this generation of the key is the one that the index knows: not cleared, evicted or refetched."""
        current = self._entries.get(entry.key)
        return current is not None and current.generation == entry.generation

    def _falls_back_locked(self, entry: Entry, error: BaseException) -> bool:
        """Settle an entry that did not arrive; whether those who wait get what it was to replace."""
        stands, suspect = self._stands_locked(entry), entry.suspect
        if suspect is not None and not self._is_closed and isinstance(error, Exception):
            is_sound = self._doubts.revive(entry)
            self._ledger.revived(entry)
            if stands and is_sound:
                self._ledger.indexed([entry], entry.node)
            else:
                self._drop_locked(entry)
            return True
        entry.error = error
        self._drop_locked(entry)
        if stands and suspect is not None and not self._is_closed:  # interrupted: it proves nothing
            self._entries[entry.key] = suspect
            self._ledger.indexed([suspect], suspect.node)
        return False

    def _drop_locked(self, entry: Entry) -> None:
        """Forget an entry; PENDING ones keep flying, for those who wait."""
        if self._stands_locked(entry):
            del self._entries[entry.key]
        if entry.state is State.READY:
            self._ledger.dropped(entry)
        entry.state = State.GONE
