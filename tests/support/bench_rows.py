"""Paths, costs and rows that no benchmark measured."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path as FilePath
from typing import Any

sys.path.insert(0, str(FilePath(__file__).resolve().parents[2] / "scripts"))

from bench import scale
from bench.allocations import Allocated, AllocationWatch, MemoryTraffic
from bench.meter import Cost, Meter
from bench.paths import Path
from bench.rounds import Course, rows

# Figures that every row has.
KEYS = {
    "workload", "path", "seconds", "gb_per_s", "us_per_shard", "cpu_s_per_gb_client", "cpu_s_per_gb_server",
    "rss_growth_bytes", "ratio_raw", "ratio_json",
}  # fmt: skip


def _beside_each(*names: str) -> list[str]:
    return [f"{name}{beside}" for name in names for beside in ("", "+python", "+torch")]


_USERS = ["cold", "warm", "localized", "clear", "step"]
HOST_PATHS = [
    *_beside_each("raw"),
    *("memcpy", "json"),
    *_beside_each(*(f"defaults/{name}" for name in _USERS)),
    *_beside_each("tuned/cold", "samehost/cold"),
    "tuned/warm",
    "tuned/clear",
    "samehost/one",
]
HIT_PATHS = _beside_each("areal/hits", "areal/own_hits", "defaults/hits", "defaults/hits_get_many")
DEVICE_PATHS = [
    "pinned_peak", "defaults/pipeline", "tuned/pipeline", "defaults/get_clear_30", "defaults/larger",
    "defaults/larger+torch", "upstream_cold", "upstream_second",
]  # fmt: skip
_BATCH_PATHS = _beside_each("defaults/cold", "defaults/step", "samehost/cold")
# Rows of each workload; those of distillation and vision are the same.
_LARGE_PATHS = [
    *("raw", "memcpy", "json", *_beside_each("defaults/cold"), "defaults/warm", "defaults/clear"),
    *(*_beside_each("defaults/step"), "tuned/cold", "samehost/cold"),
]


def paths_of(workload: str, *, on_gpu: bool = False) -> list[str]:
    """Names of the rows of a workload, in order."""
    if workload == "images":
        return [*_beside_each("raw"), "memcpy", *_BATCH_PATHS]
    if workload != "rollout":
        return _LARGE_PATHS + ([name for name in DEVICE_PATHS if "30" not in name] if on_gpu else [])
    return HOST_PATHS + HIT_PATHS + _beside_each("defaults/remotize") + (DEVICE_PATHS if on_gpu else [])


def a_path(name: str = "cold", **settings: Any) -> Path:
    """A path that does nothing."""
    return Path(name, **{"run": lambda _: "batch", "check": lambda *_: None, "nbytes": 10, "num_shards": 2, **settings})


def a_meter() -> Meter:
    """On the host, with an owner that takes no time."""
    return Meter(lambda: 0.0, AllocationWatch(MemoryTraffic(), "cpu"))


def cost(seconds: float, **more: Any) -> Cost:
    """The row of a call that took the client one second of CPU time, and the owner two."""
    return Cost(seconds, 1.0, 2.0, Allocated(), **more)


def full_rows() -> list[dict[str, Any]]:
    """As of a full run on a GPU."""
    found = []
    for workload in ("rollout", "distillation", "vision", "images"):
        paths = [_full_path(name) for name in paths_of(workload, on_gpu=True)]
        courses = [
            Course(path, 1, [cost(number * 2.0, **({"lost": 0.1, "stall_s": 0.01} if path.quiet else {}))])
            for number, path in enumerate(paths, 1)
        ]
        found += rows(workload, 10**9, courses)
    return found + _scale_rows()


def _full_path(name: str) -> Path:
    quiet, plus, _ = name.partition("+")
    hot = any(word in name for word in ("warm", "localized", "second", "clear", "step", "hits"))
    return a_path(
        name,
        nbytes=10**9,
        num_shards=128,
        is_transfer=not hot,
        is_reading="clear" not in name and "step" not in name,
        quiet=quiet if plus else None,
    )


def _scale_rows() -> list[dict[str, Any]]:
    found = []
    for structure, operation in itertools.product(("index", "dict", "freelist"), scale.OPERATIONS):
        for size in scale.SIZES:
            figures = {"us_per_shard": size / 1e5, "growth": 2.0, "growth_over_dict": 1.0, "num_rounds": 1}
            path = f"{structure}_{operation}"
            found.append({"workload": "scale", "path": path, "num_entries": size, "gb_per_s": None, **figures})
    return found
