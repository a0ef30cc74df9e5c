"""Composes the report of one cache."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from gpu_cache import __version__
from gpu_cache.config import CacheConfig
from gpu_cache.device.protocol import Device, DeviceIdentity
from gpu_cache.report.counters import buffer_stats_of
from gpu_cache.report.rate_window import RateWindow
from gpu_cache.report.schema import (
    MAX_LEAKS,
    MAX_REPORT_BYTES,
    MAX_SOURCES,
    OF_A_HOST_TIER,
    OTHER_SOURCES,
    SCHEMA_VERSION,
    EntryInfo,
    Leak,
    LeakReport,
    SourceStats,
)

_MAX_KEY = 200  # characters of a shard's id


class Index(Protocol):
    """What is told of what is cached."""

    def stats(self) -> Mapping[str, float]:
        """Its part of `BufferStats`."""

    def report(self) -> Mapping[str, Any]:
        """Its part of a report."""

    def oldest(self, most: int, *, is_outlived: bool = False) -> Sequence[EntryInfo]:
        """The oldest shards, the oldest first."""


class Engine(Protocol):
    """What is told of a device and its memory."""

    @property
    def config(self) -> CacheConfig:
        """Resolved settings."""

    @property
    def device(self) -> Device:
        """Where shards are cached."""

    @property
    def tier(self) -> object | None:
        """The host tier, if there is one."""

    def stats(self) -> Mapping[str, float]:
        """Its part of `BufferStats`."""

    def details(self) -> Mapping[str, int]:
        """What a report has beyond that."""

    def gather(self) -> None:
        """Count copies that are done by now."""


class Reporter:
    """What a cache reports, as of a look. One thread at a time.

    Args:
        index: Of the cache.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._start_time = round(time.time(), 3)
        self._window = RateWindow(time.monotonic())
        self._seq = 0
        self._identity: tuple[Engine | None, dict[str, Any]] = None, {}  # of the engine that it speaks of

    def compose(self, engine: Engine) -> dict[str, Any]:
        """A `Report`; its `sources` are all there are."""
        if self._identity[0] is not engine:
            self._identity = engine, self._introduction(engine)
        self._seq += 1
        now_s = time.monotonic()
        figures = {**self._index.report(), **engine.stats(), **engine.details()}
        if engine.tier is None:
            figures = {name: figure for name, figure in figures.items() if name not in OF_A_HOST_TIER}
        return {
            "schema_version": SCHEMA_VERSION,
            "seq": self._seq,
            "unix_time": round(time.time(), 3),
            **self._identity[1],
            **buffer_stats_of(figures),
            "rates_10s": self._window.rates(figures, now_s),
        }

    def leaks(self) -> bytes:
        """A `LeakReport`, encoded."""
        figures = self._index.stats()
        answer = LeakReport(
            schema_version=SCHEMA_VERSION,
            unix_time=round(time.time(), 3),
            pid=os.getpid(),
            outlived_entries=int(figures["outlived_entries"]),
            outlived_bytes=int(figures["outlived_bytes"]),
            leaks=[
                Leak(
                    key=str(one.key)[:_MAX_KEY],
                    nbytes=one.nbytes,
                    age_seconds=round(one.age_s, 3),
                    clears_survived=one.clears_survived,
                    source=one.source,
                    dtype=str(one.dtype),
                    shape=list(one.shape),
                )
                for one in self._index.oldest(MAX_LEAKS, is_outlived=True)
            ],
        )
        return json.dumps(answer, separators=(",", ":")).encode()

    def _introduction(self, engine: Engine) -> dict[str, Any]:
        """Who reports: what does not change."""
        config, device = engine.config, engine.device.torch_device
        identity = engine.device.identity() if device.type == "cuda" else DeviceIdentity("")
        return {
            "pid": os.getpid(),
            "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
            "start_time": self._start_time,
            "hostname": socket.gethostname(),
            "role": config.role,
            "rank": config.rank,
            "device": str(device),
            "gpu_uuid": identity.uuid or None,
            "pci_bus_id": identity.pci_bus_id or None,
            "gpu_name": identity.name or None,
            "version": __version__,
            "config": dataclasses.asdict(config),
        }


def encoded(report: Mapping[str, Any]) -> bytes:
    """A report as compact JSON of at most MAX_REPORT_BYTES, with as many sources as fit."""
    rounded = {key: round(value, 6) if type(value) is float else value for key, value in report.items()}
    most = MAX_SOURCES
    while True:
        text = json.dumps({**rounded, "sources": largest(report["sources"], most)}, separators=(",", ":"))
        if len(text) <= MAX_REPORT_BYTES or not most:
            return text.encode()
        most //= 2


def largest(sources: Mapping[str, SourceStats], most: int) -> dict[str, SourceStats]:
    """The sources of most bytes, and the others as one."""
    if len(sources) <= most:
        return dict(sources)
    by_bytes = sorted(sources, key=lambda node: (node != OTHER_SOURCES, sources[node]["fetch_bytes"]), reverse=True)
    found = {node: sources[node] for node in by_bytes[:most]}
    rest = [sources[node] for node in by_bytes[most:]]
    found[OTHER_SOURCES] = summed(rest)
    return found


def summed(parts: list[SourceStats]) -> SourceStats:
    """Several sources as one. Their busy seconds overlap; they are counted as often."""
    reasons: dict[str, int] = {}
    for part in parts:
        for reason, count in part["fetch_errors_by_reason"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    return SourceStats(
        entries=sum(part["entries"] for part in parts),
        resident_bytes=sum(part["resident_bytes"] for part in parts),
        oldest_entry_age_seconds=max(part["oldest_entry_age_seconds"] for part in parts),
        fetch_bytes=sum(part["fetch_bytes"] for part in parts),
        fetch_busy_seconds=round(sum(part["fetch_busy_seconds"] for part in parts), 6),
        fetch_errors=sum(part["fetch_errors"] for part in parts),
        fetch_errors_by_reason=reasons,
        fetch_durations=[sum(counts) for counts in zip(*(part["fetch_durations"] for part in parts), strict=True)],
    )
