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
    """One node. `parts` are what each process reports of it."""

    address: str
    parts: tuple[tuple[Process, Mapping[str, Any]], ...]

    def figure(self, key: str) -> float | None:
        """A figure over all processes."""
        return figures.total(figures.number(one, key) for _, one in self.parts)

    @property
    def title(self) -> str:
        if self.address == LOCAL_SOURCE:
            return "local (same node)"
        used = {figures.text(one, "transport") for _, one in self.parts}  # by the latest answer to each process
        way = next((short for way, short in _SHORT_WAYS.items() if way in used), "")
        return f"{self.address} ({way})" if way else self.address

    @property
    def bytes_per_second(self) -> float | None:
        """Since start, over the seconds in which each process had a transfer in flight."""
        return ratio(self.figure("fetch_bytes"), self.figure("fetch_busy_seconds"))

    @property
    def oldest_age_s(self) -> float | None:
        return figures.largest(process.oldest_of(one, "entries") for process, one in self.parts)

    def duration_s(self, quantile: float) -> float | None:
        """A quantile of a fetch's duration, such as the median for 0.5."""
        found = [figures.numbers(one, "fetch_durations") for _, one in self.parts]
        fitting = [counts for counts in found if len(counts) == len(SOURCE_DURATION_EDGES_S) + 1]
        return quantile_of([sum(column) for column in zip(*fitting, strict=True)], SOURCE_DURATION_EDGES_S, quantile)


def sources_of(processes: Iterable[Process]) -> list[Source]:
    """All of them: by address, the node itself and the rest last."""
    found: dict[str, list[tuple[Process, Mapping[str, Any]]]] = {}
    for process in processes:
        for address, one in process.sources.items():
            found.setdefault(address, []).append((process, one))
    last = ("", LOCAL_SOURCE, OTHER_SOURCES)
    order = sorted(found, key=lambda address: (last.index(address) if address in last else 0, address))
    return [Source(address, tuple(found[address])) for address in order]


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
