"""Counting by bucket and by source node. No lock; whoever owns these locks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from gpu_cache.report.counters import BusyClock
from gpu_cache.report.schema import LOCAL_SOURCE, OTHER_SOURCES, SOURCE_DURATION_EDGES_S, Histogram, SourceStats

# Told apart; what comes from others is one. Addresses of a job are few, but nothing bounds those of a year.
_MAX_SOURCES = 256


class Tally:
    """A histogram under way, with these upper edges."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    def observe_all(self, values: Iterable[float], total: float) -> None:
        """Count many, whose sum is known."""
        ordered, counted = sorted(values), 0
        for bucket, edge in enumerate(self._edges):
            end = bisect_right(ordered, edge)
            self.counts[bucket] += end - counted
            counted = end
        self.counts[-1] += len(ordered) - counted
        self.sum += total

    def histogram(self) -> Histogram:
        """A copy for a report."""
        return Histogram(counts=list(self.counts), sum=round(self.sum, 6))


class SourceTally:
    """What came from one node, and what of it is cached."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.fetching = BusyClock(now)
        self.fetch_bytes = 0
        self.errors: dict[str, int] = {}  # by reason
        self.durations = Tally(SOURCE_DURATION_EDGES_S)
        self._num_entries = self._resident_bytes = 0
        self._births: dict[float, int] = {}  # time -> cached entries that were published then, in order

    def add(self, born: float, num_entries: int, nbytes: int) -> None:
        """Entries are cached."""
        self._num_entries += num_entries
        self._resident_bytes += nbytes
        self._births[born] = self._births.get(born, 0) + num_entries

    def remove(self, born: float, nbytes: int) -> None:
        """An entry is cached no more."""
        self._num_entries -= 1
        self._resident_bytes -= nbytes
        if (left := self._births[born] - 1) > 0:
            self._births[born] = left
        else:
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
        )


class Sources:
    """Figures by node."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._tallies: dict[str, SourceTally] = {}

    def __getitem__(self, node: str) -> SourceTally:
        """The figures of a node."""
        name = self.name(node)
        if (found := self._tallies.get(name)) is None:
            found = self._tallies[name] = SourceTally(self._now)
        return found

    def name(self, node: str) -> str:
        """Under which name a node is counted; "" is the cache's own."""
        name = node or LOCAL_SOURCE
        return name if name in self._tallies or len(self._tallies) < _MAX_SOURCES else OTHER_SOURCES

    def stats(self) -> dict[str, SourceStats]:
        """All of them."""
        now = self._now()
        return {node: tally.stats(now) for node, tally in self._tallies.items()}
