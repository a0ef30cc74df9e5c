"""Made-up reports: those behind the screens of the specification, in a folder with real locks and a fake /proc."""

from __future__ import annotations

import copy
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from gpu_cache.report.counters import buffer_stats_of
from gpu_cache.report.schema import SOURCE_DURATION_EDGES_S

MIB = 1 << 20
TIB = 1 << 40
NOW = 1795349754.102  # Sun Nov 22 12:15:54 2026 UTC
FIRST_PID = 41873
DEAD_S = 121.3


class Folder:
    """Reports of made-up processes. Holds their locks until `close`, and tells their pids in a `/proc/locks`."""

    def __init__(self, path: Path) -> None:
        self.path = path / "reports"
        self.path.mkdir(mode=0o700)
        self.procfs = path / "proc"
        (self.procfs / "self/ns").mkdir(parents=True)
        (self.procfs / "self/ns/pid").touch()
        (self.procfs / "locks").touch()
        self.namespace = (self.procfs / "self/ns/pid").stat().st_ino
        self.now = NOW
        self._locks: dict[str, int] = {}

    def add(
        self, report: dict[str, Any], *, age_s: float = 0.41, is_alive: bool = True, host_pid: int | None = None
    ) -> Path:
        """Write a report as its process would; `host_pid` is what `/proc/locks` says, if anything."""
        name = f"{report.get('role', 'x')}-{report.get('rank', 0)}-{report.get('pid', 0)}-0a1b2c"
        lock = self.path / f"{name}.lock"
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        if is_alive:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locks[name] = descriptor
            if host_pid is not None:
                self._tell(lock, host_pid)
        else:
            os.close(descriptor)
        return self.write(name, json.dumps({"pid_namespace": self.namespace} | report), age_s)

    def write(self, name: str, text: str, age_s: float = 0.41) -> Path:
        """Replace a report's text, at a time before now."""
        path = self.path / f"{name}.json"
        path.write_text(text)
        os.utime(path, (self.now - age_s,) * 2)
        return path

    def release(self, path: Path) -> None:
        """End a process: its lock is free."""
        os.close(self._locks.pop(path.stem))

    def close(self) -> None:
        for name in list(self._locks):
            os.close(self._locks.pop(name))

    def _tell(self, lock: Path, pid: int) -> None:
        found = lock.stat()
        where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        with open(self.procfs / "locks", "a") as locks:
            locks.write(f"1: FLOCK  ADVISORY  WRITE {pid} {where} 0 EOF\n")


def uuid(index: int) -> str:
    return f"GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e5{index}"


def durations(p50_ms: float, p99_ms: float) -> list[int]:
    """Counts by SOURCE_DURATION_EDGES_S that have these quantiles."""
    edges = [0.0, *(1000 * edge for edge in SOURCE_DURATION_EDGES_S)]

    def place(value: float) -> tuple[int, float]:
        """Its bucket, and how far into it."""
        bucket = next(i for i, upper in enumerate(edges[1:]) if value <= upper)
        return bucket, (value - edges[bucket]) / (edges[bucket + 1] - edges[bucket])

    (median, into_median), (tail, into_tail) = place(p50_ms), place(p99_ms)
    shares = [0.0] * (len(edges))
    shares[tail] = 0.01 / (1 - into_tail)
    shares[median] = min((0.5 - shares[tail]) / (1 - into_median), 0.5 / into_median)
    shares[0] += 0.5 - into_median * shares[median]
    shares[tail - 1] += 1 - sum(shares)
    return [round(1e6 * share) for share in shares]


def source(entries: int, resident_mib: int, fetched: float, speed: float, latency: list[int]) -> dict[str, Any]:
    return {
        "entries": entries,
        "resident_bytes": resident_mib * MIB,
        "oldest_entry_age_seconds": 0.0,
        "fetch_bytes": int(fetched),
        "fetch_busy_seconds": fetched / speed,
        "fetch_errors": 0,
        "fetch_errors_by_reason": {},
        "fetch_durations": latency,
    }


