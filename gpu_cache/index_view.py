"""What an index tells of itself, and is told about its entries."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from gpu_cache.entry import Claim, Entry, EntryInfo
from gpu_cache.ledger import Ledger


class IndexView:
    """The part of a `ShardIndex` that looks, counts and marks, and never adds or drops an entry.

    Args:
        now: Seconds, monotonic.
    Thread-safety: any thread.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        # Guards every field below, those of the index that this is a part of, and the fields of every entry.
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()  # least recently used first
        self._ledger = Ledger(now)

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
