"""What the figures should be, and by how much each target is met or missed."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import scale
from bench.gpu_paths import FEW, LARGER, PIPELINE
from bench.paths import GET_MANY_HITS, LOCALIZE_HITS

PAGE_BYTES = mmap.PAGESIZE
Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Row]  # by workload and path; for scale the rows of a million entries


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: In words.
        measure: The figure, of rows by workload and path; None where it was not measured, as is a missing row.
        wanted: What it should be.
        stretch: What it would be if all went well; None where wanted is all that can be.
        is_floor: Whether more is better.
        wanted_words: `wanted` in words, where the number says too little.
    """

    what: str
    measure: Callable[[Rows], float | None]
    wanted: float
    stretch: float | None = None
    is_floor: bool = False
    wanted_words: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target, and what came of it.

    Attributes:
        target: Which.
        measured: The figure; None: it was not measured.
    """

    target: Target
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether it is what is wanted; None: it was not measured."""
        return self._reaches(self.target.wanted)

    @property
    def words(self) -> str:
        """Met or missed, and by how much."""
        if self.measured is None:
            return "not measured"
        if not self.is_met:
            return f"missed by {self._distance}"
        if self.target.stretch is None:
            return "met"
        return "stretch met" if self._reaches(self.target.stretch) else "met"

    def _reaches(self, limit: float) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= limit if self.target.is_floor else self.measured <= limit

    @property
    def _distance(self) -> str:
        """From what is wanted, in percent of it, or as a multiple."""
        measured, wanted = self.measured or 0.0, self.target.wanted
        if not wanted:
            return f"{measured:,.0f}"
        if not self.target.is_floor and measured >= 2 * wanted:
            return f"a factor of {measured / wanted:.1f}"
        return f"{abs(measured - wanted) / wanted:.0%}"


def verdicts(rows: Sequence[Row], is_host: bool) -> list[Verdict]:
    """Each target that the device has, with what was measured."""
    by_path = {(row["workload"], row["path"]): row for row in rows if row.get("num_entries") in (None, scale.SIZES[-1])}
    targets = HOST_TARGETS if is_host else HOST_TARGETS + DEVICE_TARGETS
    return [Verdict(target, _measured(target, by_path)) for target in targets]


def _measured(target: Target, rows: Rows) -> float | None:
    try:
        return target.measure(rows)
    except KeyError:
        return None


