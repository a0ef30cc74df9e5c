"""What a process reports about its cache: `gpu_cache.report.publish` writes it, `gpu_cache.smi` reads it.

A report is `<name>.json`, replaced once a second, beside `<name>.lock`, which the process holds with `flock` for life.
A reader that wants the entries behind a leak touches `<name>.want`; `<name>.leaks.json` is the answer.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from gpu_cache.report.counters import BufferStats

if TYPE_CHECKING:
    import torch  # which the tool that reads reports does without

# Raised only on a breaking change. Readers ignore keys that they do not know and show no figures of a newer version.
SCHEMA_VERSION = 1

DIRECTORY_VARIABLE = "GPU_CACHE_STATS_DIR"
GROUP_VARIABLE = "GPU_CACHE_STATS_GROUP"  # a group's name or number; lets its members read

PERIOD_S = 1.0  # between two reports
HUNG_AFTER_S = 10.0  # without a report, while the lock is held
WINDOW_S = 10.0  # of `rates_10s`
MAX_REPORT_BYTES = 16 << 10
MAX_SOURCES = 32  # by fetch_bytes; the rest is summed under OTHER_SOURCES
MAX_LEAKS = 64  # by age
MAX_SURVIVED = 16  # what survived more clears is counted with those that survived this many

LOCAL_SOURCE = "local"  # read from this node without a request over the network
OTHER_SOURCES = "other"

# Left out of the report of a cache that has no host tier.
OF_A_HOST_TIER = {
    "host_entries", "host_evictions", "host_evicted_bytes", "host_cleared", "host_cleared_bytes", "host_peak_bytes",
    "host_largest_free_bytes", "host_alloc_failures",
}  # fmt: skip

REPORT, LOCK, WANT, LEAKS = ".json", ".lock", ".want", ".leaks.json"  # what follows a name

# Upper edges of a histogram's buckets; one more bucket counts what is above the last.
FETCH_DURATION_EDGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Of a source; finer than the metrics', whose edges are Prometheus' habit, so that quantiles come out within a third.
SOURCE_DURATION_EDGES_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
)  # fmt: skip
ENTRY_SIZE_EDGES_BYTES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30)


class Histogram(TypedDict):
    """Observations since start.

    Attributes:
        counts: By bucket, not cumulative: one number for each edge and one for what is above the last.
        sum: Of all observed values, in the unit of the edges.
    """

    counts: list[int]
    sum: float


class Histograms(TypedDict):
    """Those of the metrics.

    Attributes:
        fetch_duration_seconds: One observation for each answer of a node, from request to last byte;
            FETCH_DURATION_EDGES_S.
        entry_size_bytes: One for each entry that was published; ENTRY_SIZE_EDGES_BYTES.
    """

    fetch_duration_seconds: Histogram
    entry_size_bytes: Histogram


class Rates(TypedDict):
    """What happened lately. None: nothing to divide by yet.

    Attributes:
        fetch_bytes_per_second: Bytes over *busy* seconds, of the latest window of WINDOW_S that had a transfer.
        fetch_window_age_seconds: From the last transfer in that window to the report's `unix_time`.
        fetch_bytes_per_wall_second: Of the WINDOW_S before the report, 0.0 when idle. The same three for h2d.
        evictions_per_second: Of the WINDOW_S before the report, as the following.
        pinned_wait_seconds_per_second: Time blocked for a free staging slot; above 1 when several threads wait.
        overflows: How many in the window; so `alloc_failures`.
    """

    fetch_bytes_per_second: float | None
    fetch_window_age_seconds: float | None
    fetch_bytes_per_wall_second: float
    h2d_bytes_per_second: float | None
    h2d_window_age_seconds: float | None
    h2d_bytes_per_wall_second: float
    evictions_per_second: float
    pinned_wait_seconds_per_second: float
    overflows: int
    alloc_failures: int


class SourceStats(TypedDict):
    """One source node, of `sources`; keyed by its address ("host:port"), LOCAL_SOURCE or OTHER_SOURCES.

    Attributes:
        entries: Cached now, as `resident_bytes` and `oldest_entry_age_seconds` (0.0 when none is).
        fetch_bytes: Since start, as the following.
        fetch_busy_seconds: With at least one transfer from this node in flight.
        fetch_errors_by_reason: "timeout", "connection", "missing" (the owner has it no more), "refused" (by the owner),
            "answer" (a bad one), "local" (of LOCAL_SOURCE: this process could not ask), "other"; adds up to
            `fetch_errors`.
        fetch_durations: Counts by SOURCE_DURATION_EDGES_S, as in Histogram.
    """

    entries: int
    resident_bytes: int
    oldest_entry_age_seconds: float
    fetch_bytes: int
    fetch_busy_seconds: float
    fetch_errors: int
    fetch_errors_by_reason: NotRequired[dict[str, int]]
    fetch_durations: list[int]


class Report(BufferStats):
    """The report of one cache: who it is, every figure of `buffer_stats()` under its own name, and what follows.

    Ages are as of `unix_time`; a reader adds the age of the file. A key that is NotRequired is left out while the cache
    does not count it; a reader shows "-" for it, never 0.

    Attributes:
        schema_version: SCHEMA_VERSION.
        seq: 1, 2, … for each report of this name.
        unix_time: When the figures were copied.
        pid: In the process's own namespace, whose inode (`/proc/self/ns/pid`) is `pid_namespace`.
        start_time: Unix time at which the cache was made.
        role: Such as "actor"; the program's name if nobody said.
        rank: Global rank, 0 if nobody said.
        device: "cuda:0" with the index inside the process, "cpu", or "" while undecided.
        gpu_uuid: "GPU-…" or "MIG-…" as NVML spells it; None off CUDA. So `pci_bus_id` ("0000:1b:00.0"), `gpu_name`.
        version: Of gpu_cache.
        config: The resolved settings, by field of CacheConfig.
        survivors: [clears survived, entries, bytes] for each number of clears from 1 to MAX_SURVIVED that some entry
            survived, ascending; what was fetched with `keep=True` is in none.
        outlived_max_clears: The most clears that any entry survived.
        sources: By node, at most MAX_SOURCES by fetch_bytes and OTHER_SOURCES.
        device_entries: Entries by tier; so `host_entries`.
        host_evictions: Entries that the host tier had no room for any more; so `host_evicted_bytes`. `evictions` are
            those from the device, be it to the host tier.
        host_cleared: Those of `cleared` that were in the host tier; so `host_cleared_bytes`.
        dropped: Entries that went because their storage did, without a clear or an eviction; so `dropped_bytes`.
    """

    schema_version: int
    seq: int
    unix_time: float
    pid: int
    pid_namespace: int
    start_time: float
    hostname: str
    role: str
    rank: int
    device: str
    gpu_uuid: str | None
    pci_bus_id: str | None
    gpu_name: str | None
    version: str
    config: dict[str, Any]
    rates_10s: Rates
    sources: dict[str, SourceStats]
    histograms: Histograms
    survivors: list[list[int]]
    outlived_max_clears: int
    device_entries: NotRequired[int]
    host_entries: NotRequired[int]
    pinned_peak_bytes: NotRequired[int]
    host_peak_bytes: NotRequired[int]
    host_largest_free_bytes: NotRequired[int]
    host_evictions: NotRequired[int]
    host_evicted_bytes: NotRequired[int]
    host_cleared: NotRequired[int]
    host_cleared_bytes: NotRequired[int]
    dropped: NotRequired[int]
    dropped_bytes: NotRequired[int]
    pinned_alloc_failures: NotRequired[int]
    host_alloc_failures: NotRequired[int]


class Leak(TypedDict):
    """One entry that survived two clears or more. `key`, `dtype` as text; `source` as in `sources`."""

    key: str
    nbytes: int
    age_seconds: float
    clears_survived: int
    source: str
    dtype: str
    shape: list[int]


class LeakReport(TypedDict):
    """The answer to a touched `<name>.want`, which the writer unlinks first; replaced as a whole, like a report.

    Attributes:
        outlived_entries: All there are; `leaks` has the MAX_LEAKS oldest, oldest first.
    """

    schema_version: int
    unix_time: float
    pid: int
    outlived_entries: int
    outlived_bytes: int
    leaks: list[Leak]


def report_name(role: str, rank: int, pid: int) -> str:
    """A new name for a process's files. For people only: a reader trusts what is in the report."""
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', role)[:32] or 'process'}-{rank}-{pid}-{secrets.token_hex(3)}"


