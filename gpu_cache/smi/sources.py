"""The nodes that tensors come from, over all processes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_cache.report.schema import LOCAL_SOURCE, NODE_CACHE, OTHER_SOURCES, SHARED_MEMORY, SOURCE_DURATION_EDGES_S
from gpu_cache.smi import figures
from gpu_cache.smi.process import Process
from gpu_cache.units import ratio

_SHORT_WAYS = {SHARED_MEMORY: "shm", NODE_CACHE: "node"}  # that are shown


@dataclasses.dataclass(frozen=True)
class Source:
    """Figures of one node, summed over all processes. `durations` are counts by SOURCE_DURATION_EDGES_S."""

    address: str
    entries: float | None
    resident_bytes: float | None
    fetch_bytes: float | None
    busy_s: float | None
    errors: float | None
    oldest_age_s: float | None
    durations: list[float]
    transports: frozenset[str] = frozenset()  # of the latest answers to each process

    @property
    def title(self) -> str:
        if self.address == LOCAL_SOURCE:
            return "local (same node)"
        way = next((short for way, short in _SHORT_WAYS.items() if way in self.transports), "")
        return f"{self.address} ({way})" if way else self.address

    @property
    def bytes_per_second(self) -> float | None:
        """Since start, over the seconds in which each process had a transfer in flight."""
        return ratio(self.fetch_bytes, self.busy_s)

    def duration_s(self, quantile: float) -> float | None:
        """A quantile of a fetch's duration, such as the median for 0.5."""
        return quantile_of(self.durations, SOURCE_DURATION_EDGES_S, quantile)


def sources_of(processes: Iterable[Process]) -> list[Source]:
    """All of them: by address, the node itself and the rest last."""
    found: dict[str, list[tuple[Process, Mapping[str, Any]]]] = {}
    for process in processes:
        for address, one in process.sources.items():
            found.setdefault(address, []).append((process, one))
    order = sorted(
        found, key=lambda address: (address in (LOCAL_SOURCE, OTHER_SOURCES), address == OTHER_SOURCES, address)
    )
    return [_merged(address, found[address]) for address in order]


def host_of(address: str) -> str:
    """An address without its port."""
    host, colon, port = address.rpartition(":")
    return host if colon and port.isdigit() and (":" not in host or host.endswith("]")) else address


def quantile_of(counts: Sequence[float], edges: Sequence[float], quantile: float) -> float | None:
    """By linear interpolation in its bucket, as Prometheus does it; above the last edge, that edge."""
    if len(counts) != len(edges) + 1 or not sum(counts):
        return None
    wanted = quantile * sum(counts)
    below = [0.0, *itertools.accumulate(counts)]
    for bucket, upper in enumerate(edges):
        if below[bucket + 1] >= wanted and counts[bucket]:
            lower = edges[bucket - 1] if bucket else 0.0
            return lower + (upper - lower) * (wanted - below[bucket]) / counts[bucket]
    return edges[-1]


def added(histograms: Iterable[Sequence[float]], num_buckets: int) -> list[float]:
    """Counts by bucket, over all histograms that have as many."""
    fitting = [counts for counts in histograms if len(counts) == num_buckets]
    return [sum(column) for column in zip(*fitting, strict=True)]


def _merged(address: str, parts: Sequence[tuple[Process, Mapping[str, Any]]]) -> Source:
    def summed(key: str) -> float | None:
        return figures.total(figures.number(one, key) for _, one in parts)

    ages = [
        process.aged(figures.number(one, "oldest_entry_age_seconds"))
        for process, one in parts
        if figures.number(one, "entries")
    ]
    durations = (figures.numbers(one, "fetch_durations") for _, one in parts)
    return Source(
        address=address,
        entries=summed("entries"),
        resident_bytes=summed("resident_bytes"),
        fetch_bytes=summed("fetch_bytes"),
        busy_s=summed("fetch_busy_seconds"),
        errors=summed("fetch_errors"),
        oldest_age_s=figures.largest(ages),
        durations=added(durations, len(SOURCE_DURATION_EDGES_S) + 1),
        transports=frozenset(found for _, one in parts if (found := figures.text(one, "transport"))),
    )
