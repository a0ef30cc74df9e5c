"""The accounts of an index: cached shards, look-ups and fetches, in numbers."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_cache.config import ALIGNMENT
from gpu_cache.errors import LOCAL
from gpu_cache.index.entry import Arrival, Claim, Entry, Flight, State
from gpu_cache.pool.block import aligned
from gpu_cache.report.counters import LookupCounters
from gpu_cache.report.schema import (
    ENTRY_SIZE_EDGES_BYTES,
    FETCH_DURATION_EDGES_S,
    LOCAL_SOURCE,
    MAX_SURVIVED,
    OTHER_SOURCES,
    SOURCE_DURATION_EDGES_S,
    EntryInfo,
    Histogram,
    Histograms,
    SourceStats,
)

# Sources with figures of their own; further ones share one. A job has few addresses; those of a year have no bound.
_MAX_SOURCES = 256


class Tally:
    """A histogram that values are added to. `edges` are its buckets' upper bounds."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, *values: float) -> None:
        """Count values."""
        ordered, counted = sorted(values), 0
        for bucket, edge in enumerate(self._edges):
            end = bisect_right(ordered, edge)
            self.counts[bucket] += end - counted
            counted = end
        self.counts[-1] += len(ordered) - counted
        self.sum += sum(values)

    def histogram(self) -> Histogram:
        """A copy for a report."""
        return Histogram(counts=list(self.counts), sum=round(self.sum, 6))


class BusyClock:
    """Counts seconds with at least one activity under way."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._num_active = 0
        self._since = self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Busy seconds so far, with those of activities under way."""
        return self._seconds + (self._now() - self._since if self._num_active else 0.0)

    def note(self, *, begins: bool) -> None:
        """An activity begins, or ends."""
        now = self._now()
        if self._num_active:
            self._seconds += now - self._since
        self._since = now
        self._num_active += 1 if begins else -1


class Survivors:
    """Counts cached entries by the number of clears before they came."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, int]] = {}  # epoch -> entries, bytes

    def add(self, epoch: int, num_entries: int, nbytes: int) -> None:
        """Count entries in, or, with negative numbers, out."""
        entries, total = self._kept.pop(epoch, (0, 0))
        if entries + num_entries:
            self._kept[epoch] = (entries + num_entries, total + nbytes)

    def since(self, epoch: int) -> tuple[int, int]:
        """Number and bytes of the entries that came at `epoch` or before."""
        old = [kept for came, kept in self._kept.items() if came <= epoch]
        return sum(entries for entries, _ in old), sum(nbytes for _, nbytes in old)

    def table(self, epoch: int) -> list[list[int]]:
        """[epochs since, entries, bytes] for each epoch that left something."""
        return [[epoch - came, entries, nbytes] for came, (entries, nbytes) in self._kept.items()]


class SourceTally:
    """The figures of one node: its fetches, and its entries in the cache."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.fetching = BusyClock(now)
        self.fetch_bytes = 0
        self.errors: dict[str, int] = {}  # by reason
        self.durations = Tally(SOURCE_DURATION_EDGES_S)
        self.transport = ""  # the latest answer's
        self._num_entries = self._resident_bytes = 0
        self._births: dict[float, int] = {}  # time -> cached entries that were published then, in order

    def add(self, born: float, num_entries: int, nbytes: int) -> None:
        """Count cached entries in, or, with negative numbers, out."""
        self._num_entries += num_entries
        self._resident_bytes += nbytes
        self._births[born] = self._births.get(born, 0) + num_entries
        if not self._births[born]:
            del self._births[born]

    def stats(self, now: float) -> SourceStats:
        """Its figures."""
        born = next(iter(self._births), now)
        return SourceStats(
            entries=self._num_entries,
            resident_bytes=self._resident_bytes,
            oldest_entry_age_seconds=round(now - born, 3),
            fetch_bytes=self.fetch_bytes,
            fetch_busy_seconds=round(self.fetching.seconds, 6),
            fetch_errors=sum(self.errors.values()),
            fetch_errors_by_reason=dict(self.errors),
            fetch_durations=list(self.durations.counts),
            transport=self.transport,
        )


