"""Figures of a cache: its counters, the flat dict of `buffer_stats`, and differences between two such dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict, cast, get_type_hints


class BufferStats(TypedDict):
    """One look at a cache. Bytes and counts are ints, seconds floats; counters only grow, gauges are of this moment.

    Attributes:
        num_tensors: `num_entries` under upstream's other name.
        total_bytes: Cached, over all tiers; alignment not included.
        device_bytes: Cached, being received, or still held by an alias; alignment included.
        device_reserved_bytes: In slabs, including the empty ones that the pool keeps.
        device_quarantined_bytes: Given back, not yet reusable.
        pinned_bytes: In use by a transfer.
        pinned_capacity_bytes: Allocated.
        is_pinned: 0: pageable.
        pinned_wait_seconds: Blocked for a free slot.
        requested: Look-ups; each is one of `hits`, `host_hits`, `joined` and `misses`.
        host_hits: Found in the host tier.
        joined: Waited for a fetch that was under way already.
        overflows: Shards handed out uncached, for want of room.
        fetch_busy_seconds: Time with a fetch in flight; the other busy times count copies.
        inflight_bytes: Being received; readers have room for them.
        inflight_wait_seconds: Spent waiting for a turn to receive, over all readers.
        outlived_entries: Cached shards that survived two clears or more, but for those fetched with `keep=True`.
        outlived_bytes: Their bytes; alignment included.
        clears: Steps that were cleared: all clears between two fetches count as one.
        mutations: Look-ups that found a shard that a reader had written into.
    """

    # entries
    num_entries: int
    num_tensors: int
    total_bytes: int
    # device pool
    device_bytes: int
    device_reserved_bytes: int
    device_capacity_bytes: int
    device_peak_bytes: int
    device_largest_free_bytes: int
    device_quarantined_bytes: int
    # staging
    pinned_bytes: int
    pinned_capacity_bytes: int
    is_pinned: int
    pinned_wait_seconds: float
    # host tier
    host_bytes: int
    host_capacity_bytes: int
    # look-ups
    requested: int
    hits: int
    host_hits: int
    joined: int
    misses: int
    requested_bytes: int
    hit_bytes: int
    joined_bytes: int
    miss_bytes: int
    # pressure
    evictions: int
    evicted_bytes: int
    cleared: int
    cleared_bytes: int
    overflows: int
    overflow_bytes: int
    alloc_failures: int
    # network
    fetches: int
    fetch_bytes: int
    fetch_busy_seconds: float
    fetch_errors: int
    inflight_bytes: int
    inflight_wait_seconds: float
    # copies
    copies: int
    h2d_bytes: int
    h2d_busy_seconds: float
    d2h_bytes: int
    d2h_busy_seconds: float
    # leaks
    oldest_entry_age_seconds: float
    outlived_entries: int
    outlived_bytes: int
    clears: int
    # writes into shards
    mutations: int


@dataclasses.dataclass(slots=True)
class LookupCounters:
    """The index lock guards every field."""

    hits: int = 0
    host_hits: int = 0
    joined: int = 0
    misses: int = 0
    hit_bytes: int = 0
    joined_bytes: int = 0
    miss_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    cleared: int = 0
    cleared_bytes: int = 0
    overflows: int = 0
    overflow_bytes: int = 0
    fetches: int = 0
    fetch_bytes: int = 0
    fetch_errors: int = 0
    clears: int = 0

    def as_dict(self) -> dict[str, float]:
        """By name; `dataclasses.asdict` copies deeply, at twenty times the cost."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def requested(self) -> int:
        return self.hits + self.host_hits + self.joined + self.misses

    @property
    def requested_bytes(self) -> int:
        return self.hit_bytes + self.joined_bytes + self.miss_bytes


_NOTHING_YET = {key: kind() for key, kind in get_type_hints(BufferStats).items()}


def buffer_stats_of(*parts: Mapping[str, float]) -> BufferStats:
    """Merge the figures of a cache's parts; a figure that no part knows yet is 0."""
    merged = dict(_NOTHING_YET)
    for part in parts:
        merged.update(part)
    return cast(BufferStats, merged)


def stats_delta(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Compare two `buffer_stats()` for a metrics logger; keys with no data are left out.

    Returns:
        `hit_ratio` (0 to 1), `fetch_gb_per_s` and `h2d_gb_per_s` (10^9 bytes per busy second), and the growth of
        `requested`, `misses`, `evictions`, `overflows`, `cleared`, `fetch_bytes`, `h2d_bytes`, `fetch_errors`.
    """
    grown = {key: float(after[key] - before[key]) for key in before.keys() & after.keys()}
    kept = "requested", "misses", "evictions", "overflows", "cleared", "fetch_bytes", "h2d_bytes", "fetch_errors"
    delta = {key: grown[key] for key in kept}
    if requested := grown["requested"]:
        delta["hit_ratio"] = (grown["hits"] + grown["host_hits"]) / requested
    for link in ("fetch", "h2d"):
        if (seconds := grown[f"{link}_busy_seconds"]) > 0:
            delta[f"{link}_gb_per_s"] = grown[f"{link}_bytes"] / seconds / 1e9
    return delta
