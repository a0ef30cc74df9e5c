"""The metrics: names, labels, values. Names follow Prometheus' rules, labels are spelt as dcgm-exporter spells them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_cache.report.schema import ENTRY_SIZE_EDGES_BYTES, FETCH_DURATION_EDGES_S, MAX_SOURCES, OTHER_SOURCES
from gpu_cache.smi import figures
from gpu_cache.smi.node import Node, errors_by_reason, host_of
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, OK, Process

COMMON_LABELS = ("gpu", "role", "rank")
EXPORTED_STATES = (OK, LEAK, HUNG, DEAD)

Samples = Iterable[tuple[tuple[str, ...], float | None]]


class Metric(NamedTuple):
    """One name. `read` yields values with those labels that are not common; None: not known, and left out."""

    name: str
    meaning: str
    read: Callable[[Process], Samples]
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"


class Buckets(NamedTuple):
    """One histogram of a process."""

    name: str
    meaning: str
    key: str
    edges: Sequence[float]


def by_key(**keys: str) -> Callable[[Process], Samples]:
    """One sample for each label value, from the figure of that key."""
    return lambda process: [((value,), process.figure(key)) for value, key in keys.items()]


def by_reason(capacity: str, clear: str, drop: str, unit: str = "") -> Callable[[Process], Samples]:
    """By tier too. `clear` counts both tiers; what died under the cache was on the device."""

    def read(process: Process) -> Samples:
        cleared, of_host = process.figure(clear), process.figure(f"host_cleared{unit}")
        yield ("device", "capacity"), process.figure(capacity)
        yield ("device", "clear"), cleared if cleared is None else cleared - (of_host or 0)
        yield ("device", "drop"), process.figure(drop)
        if process.figure("host_capacity_bytes"):
            yield ("host", "capacity"), process.figure(f"host_{capacity}")
            yield ("host", "clear"), of_host

    return read


def by_tier(what: str) -> Callable[[Process], Samples]:
    return by_key(**{tier: f"{tier}_{what}" for tier in ("device", "pinned", "host")})


def single(key: str) -> Callable[[Process], Samples]:
    return lambda process: [((), process.figure(key))]


def by_source(key: str) -> Callable[[Process], Samples]:
    """By host: the ports of one host are one node."""
    return lambda process: _summed(((host,), figures.number(one, key)) for host, one in _hosts(process))


def _oldest(process: Process) -> Samples:
    age_s = process.figure("oldest_entry_age_seconds") if process.figure("num_entries") else None
    return [((), None if age_s is None else process.file.modified - age_s)]


def _entries(process: Process) -> Samples:
    """Without a host tier every entry is on the device, even if the report does not split them."""
    device = process.figure("device_entries")
    if device is None and not process.figure("host_capacity_bytes"):
        device = process.figure("num_entries")
    return [(("device",), device), (("host",), process.figure("host_entries"))]


def _errors(process: Process) -> Samples:
    return _summed(
        ((host, reason), count) for host, one in _hosts(process) for reason, count in errors_by_reason(one).items()
    )


def _hosts(process: Process) -> Iterator[tuple[str, Mapping[str, Any]]]:
    by_bytes = sorted(process.sources.items(), key=lambda item: -(figures.number(item[1], "fetch_bytes") or 0))
    for rank, (address, one) in enumerate(by_bytes):
        yield host_of(address) if rank < MAX_SOURCES else OTHER_SOURCES, one


def _summed(samples: Samples) -> Samples:
    found: dict[tuple[str, ...], float] = {}
    for labels, value in samples:
        if value is not None:
            found[labels] = found.get(labels, 0) + value
    return list(found.items())


METRICS = [
    Metric(
        "gpu_cache_process_info", "Always 1; to join on.",
        lambda p: [((p.pid, p.uuid, figures.text(p.report, "version")), 1)], ("pid", "UUID", "version"),
    ),
    Metric(
        "gpu_cache_process_state", "1 for the state that the process is in.",
        lambda p: [((state,), float(p.state == state)) for state in EXPORTED_STATES], ("state",),
    ),
    Metric(
        "gpu_cache_last_report_timestamp_seconds", "When the process last reported.", lambda p: [((), p.file.modified)]
    ),
    Metric("gpu_cache_capacity_bytes", "The most it may hold.", by_tier("capacity_bytes"), ("tier",)),
    Metric("gpu_cache_used_bytes", "Cached or still held; of pinned, in use.", by_tier("bytes"), ("tier",)),
    Metric("gpu_cache_used_peak_bytes", "The most so far, or since a reset.", by_tier("peak_bytes"), ("tier",)),
    Metric("gpu_cache_largest_free_bytes", "Largest free range.", by_tier("largest_free_bytes"), ("tier",)),
    Metric("gpu_cache_entries", "Cached tensors.", _entries, ("tier",)),
    Metric(
        "gpu_cache_lookups_total", "Look-ups; joined: waited for a fetch already in flight.",
        by_key(hit_device="hits", hit_host="host_hits", joined="joined", miss="misses"), ("result",),
    ),
    Metric(
        "gpu_cache_evictions_total", "Entries that went.",
        by_reason("evictions", "cleared", "dropped"), ("tier", "reason"),
    ),
    Metric(
        "gpu_cache_evicted_bytes_total", "Bytes of entries that went.",
        by_reason("evicted_bytes", "cleared_bytes", "dropped_bytes", "_bytes"), ("tier", "reason"),
    ),
    Metric("gpu_cache_overflows_total", "Tensors handed out uncached, for want of room.", single("overflows")),
    Metric("gpu_cache_fetch_bytes_total", "Bytes fetched.", by_source("fetch_bytes"), ("source_node",)),
    Metric(
        "gpu_cache_fetch_busy_seconds_total", "Time with a fetch in flight; bandwidth is bytes over it.",
        by_source("fetch_busy_seconds"), ("source_node",),
    ),
    Metric("gpu_cache_fetch_errors_total", "Fetches that failed.", _errors, ("source_node", "reason")),
    Metric(
        "gpu_cache_copy_bytes_total", "Bytes copied between host and device.",
        by_key(h2d="h2d_bytes", d2h="d2h_bytes"), ("direction",),
    ),
    Metric(
        "gpu_cache_copy_busy_seconds_total", "Time with a copy in flight.",
        by_key(h2d="h2d_busy_seconds", d2h="d2h_busy_seconds"), ("direction",),
    ),
    Metric(
        "gpu_cache_staging_wait_seconds_total", "Time blocked for a free pinned slot.", single("pinned_wait_seconds")
    ),
    Metric(
        "gpu_cache_alloc_failures_total", "Allocations that failed.",
        by_key(device="alloc_failures", pinned="pinned_alloc_failures", host="host_alloc_failures"), ("tier",),
    ),
    Metric("gpu_cache_oldest_entry_timestamp_seconds", "Birth of the oldest entry.", _oldest),
    Metric("gpu_cache_outlived_clear_entries", "Entries that survived two clears or more.", single("outlived_entries")),
    Metric("gpu_cache_outlived_clear_bytes", "Bytes of those.", single("outlived_bytes")),
    Metric("gpu_cache_source_entries", "Cached tensors, by origin.", by_source("entries"), ("source_node",)),
    Metric(
        "gpu_cache_source_resident_bytes", "Cached bytes, by origin.", by_source("resident_bytes"), ("source_node",)
    ),
    Metric(
        "gpu_cache_shared_bytes", "Shards of an owner in memory that processes of its host map.", single("shared_bytes")
    ),
    Metric(
        "gpu_cache_shared_reserved_bytes", "Memory taken from the system for those.", single("shared_reserved_bytes")
    ),
]  # fmt: skip

HISTOGRAMS = [
    Buckets(
        "gpu_cache_fetch_duration_seconds", "Of one answer of a node.", "fetch_duration_seconds", FETCH_DURATION_EDGES_S
    ),
    Buckets("gpu_cache_entry_size_bytes", "Of entries that were cached.", "entry_size_bytes", ENTRY_SIZE_EDGES_BYTES),
]

# A process that ended has one metric: that it ended.
OF_THE_DEAD = "gpu_cache_process_state"


def exported(node: Node) -> dict[tuple[str, ...], Process]:
    """Every cache once, by labels that no other has.

    A dead one gives way to its successor; twins get longer ranks, in the order of their start. No label has a pid in
    it, so that the next run of the same job goes on with the same series.
    """
    found: dict[tuple[str, ...], Process] = {}
    twins: Counter[tuple[str, ...]] = Counter()
    for process in sorted(node.processes, key=lambda p: (p.state == DEAD, p.start_time, p.file.name)):
        rank = "" if process.rank is None else str(process.rank)
        labels = (process.gpu.label if process.gpu else "", process.role, rank)
        if process.state == NEWER or (labels in found and process.state == DEAD):
            continue
        if labels in found:
            twins[labels] += 1
            labels = (*labels[:2], f"{rank}.{twins[labels]}")
        found[labels] = process
    return found
