"""The files by which a process reports on its cache: `gpu_cache.report` writes them, `gpu_cache.smi` reads them.

A report is `<name>.json`, replaced once a second, beside `<name>.lock`, which the process holds with `flock` for life.
A reader that wants the entries behind a leak touches `<name>.want`; `<name>.leaks.json` is the answer.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from gpu_cache.config import seconds
from gpu_cache.report.counters import BufferStats

if TYPE_CHECKING:
    import torch  # which the tool that reads reports does without

# Raised only on a breaking change. Readers ignore keys that they do not know and show no figures of a newer version.
SCHEMA_VERSION = 1

DIRECTORY_VARIABLE = "GPU_CACHE_STATS_DIR"
GROUP_VARIABLE = "GPU_CACHE_STATS_GROUP"  # a group's name or number; lets its members read

DEAD_VARIABLE = "GPU_CACHE_STATS_DEAD_S"  # seconds that the report of a dead process stays
DEAD_S = 3600.0

HUNG_AFTER_S = 10.0  # without a report, while the lock is held
WINDOW_S = 10.0  # span of `rates_10s`
MAX_REPORT_BYTES = 16 << 10
MAX_SOURCES = 32  # by fetch_bytes; the rest is summed under OTHER_SOURCES
MAX_LEAKS = 64  # by age
MAX_SURVIVED = 16  # entries that survived more clears count as survivors of this many

LOCAL_SOURCE = "local"  # read from this node without a request over the network
OTHER_SOURCES = "other"
SHARED_MEMORY = "shm"  # a transport: from an owner of the same host, without a network
NODE_CACHE = "node cache"  # another: from a process of the same host that fetches for all of it

# Each follows a name. The lock goes last: while it is there, a reader knows whether the others are of a dead process.
SUFFIXES = REPORT, WANT, LEAKS, LOCK = ".json", ".want", ".leaks.json", ".lock"

# Upper edges of a histogram's buckets; one more bucket counts what is above the last.
FETCH_DURATION_EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# For one source; finer than Prometheus' habit, which the metrics follow, so that quantiles come out within a third.
SOURCE_DURATION_EDGES_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
)  # fmt: skip
ENTRY_SIZE_EDGES_BYTES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30)


class Histogram(TypedDict):
    """Observations since start."""

    counts: list[int]  # by bucket, not cumulative
    sum: float  # in the unit of the edges


class Histograms(TypedDict):
    """The histograms of the metrics."""

    fetch_duration_seconds: Histogram  # from request to last byte, once for each answer; FETCH_DURATION_EDGES_S
    entry_size_bytes: Histogram  # one for each entry that was published; ENTRY_SIZE_EDGES_BYTES


class Rates(TypedDict):
    """Rates over the WINDOW_S before the report, except where it says "busy".

    A busy rate divides by the seconds with a transfer under way, in the latest window that had one. None: no transfer.
    """

    fetch_bytes_per_second: float | None  # busy
    fetch_window_age_seconds: float | None  # from the last transfer of that window to the report's `unix_time`
    fetch_bytes_per_wall_second: float  # 0.0 when idle
    h2d_bytes_per_second: float | None
    h2d_window_age_seconds: float | None
    h2d_bytes_per_wall_second: float
    evictions_per_second: float
    pinned_wait_seconds_per_second: float  # blocked for a free staging slot; above 1 when several threads wait
    overflows: int  # their number in the window, as the next two
    alloc_failures: int
    fetch_errors: NotRequired[int]


class SourceStats(TypedDict):
    """One source node, of `sources`; keyed by its address ("host:port"), LOCAL_SOURCE or OTHER_SOURCES."""

    entries: int  # cached now, as the next two
    resident_bytes: int  # as they take in the pool, alignment included
    oldest_entry_age_seconds: float  # 0.0 when none is
    fetch_bytes: int  # since start, as the following
    fetch_busy_seconds: float  # with at least one transfer from this node in flight
    fetch_errors: int
    # "timeout", "connection", "missing" (the owner has it no more), "refused" (by the owner), "answer" (a bad one),
    # "local" (of LOCAL_SOURCE: this process could not ask, or had no room), "other". They add up to `fetch_errors`.
    fetch_errors_by_reason: NotRequired[dict[str, int]]
    fetch_durations: list[int]  # counts by SOURCE_DURATION_EDGES_S, as in Histogram
    # Of the latest answer: SHARED_MEMORY, NODE_CACHE, "http", another reader's word; "": unknown.
    transport: NotRequired[str]


class HostTierFigures(TypedDict, total=False):
    """The keys that only the report of a cache with a host tier has."""

    host_entries: int
    host_peak_bytes: int
    host_largest_free_bytes: int
    host_evictions: int  # entries that the tier had no room for any more
    host_evicted_bytes: int
    host_cleared: int  # part of `cleared`, as its bytes
    host_cleared_bytes: int
    host_alloc_failures: int


class Report(BufferStats, HostTierFigures):
    """The report of one cache: every figure of `buffer_stats()` under its own name, and the following.

    An owner that shares memory reports before the first use of its cache, too: without the figures of a device.
    Ages are as of `unix_time`; a reader adds the age of the file. For a missing key a reader shows "-", never 0.
    """

    schema_version: int  # SCHEMA_VERSION
    seq: int  # 1, 2, … for each report of this name
    unix_time: float  # when the process copied the figures
    pid: int  # in the process's own namespace
    pid_namespace: int  # inode of `/proc/self/ns/pid`
    start_time: float  # Unix time at which the cache was made
    hostname: str
    role: str  # such as "actor"; default: the program's name
    rank: int  # global; default: 0
    device: str  # "cuda:0" with the index inside the process, or "cpu", also before the first use
    gpu_uuid: str | None  # "GPU-…" or "MIG-…" as NVML spells it; None off CUDA, as the next two
    pci_bus_id: str | None  # "0000:1b:00.0"
    gpu_name: str | None
    version: str  # gpu_cache's
    config: dict[str, Any]  # resolved settings, by field of CacheConfig
    rates_10s: Rates
    sources: dict[str, SourceStats]  # at most MAX_SOURCES by fetch_bytes, and OTHER_SOURCES
    histograms: Histograms
    # [clears survived, entries, bytes of the pool] for each number of clears from 1 to MAX_SURVIVED that some entry
    # survived, ascending; without the entries that were fetched with `keep=True`.
    survivors: list[list[int]]
    outlived_max_clears: int  # the most clears that any entry survived
    device_entries: int
    dropped: int  # entries that died with their storage, without a clear or an eviction
    dropped_bytes: int
    pinned_peak_bytes: NotRequired[int]  # with staging, as the next
    pinned_alloc_failures: NotRequired[int]
    # Memory of this process that others of its host map, in use and taken from the system: counted here alone. The
    # pool of a node cache lies in its.
    shared_bytes: NotRequired[int]
    shared_reserved_bytes: NotRequired[int]


class LeakReport(TypedDict):
    """The answer to a touched `<name>.want`, which the writer unlinks first; replaced as a whole, like a report."""

    schema_version: int
    unix_time: float
    pid: int
    outlived_entries: int  # their whole number
    outlived_bytes: int
    # The MAX_LEAKS oldest, oldest first: fields of EntryInfo, with `age_s` as `age_seconds`, key and dtype as text.
    leaks: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class EntryInfo:
    """One cached shard, as of one look."""

    key: Hashable
    nbytes: int
    age_s: float
    source: str  # the node that it came from, as `source_stats()` names it
    clears_survived: int  # 2 or more is a leak, unless it was fetched with `keep=True`
    dtype: torch.dtype
    shape: tuple[int, ...]


def report_name(role: str, rank: int, pid: int) -> str:
    """Make a new name for a process's files. It is for people only: a reader trusts the report's content."""
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', role)[:32] or 'process'}-{rank}-{pid}-{secrets.token_hex(3)}"


def is_report(file_name: str) -> bool:
    """Whether this is the name of a report, not of another file of a process."""
    return file_name.endswith(REPORT) and not file_name.endswith(LEAKS) and not file_name.startswith(".")


def directories(environ: Mapping[str, str], uid: int) -> list[Path]:
    """Where a user's reports are. A writer takes the first directory whose parent is there."""
    named = environ.get(DIRECTORY_VARIABLE)
    return [Path(named)] if named else [Path(parent, f"gpu_cache-{uid}") for parent in ("/dev/shm", "/tmp")]


def dead_s(environ: Mapping[str, str]) -> float:
    """How long the report of a process that ended without cleanup stays, in seconds.

    Raises:
        ValueError: The variable holds no such time.
    """
    return seconds(environ.get(DEAD_VARIABLE) or DEAD_S, DEAD_VARIABLE)
