"""Composes the report of one cache, and the box that shows it as text."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from gpu_cache import __version__, units
from gpu_cache.config import CacheConfig
from gpu_cache.device.protocol import Device, DeviceIdentity
from gpu_cache.report import schema
from gpu_cache.report.counters import buffer_stats_of
from gpu_cache.report.schema import EntryInfo, LeakReport, Rates, SourceStats

_COUNTED = ("overflows", "alloc_failures", "fetch_errors")  # of the window: their number
_MAX_KEY = 200  # characters of a shard's id
_RULE = "-" * 97
_HEAD = " GPU     PID  Role          State    Pool  Pinned    Host Entries  Hit%    Fetch      H2D Oldest "


class Index(Protocol):
    """Which shards are cached: its part of a report, and the oldest shards, the oldest first."""

    def report(self) -> Mapping[str, Any]: ...
    def oldest(self, most: int, *, is_outlived: bool = False) -> Sequence[EntryInfo]: ...


class Engine(Protocol):
    """A device and its memory: its part of `BufferStats`, and what a report has beyond that."""

    @property
    def config(self) -> CacheConfig: ...
    @property
    def device(self) -> Device | None: ...  # None: not chosen yet
    def stats(self) -> Mapping[str, float]: ...
    def details(self) -> Mapping[str, int]: ...
    def gather(self) -> None: ...  # counts copies that are done by now


class Unused:
    """Stands for the engine of a cache before its first use, which chooses a device. It has no figures.

    Args:
        config: Settings, as given.
    """

    device = None

    def __init__(self, config: CacheConfig) -> None:
        resolved = config.resolved(is_cuda=False, device_bytes=0)
        # The device decides these.
        self.config = dataclasses.replace(resolved, pool_bytes=config.pool_bytes, prealloc_bytes=config.prealloc_bytes)

    def stats(self) -> Mapping[str, float]:
        return {}

    def details(self) -> Mapping[str, int]:
        return {}

    def gather(self) -> None:
        """There are no copies."""


class Reporter:
    """Composes what one cache reports. One thread at a time."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._start_time = round(time.time(), 3)
        self._window = RateWindow(time.monotonic())
        self._seq = 0
        self._identity: tuple[Engine | None, dict[str, Any]] = None, {}  # with the engine that it describes
        self.beside: Callable[[], Mapping[str, int]] = dict  # figures of what is no part of the cache

    def compose(self, engine: Engine) -> dict[str, Any]:
        """A `Report` as of now, with all sources."""
        if self._identity[0] is not engine:
            self._identity = engine, self._introduction(engine)
        self._seq += 1
        known = self._index.report()
        figures = buffer_stats_of(known, engine.stats(), engine.details())
        missing = set() if engine.config.host_tier_bytes else set(schema.HostTierFigures.__annotations__)
        if engine.device is None:  # there is no engine yet: its figures are missing, not 0
            missing |= figures.keys() - known.keys()
        return {
            "schema_version": schema.SCHEMA_VERSION,
            "seq": self._seq,
            "unix_time": round(time.time(), 3),
            **self._identity[1],
            **{key: figure for key, figure in figures.items() if key not in missing},
            **self.beside(),
            "rates_10s": self._window.rates(figures, time.monotonic()),
        }

    def leaks(self) -> bytes:
        """A `LeakReport`, encoded."""
        figures = self._index.report()
        answer = LeakReport(
            schema_version=schema.SCHEMA_VERSION,
            unix_time=round(time.time(), 3),
            pid=os.getpid(),
            outlived_entries=figures["outlived_entries"],
            outlived_bytes=figures["outlived_bytes"],
            leaks=[_leak(one) for one in self._index.oldest(schema.MAX_LEAKS, is_outlived=True)],
        )
        return json.dumps(answer, separators=(",", ":"), default=str).encode()  # dtypes are no JSON

    def _introduction(self, engine: Engine) -> dict[str, Any]:
        config, device = engine.config, engine.device
        identity = (
            device.identity() if device is not None and device.torch_device.type == "cuda" else DeviceIdentity("")
        )
        return {
            "pid": os.getpid(),
            "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
            "start_time": self._start_time,
            "hostname": socket.gethostname(),
            "role": config.role,
            "rank": config.rank,
            "device": "cpu" if device is None else str(device.torch_device),
            "gpu_uuid": identity.uuid or None,
            "pci_bus_id": identity.pci_bus_id or None,
            "gpu_name": identity.name or None,
            "version": __version__,
            "config": dataclasses.asdict(config),
        }