def _figure(workload: str, path: str, key: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows[workload, path][key]


def _growth(workload: str) -> Callable[[Rows], float]:
    """Of the client's memory, by the payload."""

    def measure(rows: Rows) -> float:
        row = rows[workload, "tuned/cold"]
        return float(row["rss_growth_bytes"] / row["measured_bytes"])

    return measure


def _most_growth(structure: str) -> Callable[[Rows], float]:
    """Of any operation's time, over a bare dict's."""
    operations = {"index": scale.OPERATIONS, "freelist": ("insert", "clear")}[structure]
    return lambda rows: max(rows[scale.NAME, f"{structure}_{name}"]["growth_over_dict"] for name in operations)


def _summed(prefix: str, key: str) -> Callable[[Rows], float | None]:
    """Of all rows whose names begin so, in all workloads."""

    def measure(rows: Rows) -> float | None:
        counts = [row[key] for (_, path), row in rows.items() if path.startswith(prefix) and row[key] is not None]
        return sum(counts) if counts else None

    return measure


def _most_faults(rows: Rows) -> float | None:
    """Page faults of a step, by the pages of its batch, where batches are large; those of Python are among them."""
    steps = [
        rows[workload, "defaults/step"]
        for workload in ("distillation", "vision", "images")
        if (workload, "defaults/step") in rows
    ]
    return max((row["page_faults"] * PAGE_BYTES / row["measured_bytes"] for row in steps), default=None)


def _milliseconds(workload: str, path: str) -> Callable[[Rows], float | None]:
    return lambda rows: rows[workload, path]["seconds"] * 1e3


COLD, WARM, STEP = "defaults/cold", "defaults/warm", "defaults/step"
SAME_HOST_COLD = "samehost/cold"
HOST_TARGETS = [
    Target("vision cold, of raw", _figure("vision", COLD, "ratio_raw"), 0.8, 0.95, is_floor=True),
    Target("distillation cold, of raw", _figure("distillation", COLD, "ratio_raw"), 0.75, 0.9, is_floor=True),
    Target("vision same host, of memcpy", _figure("vision", SAME_HOST_COLD, "ratio_memcpy"), 0.78, 0.85, is_floor=True),
    Target(
        "distillation same host, of memcpy",
        _figure("distillation", SAME_HOST_COLD, "ratio_memcpy"),
        0.65,
        is_floor=True,
    ),
    Target("rollout same host, us per shard", _figure("rollout", SAME_HOST_COLD, "us_per_shard"), 7.5),
    Target("rollout same host, us for one shard", _figure("rollout", "samehost/one", "us_per_shard"), 100),
    Target("vision cold, CPU s per GB, client", _figure("vision", COLD, "cpu_s_per_gb_client"), 0.15, 0.12),
    Target("rollout cold, us per shard", _figure("rollout", COLD, "us_per_shard"), 10, 6),
    Target("rollout warm, us per shard", _figure("rollout", WARM, "us_per_shard"), 1.0, 0.6),
    Target("rollout localized, us per shard", _figure("rollout", "defaults/localized", "us_per_shard"), 0.5, 0.3),
    Target("rollout hits of a flat list, times AReaL's", _figure("rollout", LOCALIZE_HITS, "times_reference"), 2, 1),
    Target("rollout hits by get_many, times AReaL's", _figure("rollout", GET_MANY_HITS, "times_reference"), 2, 1),
    Target("rollout warm beside Python, times quiet", _figure("rollout", f"{WARM}+python", "times_quiet"), 3, 1.5),
    Target("rollout cold beside Python, times quiet", _figure("rollout", f"{COLD}+python", "times_quiet"), 3, 2),
    Target("images cold beside Python, times quiet", _figure("images", f"{COLD}+python", "times_quiet"), 1.5, 1.2),
    Target(
        "images same host beside Python, times quiet",
        _figure("images", f"{SAME_HOST_COLD}+python", "times_quiet"),
        1.5,
        1.2,
    ),
    Target("images step, stall of busy Python, ms", _figure("images", f"{STEP}+python", "stall_ms"), 6, 2),
    Target("images step, stall of busy torch, ms", _figure("images", f"{STEP}+torch", "stall_ms"), 6, 2),
    Target("steps, slabs taken or given back", _summed(STEP, "num_slabs"), 0),
    # The interpreter's own memory faults too: under 0.02 of the pages of these batches.
    Target("large batches' step, faults by its pages", _most_faults, 0.02, wanted_words="none of slabs"),
    Target("vision cold, CPU s per GB, owner", _figure("vision", COLD, "cpu_s_per_gb_server"), 0.2, 0.15),
    Target("vision cold, busy Python loses, %", _figure("vision", f"{COLD}+python", "lost_percent"), 15, 5),
    # Beyond staging, which is there already, only the tensors' own objects are left: under 0.02 of these payloads.
    Target("distillation cold, client memory by payload", _growth("distillation"), 0.02, wanted_words="staging only"),
    Target("vision cold, client memory by payload", _growth("vision"), 0.02, wanted_words="staging only"),
    Target("tuned rows, allocations", _summed("tuned/", "num_allocations"), 0),
    Target("scale index, us per hit", _figure("scale", "index_hit", "us_per_shard"), 2.5, 1.5),
    Target("scale index, us per insert", _figure("scale", "index_insert", "us_per_shard"), 5, 4),
    Target("scale index, us per clear", _figure("scale", "index_clear", "us_per_shard"), 3, 2),
    Target("scale index, growth by the dict's", _most_growth("index"), 2),
    Target("scale free list, growth by the dict's", _most_growth("freelist"), 2),
]
_PIPELINE = f"defaults/{PIPELINE}"
DEVICE_TARGETS = [
    Target(
        "vision pipeline, of the pinned peak", _figure("vision", _PIPELINE, "ratio_pinned"), 0.85, 0.95, is_floor=True
    ),
    Target("rollout pipeline, us per shard", _figure("rollout", _PIPELINE, "us_per_shard"), 12),
    Target("rollout get and clear of 30 shards, ms", _milliseconds("rollout", f"defaults/{FEW}"), 2),
    Target(
        "five vision batches, stall of busy torch, ms", _figure("vision", f"defaults/{LARGER}+torch", "stall_ms"), 6, 2
    ),
    Target("rollout cold, times upstream_cold", _figure("rollout", COLD, "ratio_upstream"), 10, 20, is_floor=True),
]
