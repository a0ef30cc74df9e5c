"""Paths, costs and rows that no benchmark measured."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path as FilePath
from typing import Any

sys.path.insert(0, str(FilePath(__file__).resolve().parents[2] / "scripts"))

from bench import scale
from bench.allocations import Allocated, AllocationWatch
from bench.meter import Cost, Meter
from bench.paths import Path
from bench.rounds import Course, rows

# Of every row, by the issue that asked for them.
KEYS = {
    "workload", "path", "seconds", "gb_per_s", "us_per_shard", "cpu_s_per_gb_client", "cpu_s_per_gb_server",
    "rss_growth_bytes", "ratio_raw", "ratio_json",
}  # fmt: skip
HOST_PATHS = [
    "raw", "memcpy", "json", "cold", "cold4", "prefetch", "warm", "localized", "clear",
    "cold_busy_python", "cold_busy_torch",
]  # fmt: skip
DEVICE_PATHS = ["pinned_peak", "pipeline", "upstream_cold", "upstream_second"]
STATS = {"device_reserved_bytes": 100, "pinned_capacity_bytes": 7}


def a_path(name: str = "cold", **settings: Any) -> Path:
    """A path that does nothing."""
    return Path(name, **{"run": lambda _: "batch", "check": lambda _: None, "nbytes": 10, "num_shards": 2, **settings})


def a_meter() -> Meter:
    """On the host, with an owner that takes no time."""
    return Meter(lambda: 0.0, AllocationWatch(lambda: STATS, "cpu"))


def cost(seconds: float, **more: Any) -> Cost:
    """Of a call that took the client one second of CPU time, and the owner two."""
    return Cost(seconds, 1.0, 2.0, Allocated(), **more)


def full_rows() -> list[dict[str, Any]]:
    """As of a full run on a GPU."""
    found = []
    for workload in ("W1", "W2", "W3"):
        late = ("warm", "localized", "upstream_second", "clear")
        paths = [
            a_path(name, nbytes=10**9, num_shards=128, is_transfer=name not in late, is_reading=name != "clear")
            for name in HOST_PATHS + DEVICE_PATHS
        ]
        courses = [
            Course(path, 1, [cost(number * 2.0, lost=0.1 if "busy" in path.name else None)])
            for number, path in enumerate(paths, 1)
        ]
        found += rows(workload, 10**9, courses)
    return found + _scale_rows()


def _scale_rows() -> list[dict[str, Any]]:
    found = []
    for structure, operation in itertools.product(("index", "dict", "freelist"), scale.OPERATIONS):
        for size in scale.SIZES:
            figures = {"us_per_shard": size / 1e5, "growth": 2.0, "growth_over_dict": 1.0, "num_rounds": 1}
            path = f"{structure}_{operation}"
            found.append({"workload": "W4", "path": path, "num_entries": size, "gb_per_s": None, **figures})
    return found