class RateWindow:
    """Turns counters, which are 0 at `began_s`, into the rates of the last WINDOW_S. One thread at a time."""

    def __init__(self, began_s: float) -> None:
        self._looks: deque[tuple[float, Mapping[str, Any]]] = deque([(began_s, buffer_stats_of())])
        self._moved_at_s: dict[str, float] = {}  # by link, when its counters last grew
        self._busy_rate: dict[str, float] = {}  # by link, in the latest window that had a transfer

    def rates(self, figures: Mapping[str, Any], now_s: float) -> Rates:
        """The rates as of now; `figures` has those of `BufferStats`."""
        while len(self._looks) > 1 and self._looks[1][0] <= now_s - schema.WINDOW_S:
            self._looks.popleft()
        (began_s, begin), (_, previous) = self._looks[0], self._looks[-1]
        self._looks.append((now_s, figures))

        def grown(key: str, since: Mapping[str, Any] = begin) -> Any:
            return figures[key] - since[key]

        rates: dict[str, float | None] = {key: grown(key) for key in _COUNTED}
        span_s = max(now_s - began_s, 1e-3)
        for link in ("fetch", "h2d"):
            if max(grown(f"{link}_bytes", previous), grown(f"{link}_busy_seconds", previous)) > 0:
                self._moved_at_s[link] = now_s
            if (busy_s := grown(f"{link}_busy_seconds")) > 0:
                self._busy_rate[link] = round(grown(f"{link}_bytes") / busy_s, 0)
            rate = rates[f"{link}_bytes_per_second"] = self._busy_rate.get(link)
            rates[f"{link}_window_age_seconds"] = None if rate is None else round(now_s - self._moved_at_s[link], 3)
            rates[f"{link}_bytes_per_wall_second"] = round(grown(f"{link}_bytes") / span_s)
        rates["evictions_per_second"] = round(grown("evictions") / span_s, 3)
        rates["pinned_wait_seconds_per_second"] = round(grown("pinned_wait_seconds") / span_s, 6)
        return cast(Rates, rates)


def _leak(one: EntryInfo) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(one, key=str(one.key)[:_MAX_KEY]))
    return {"age_seconds": round(fields.pop("age_s"), 3), **fields}


def encoded(report: Mapping[str, Any]) -> bytes:
    """A report as compact JSON of at most MAX_REPORT_BYTES, with as many sources as fit."""
    rounded = {key: round(value, 6) if type(value) is float else value for key, value in report.items()}
    most = schema.MAX_SOURCES
    while True:
        text = json.dumps({**rounded, "sources": _largest(report["sources"], most)}, separators=(",", ":"))
        if len(text) <= schema.MAX_REPORT_BYTES or not most:
            return text.encode()
        most //= 2


def _largest(sources: Mapping[str, SourceStats], most: int) -> dict[str, SourceStats]:
    """The sources that delivered most bytes, and the others as one."""
    if len(sources) <= most:
        return dict(sources)
    other = schema.OTHER_SOURCES
    by_bytes = sorted(sources, key=lambda node: (node == other, -sources[node]["fetch_bytes"]))
    rest = _summed([sources[node] for node in by_bytes[most:]])
    return {node: sources[node] for node in by_bytes[:most]} | {other: rest}


def _summed(parts: list[SourceStats]) -> SourceStats:
    """Several sources as one. Where their busy seconds overlap, each counts."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part["fetch_errors_by_reason"])
    return SourceStats(
        entries=sum(part["entries"] for part in parts),
        resident_bytes=sum(part["resident_bytes"] for part in parts),
        oldest_entry_age_seconds=max(part["oldest_entry_age_seconds"] for part in parts),
        fetch_bytes=sum(part["fetch_bytes"] for part in parts),
        fetch_busy_seconds=round(sum(part["fetch_busy_seconds"] for part in parts), 6),
        fetch_errors=sum(part["fetch_errors"] for part in parts),
        fetch_errors_by_reason=reasons,
        fetch_durations=[sum(counts) for counts in zip(*(part["fetch_durations"] for part in parts), strict=True)],
        transport="",
    )


def summary_of(report: Mapping[str, Any]) -> str:
    """The box in which `gpu-cache-smi` shows this process; made without that tool's libraries."""
    rates, num_entries = report["rates_10s"], report["num_entries"]
    kind, _, index = report["device"].partition(":")
    title = f"{report['role']}/{report['rank']}"[:13]
    hit = units.percent(units.ratio(report["hits"] + report["host_hits"], report["requested"]))
    line = (
        f"{f'{index or 0}*' if kind == 'cuda' else kind:>4}{report['pid']:>8}  {title:<14}"
        f"{'LEAK' if report['outlived_entries'] else 'ok':<5}{units.size(report['device_bytes']):>8}"
        f"{units.size(report['pinned_capacity_bytes']):>8}{units.size(report['host_bytes']):>8}"
        f"{units.count(num_entries):>8}{hit:>6}{units.speed(rates['fetch_bytes_per_second']):>9}"
        f"{units.speed(rates['h2d_bytes_per_second']):>9}"
        f"{units.age(report['oldest_entry_age_seconds'] if num_entries else None):>7} "
    )
    return "\n".join((f"+{_RULE}+", f"|{_HEAD}|", f"|{'=' * len(_RULE)}|", f"|{line}|", f"+{_RULE}+"))
