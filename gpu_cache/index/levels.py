"""The two levels of an index: the table of each, and the steps that concern both."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Iterator

from gpu_cache.index.entry import Entry, Holding, State
from gpu_cache.index.ledger import Dropped, Ledger
from gpu_cache.index.lending import Table
from gpu_cache.pool.block import Copy


@dataclasses.dataclass(slots=True, eq=False)
class Levels:
    """The part of an index that its levels share. No lock; the index calls it under its own.

    Attributes:
        tables: The device's first; then that of the level below, if there is one.
        num_removals: Calls that dropped entries on request, also if they found none.
    """

    ledger: Ledger
    tables: list[Table]
    generations: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    num_removals: int = 0
    is_closed: bool = False

    def at(self, key: Hashable) -> list[Entry]:
        """The entries of a key: two only while it rises."""
        return [entry for table in self.tables if (entry := table.get(key)) is not None]

    def held(self, holding: Holding) -> list[Entry]:
        """Entries that a scope will drop: still indexed, of the generation that was fetched inside, and not kept."""
        found = ((entry, generation) for generation, key in holding.keys.items() for entry in self.at(key))
        return [entry for entry, generation in found if generation == entry.generation and not entry.is_kept]

    def drop(self, entries: Collection[Entry]) -> Dropped:
        """Forget entries, at both levels. PENDING ones still arrive, for the calls that wait.

        Returns:
            The READY ones. They must not die under the lock.
        """
        dropped: dict[Entry, bool] = {}  # to whether each was at the lower level
        ready, gone = State.READY, State.GONE
        for is_low, table in zip((False, True), self.tables, strict=False):
            for entry in entries if table else ():
                one = table.get(entry.key)
                if one is None or one.generation != entry.generation:
                    continue
                del table[one.key]
                if one.state is ready:
                    dropped[one] = is_low
                one.state = gone
        for entry in entries:
            entry.state = gone
        return self.ledger.dropped(dropped)

    def forget(self, entry: Entry) -> None:
        """Forget an entry that is not READY, where it is."""
        for table in self.tables:
            if table.get(entry.key) is entry:
                del table[entry.key]
        entry.state = State.GONE

    def sink(self, entry: Entry, refuge: Copy) -> None:
        """Move a READY entry to the level below, where it is the youngest."""
        assert entry.copy is not None
        refuge.checksum = entry.copy.checksum
        entry.copy = refuge
        above, below = self.tables
        del above[entry.key]
        below[entry.key] = entry
        self.ledger.moved(1)

    def rise(self, entry: Entry, low: Entry) -> None:
        """Make a copy READY in the place of the entry below, which leaves its table."""
        del self.tables[1][low.key]
        assert entry.copy is not None
        assert low.copy is not None
        entry.copy.checksum = low.copy.checksum
        low.state, entry.state = State.GONE, State.READY
        entry.node, entry.promise, entry.is_kept = low.node, low.promise, low.is_kept
        entry.arrival = low.arrival
        self.ledger.moved(-1)

    def let_go_below(self, entry: Entry) -> None:
        """Note that a claim of a copy is settled: one call less awaits the entry below."""
        low = self.tables[1].get(entry.key)
        if low is not None and low.generation == entry.generation:
            low.num_awaiting -= 1