class Sources:
    """Figures by node."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._tallies: dict[str, SourceTally] = {}

    def __getitem__(self, node: str) -> SourceTally:
        """The figures of a node."""
        if (found := self._tallies.get(node or LOCAL_SOURCE)) is None:
            found = self._tallies.setdefault(self.name(node), SourceTally(self._now))
        return found

    def name(self, node: str) -> str:
        """The name under which a node is counted; "" is the cache itself."""
        name = node or LOCAL_SOURCE
        return name if name in self._tallies or len(self._tallies) < _MAX_SOURCES else OTHER_SOURCES

    def stats(self) -> dict[str, SourceStats]:
        """All of them."""
        now = self._now()
        return {node: tally.stats(now) for node, tally in self._tallies.items()}


class Dropped(NamedTuple):
    """READY entries that left the index.

    Attributes:
        entries: They must not die under the index lock.
        nbytes: Their bytes.
        num_in_tier: How many were in the host tier.
        tier_bytes: The bytes of these.
    """

    entries: list[Entry]
    nbytes: int
    num_in_tier: int
    tier_bytes: int


OUTLIVED = 2  # clears; an entry that survived as many is a leak: the next step's tensors may arrive before a clear


class Ledger:
    """The accounts of an index. No lock; the index calls it under its own.

    Attributes:
        births: When each READY entry was published, oldest first.
        counters: Of look-ups, fetches and drops.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.births: dict[Hashable, float] = {}
        self.ready_bytes = 0
        self._now = now
        self.counters = LookupCounters()
        self._survivors = Survivors()
        self._fetching = BusyClock(now)
        self._sources = Sources(now)
        self._durations, self._entry_sizes = Tally(FETCH_DURATION_EDGES_S), Tally(ENTRY_SIZE_EDGES_BYTES)
        self._host_entries = 0  # those in the host tier
        self._host_evictions = self._host_evicted_bytes = self._host_cleared = self._host_cleared_bytes = 0
        self._has_fetched = False  # since the last clear
        self._dropped = self._dropped_bytes = 0  # entries whose storage died

    def claimed(self, found: Claim, num_hits: int, hit_bytes: int, num_low: int = 0) -> None:
        """Count a look-up. The caller gets `num_low` of the hits in the host tier."""
        num_rising = 0
        for key in found.below:
            num_rising += found.claimed[key].flight.kind == "rise"
        self.counters.hits += num_hits - num_low
        self.counters.host_hits += num_low + num_rising
        self.counters.hit_bytes += hit_bytes
        self.counters.joined += len(found.joined) + len(found.below) - num_rising
        self.counters.misses += len(found.claimed) - len(found.below)
        self._has_fetched = self._has_fetched or len(found.claimed) > len(found.below)

    def fetching(self, node: str, *, begins: bool) -> None:
        """Count a reader of a node that begins to deliver, or has ended."""
        self.counters.fetches += begins
        self._fetching.note(begins=begins)
        self._sources[node].fetching.note(begins=begins)

    def answered(self, node: str, seconds: float, transport: str = "") -> None:
        """Count a node's answer, its seconds and its transport."""
        self._durations.observe(seconds)
        source = self._sources[node]
        source.durations.observe(seconds)
        source.transport = transport

    def landed(self, entries: Iterable[Entry], node: str) -> None:
        """Count entries that got their tensors."""
        fetched_bytes = 0
        sizes: dict[Flight, int] = {}  # of the entries of each: these are few
        for entry in entries:
            assert entry.copy is not None
            sizes[entry.flight] = sizes.get(entry.flight, 0) + entry.copy.nbytes
        for flight, nbytes in sizes.items():
            if flight.kind == "fetch":
                fetched_bytes += nbytes
            elif flight.kind == "rise":
                self.counters.hit_bytes += nbytes
            self.counters.joined_bytes += nbytes * flight.num_joined
        if fetched_bytes:
            self.counters.miss_bytes += fetched_bytes
            self.counters.fetch_bytes += fetched_bytes
            self._sources[node].fetch_bytes += fetched_bytes

    def indexed(self, entries: Sequence[Entry], node: str, *, is_low: bool) -> None:
        """Make entries of a node READY, and count them on the device or in the host tier."""
        if not entries:
            return
        arrival = Arrival(self._now(), self.counters.clears)
        born, epoch = arrival
        ready, births = State.READY, self.births
        sizes: list[int] = []
        num_kept = kept_bytes = pool_bytes = 0
        for entry in entries:
            entry.state, entry.arrival = ready, arrival
            births[entry.key] = born
            assert entry.copy is not None
            sizes.append(nbytes := entry.copy.nbytes)
            pool_bytes += (taken := -(-nbytes // ALIGNMENT) * ALIGNMENT)
            if entry.is_kept:
                num_kept += 1
                kept_bytes += taken
        self._host_entries += len(entries) * is_low
        self.ready_bytes += sum(sizes)
        self._entry_sizes.observe(*sizes)
        self._sources[node].add(born, len(entries), pool_bytes)
        self._survivors.add(epoch, len(entries) - num_kept, pool_bytes - kept_bytes)

    def dropped(self, entries: Mapping[Entry, bool]) -> Dropped:
        """Count READY entries out. Those that map to true were in the host tier."""
        sums: dict[tuple[str, Arrival, bool], list[int]] = {}
        total = tier_bytes = 0
        births = self.births
        for entry, is_low in entries.items():
            del births[entry.key]
            assert entry.copy is not None
            nbytes = entry.copy.nbytes
            total += nbytes
            tier_bytes += nbytes * is_low
            alike = entry.node, entry.arrival, entry.is_kept
            if (count := sums.get(alike)) is None:
                count = sums[alike] = [0, 0]
            count[0] += 1
            count[1] += -(-nbytes // ALIGNMENT) * ALIGNMENT
        gone = Dropped(list(entries), total, sum(entries.values()), tier_bytes)
        self._host_entries -= gone.num_in_tier
        self.ready_bytes -= total
        for (node, (born, epoch), is_kept), (num_entries, pool_bytes) in sums.items():
            self._sources[node].add(born, -num_entries, -pool_bytes)
            if not is_kept:
                self._survivors.add(epoch, -num_entries, -pool_bytes)
        return gone

    def moved(self, number: int) -> None:
        """Count READY entries that moved to the host tier, or, with a negative number, to the device."""
        self._host_entries += number

    def kept(self, entry: Entry) -> None:
        """Mark an entry as meant to stay. It is no survivor from then on."""
        if entry.state is State.READY and not entry.is_kept:
            self._survivors.add(entry.arrival.epoch, -1, -aligned(entry.nbytes))
        entry.is_kept = True

    def overflowed(self, entries: Collection[Entry]) -> None:
        """Count entries that were handed out uncached."""
        self.counters.overflows += len(entries)
        self.counters.overflow_bytes += sum(entry.nbytes for entry in entries)

    def failed(self, entries: Sequence[Entry], reason: str) -> None:
        """Count entries that did not arrive."""
        for entry in entries:
            if entry.is_fetch:
                self.counters.fetch_errors += 1
                errors = self._sources["" if reason == LOCAL else entry.node].errors
                errors[reason] = errors.get(reason, 0) + 1

    def evicted(self, entries: Collection[Entry], *, is_low: bool) -> None:
        """Count entries that were evicted, from the device or from the host tier."""
        if is_low:
            self._host_evictions += len(entries)
            self._host_evicted_bytes += sum(entry.nbytes for entry in entries)
            return
        self.counters.evictions += len(entries)
        self.counters.evicted_bytes += sum(entry.nbytes for entry in entries)

    def died(self, dropped: Dropped) -> None:
        """Count entries that were dropped because their storage died."""
        self._dropped += len(dropped.entries)
        self._dropped_bytes += dropped.nbytes

    def cleared(self, dropped: Dropped, *, ends_step: bool = True) -> None:
        """Count entries that were dropped on request.

        All clears between two fetches count as one: a step clears its owners one by one.
        """
        if self._has_fetched and ends_step:
            self._has_fetched = False
            self.counters.clears += 1
        self.counters.cleared += len(dropped.entries)
        self.counters.cleared_bytes += dropped.nbytes
        self._host_cleared += dropped.num_in_tier
        self._host_cleared_bytes += dropped.tier_bytes

    def is_outlived(self, entry: Entry) -> bool:
        """Whether an entry survived so many clears that it is a leak, unless it is kept. True of every older one."""
        return self.counters.clears - entry.arrival.epoch >= OUTLIVED

    def about(self, entry: Entry) -> EntryInfo:
        """Describe a READY entry."""
        assert entry.copy is not None
        return EntryInfo(
            key=entry.key,
            nbytes=entry.nbytes,
            age_s=self._now() - entry.arrival.born,
            source=self._sources.name(entry.node),
            clears_survived=self.counters.clears - entry.arrival.epoch,
            dtype=entry.copy.base.dtype,
            shape=tuple(entry.copy.base.shape),
        )

    def stats(self) -> dict[str, float]:
        """The index's part of `BufferStats`."""
        outlived_entries, outlived_bytes = self._survivors.since(self.counters.clears - OUTLIVED)
        born = next(iter(self.births.values()), None)
        return {
            **self.counters.as_dict(),
            "requested": self.counters.requested,
            "requested_bytes": self.counters.requested_bytes,
            "num_entries": len(self.births),
            "num_tensors": len(self.births),
            "total_bytes": self.ready_bytes,
            "fetch_busy_seconds": self._fetching.seconds,
            "oldest_entry_age_seconds": 0.0 if born is None else self._now() - born,
            "outlived_entries": outlived_entries,
            "outlived_bytes": outlived_bytes,
        }

    def details(self) -> dict[str, Any]:
        """Further figures of a report, under the report's names."""
        table = self._survivors.table(self.counters.clears)
        return {
            "sources": self._sources.stats(),
            "histograms": Histograms(
                fetch_duration_seconds=self._durations.histogram(), entry_size_bytes=self._entry_sizes.histogram()
            ),
            "survivors": capped(table, MAX_SURVIVED),
            "outlived_max_clears": max((survived for survived, _, _ in table), default=0),
            "device_entries": len(self.births) - self._host_entries,
            "host_entries": self._host_entries,
            "host_evictions": self._host_evictions,
            "host_evicted_bytes": self._host_evicted_bytes,
            "host_cleared": self._host_cleared,
            "host_cleared_bytes": self._host_cleared_bytes,
            "dropped": self._dropped,
            "dropped_bytes": self._dropped_bytes,
        }


def capped(table: Sequence[list[int]], most: int) -> list[list[int]]:
    """Rows of [clears, entries, bytes] from 1 clear on, ascending. The row of `most` sums up all beyond it."""
    rows: dict[int, list[int]] = {}
    for survived, num_entries, nbytes in sorted(table):
        if survived > 0:
            row = rows.setdefault(min(survived, most), [min(survived, most), 0, 0])
            row[1] += num_entries
            row[2] += nbytes
    return list(rows.values())