def is_report(file_name: str) -> bool:
    """Whether this is the name of a report, not of another file of a process."""
    return file_name.endswith(REPORT) and not file_name.endswith(LEAKS) and not file_name.startswith(".")


def default_directories(uid: int) -> list[Path]:
    """Where a user's reports are when no variable says so; a writer takes the first whose parent is a directory."""
    return [Path("/dev/shm") / f"gpu_cache-{uid}", Path("/tmp") / f"gpu_cache-{uid}"]


def directories(environ: Mapping[str, str], uid: int) -> list[Path]:
    """Where to write reports, in order of preference, and where to look for one's own."""
    named = environ.get(DIRECTORY_VARIABLE)
    return [Path(named)] if named else default_directories(uid)


def refusal(found: os.stat_result, uid: int, group: int | None = None) -> str | None:
    """Why reports must not be written into a directory, as `os.lstat` describes it; None: they may.

    Args:
        found: Of the directory itself, not of what a link leads to.
        uid: Of this process.
        group: The one named by GROUP_VARIABLE: a directory of that group (mode 2770) need not be ours.
    """
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_mode & stat.S_IWOTH:
        return "is writable by others"
    is_shared = group is not None and found.st_gid == group
    if found.st_uid != uid and not is_shared:
        return f"belongs to user {found.st_uid}, not {uid}"
    if found.st_mode & stat.S_IWGRP and not is_shared:
        return "is writable by its group"
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class EntryInfo:
    """One cached shard, as of one look.

    Attributes:
        source: The node that it came from, as `source_stats()` names it.
        clears_survived: 2 or more is a leak, unless it was fetched with `keep=True`.
    """

    key: Hashable
    nbytes: int
    age_s: float
    source: str
    clears_survived: int
    dtype: torch.dtype
    shape: tuple[int, ...]
