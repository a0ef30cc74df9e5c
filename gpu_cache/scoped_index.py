"""The part of an index that knows what was fetched inside a scope."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_cache.entry import Entry, Holding, State
from gpu_cache.suspects import SuspectIndex


class ScopedIndex(SuspectIndex):
    """Entries, of which those that a scope fetched are dropped together at its end."""

    def adopt(self, holding: Holding, entries: Iterable[Entry]) -> None:
        """Drop these when a scope ends; of one that is over, when the next one around it does."""
        with self._lock:
            holder: Holding | None = holding
            while holder is not None and holder.is_over:
                holder = holder.outer
            if holder is None:
                return
            known = holder.generations
            # What takes another's place may fail: then the scope must still know that one, and it knows both by it.
            known.update((one.key, one.generation) for one in entries if known.get(one.key, -1) != one.lineage)
            if len(over := known) > holder.prune_at:
                kept = self._held_locked(holder)
                holder.generations = {entry.key: entry.lineage or entry.generation for entry in kept}
                holder.prune_at = max(holder.prune_at, 2 * len(holder.generations))
        del over  # keys may be anything, and die outside the lock

    def held_by(self, holding: Holding) -> list[Entry]:
        """The READY entries that a scope will drop."""
        with self._lock:
            return [entry for entry in self._held_locked(holding) if entry.state is State.READY]

    def end_scope(self, holding: Holding) -> list[Entry]:
        """Drop what was fetched inside a scope, but for what is meant to stay; return the READY ones, as `remove`."""
        with self._lock:
            self._num_removals += 1
            held, over = self._held_locked(holding), holding.generations
            holding.generations, holding.is_over = {}, True
            dropped = [entry for entry in held if entry.state is State.READY]
            for entry in held:
                self._drop_locked(entry)
            # What an outer scope holds has outlived no step yet.
            self._ledger.cleared(dropped, ends_step=holding.outer is None)
        del over  # keys may be anything, and die outside the lock
        return dropped

    def _held_locked(self, holding: Holding) -> list[Entry]:
        """What of a scope's is indexed still, in the generation that it fetched, and not meant to stay."""
        found = ((self._entries.get(key), generation) for key, generation in holding.generations.items())
        return [
            entry
            for entry, generation in found
            if entry and generation in (entry.generation, entry.lineage) and not entry.is_kept
        ]