_FIGURES: dict[str, Any] = {
    "num_entries": 1536,
    "num_tensors": 1536,
    "total_bytes": (12288 + 7680) * MIB,
    "device_bytes": 12288 * MIB,
    "device_reserved_bytes": 20480 * MIB,
    "device_capacity_bytes": 20480 * MIB,
    "device_peak_bytes": 14000 * MIB,
    "device_largest_free_bytes": 7000 * MIB,
    "pinned_bytes": 128 * MIB,
    "pinned_capacity_bytes": 2048 * MIB,
    "is_pinned": 1,
    "pinned_wait_seconds": 3.5,
    "host_bytes": 7680 * MIB,
    "host_capacity_bytes": 65536 * MIB,
    "requested": 15_348_000,
    "hits": 14_857_000,
    "joined": 1_000,
    "misses": 490_000,
    "cleared": 400_000,
    "cleared_bytes": 3 * TIB,
    "evictions": 12,
    "evicted_bytes": 96 * MIB,
    "fetches": 61_000,
    "fetch_bytes": 4_120_000_000_000,
    "fetch_busy_seconds": 361.2,
    "copies": 61_000,
    "h2d_bytes": 4_120_000_000_000,
    "h2d_busy_seconds": 171.0,
    "oldest_entry_age_seconds": 37.8,
    "clears": 260,
}
_RATES: dict[str, Any] = {
    "fetch_bytes_per_second": 11.4e9,
    "fetch_window_age_seconds": 2.5,
    "fetch_bytes_per_wall_second": 1.9e9,
    "h2d_bytes_per_second": 24.1e9,
    "h2d_window_age_seconds": 2.5,
    "h2d_bytes_per_wall_second": 1.9e9,
    "evictions_per_second": 0.0,
    "pinned_wait_seconds_per_second": 0.0002,
    "overflows": 0,
    "alloc_failures": 0,
}
_IDENTITY: dict[str, Any] = {
    "schema_version": 1,
    "seq": 5421,
    "unix_time": NOW - 0.41,
    "start_time": NOW - 5421,
    "hostname": "gpu-a-017",
    "role": "actor",
    "device": "cuda:0",
    "gpu_name": "NVIDIA H200",
    "version": "0.1.0",
    "config": {"pool_bytes": 20480 * MIB},
    "histograms": {
        "fetch_duration_seconds": {"counts": [0, 0, 0, 600, 400, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "sum": 4.5},
        "entry_size_bytes": {"counts": [0, 0, 10, 500, 1026, 0, 0, 0, 0, 0], "sum": 12288 * MIB},
    },
    "survivors": [],
    "outlived_max_clears": 0,
    "sources": {},
}


def report(index: int, **changes: Any) -> dict[str, Any]:
    """That of actor/0, on another GPU, with changes; keys of `rates_10s` may be given by their own name."""
    own_rates = {key: changes.pop(key) for key in list(changes) if key in _RATES}
    made = {**buffer_stats_of(_FIGURES), **_IDENTITY, **_place(index), "rates_10s": _RATES | own_rates} | changes
    return copy.deepcopy(made)


def _place(index: int) -> dict[str, Any]:
    return {
        "pid": FIRST_PID + index,
        "rank": index,
        "gpu_uuid": uuid(index),
        "pci_bus_id": f"0000:{index:02x}:00.0",
    }


# Ranks 0 to 5 and 7: pool in MiB, entries, hit ratio, fetch and h2d GB/s, age of the oldest.
_RANKS = {
    0: (12288, 1536, 0.968, 11.4, 24.1, 38.2),
    1: (12304, 1538, 0.967, 11.2, 24.0, 38.1),
    2: (11952, 1494, 0.968, 11.3, 23.9, 37.4),
    3: (14460, 1604, 0.965, 11.1, 23.9, 4322.0),
    4: (12110, 1514, 0.968, 11.5, 24.2, 38.4),
    5: (9216, 880, 0.912, 10.9, 23.5, 127.0),
    7: (12200, 1525, 0.968, 11.4, 24.0, 38.0),
}
# Totals over these ranks: entries, resident MiB, TiB fetched, GB/s, p50 and p99 in ms.
_SOURCES = {
    "gpu-a-021:35221": (4900, 41210, 1.9, 11.9, (3.1, 9.8)),
    "gpu-a-022:35221": (4850, 40592, 1.9, 11.8, (3.1, 10.2)),
    "gpu-a-023:35221": (313, 2504, 0.4, 4.2, (8.8, 61.0)),
    "local": (28, 224, 0.1, 21.6, (0.356, 0.9)),
}
SLOW_SOURCE = "gpu-a-023:35221"
LEAKING, HANGING = 3, 5


def trainers() -> list[tuple[dict[str, Any], float]]:
    """The living processes of the specification's first screen, each with the age of its report."""
    return [(_trainer(rank), _age_s(rank)) for rank in _RANKS]


def dead_trainer() -> dict[str, Any]:
    return report(6, unix_time=NOW - DEAD_S)


def _age_s(rank: int) -> float:
    return 47.2 if rank == HANGING else 0.41


def _trainer(rank: int) -> dict[str, Any]:
    pool, entries, hit_ratio, fetch, h2d, oldest_s = _RANKS[rank]
    hits = int(hit_ratio * 15_348_000) + 1
    made = report(
        rank,
        unix_time=NOW - _age_s(rank),
        device_bytes=pool * MIB,
        num_entries=entries,
        num_tensors=entries,
        hits=hits,
        misses=15_348_000 - 1_000 - hits,
        oldest_entry_age_seconds=oldest_s - _age_s(rank),
        fetch_bytes_per_second=fetch * 1e9,
        h2d_bytes_per_second=h2d * 1e9,
        pinned_wait_seconds_per_second=0.0003 if rank == 2 else 0.0002,
        sources={address: _share(rank, address) for address in _SOURCES},
    )
    if rank == LEAKING:
        made |= {"outlived_entries": 12, "outlived_bytes": 2172 * MIB, "outlived_max_clears": 9}
        made |= {"survivors": [[9, 12, 2172 * MIB]], "host_capacity_bytes": 2 * 65536 * MIB}
    return made


def _share(rank: int, address: str) -> dict[str, Any]:
    """A rank's part of a source: all have the same, the leaking one the rest too, the hanging one only the slow."""
    entries, resident, tib, speed, quantiles = _SOURCES[address]
    if rank == HANGING and address != SLOW_SOURCE:
        return source(0, 0, tib * TIB / 7, speed * 1e9, durations(*quantiles))
    parts = 7 if address == SLOW_SOURCE else 6
    extra = parts - 1 if rank == LEAKING else 0
    made = source(entries // parts, resident // parts, tib * TIB / 7, speed * 1e9, durations(*quantiles))
    if extra:
        made["entries"] = entries - (entries // parts) * extra
        made["resident_bytes"] = (resident - (resident // parts) * extra) * MIB
    youngest_s = {"local": 36.0}.get(address, 38.0)
    made["oldest_entry_age_seconds"] = youngest_s - _age_s(rank)
    if address == SLOW_SOURCE and rank in (LEAKING, HANGING):
        made["oldest_entry_age_seconds"] = _RANKS[rank][-1] - _age_s(rank)
    if address == SLOW_SOURCE and rank == LEAKING:
        made |= {"fetch_errors": 17, "fetch_errors_by_reason": {"timeout": 12, "connection": 5}}
    return made
