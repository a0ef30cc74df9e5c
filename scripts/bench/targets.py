"""What the figures should be: issue 4's targets, AReaL's figures, and by how much each is reached or missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import scale

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Row]  # by workload and path; of W4 the rows of a million entries

_STEADY = ("cold", "cold4", "prefetch", "warm", "localized", "clear")


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: In words.
        measure: The figure, of rows by workload and path; None where it was not measured, as is a missing row.
        must: What it must be.
        stretch: What it would be if all went well; None where must is all that can be.
        upstream: What AReaL's own code does today, in words.
        is_floor: Whether more is better.
        must_words: `must` in words, where the number says too little.
    """

    what: str
    measure: Callable[[Rows], float | None]
    must: float
    stretch: float | None = None
    upstream: str = ""
    is_floor: bool = False
    must_words: str = ""


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
        """Whether it is what it must be; None: it was not measured."""
        return self._reaches(self.target.must)

    @property
    def words(self) -> str:
        """Reached or missed, and by how much."""
        if self.measured is None:
            return "not measured"
        if not self.is_met:
            return f"missed by {self._distance}"
        if self.target.stretch is None:
            return "reached"
        return "stretch reached" if self._reaches(self.target.stretch) else "must reached"

    def _reaches(self, limit: float) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= limit if self.target.is_floor else self.measured <= limit

    @property
    def _distance(self) -> str:
        """From what must be, in percent of it, or as a multiple."""
        measured, must = self.measured or 0.0, self.target.must
        if not must:
            return f"{measured:,.0f}"
        if not self.target.is_floor and measured >= 2 * must:
            return f"a factor of {measured / must:.1f}"
        return f"{abs(measured - must) / must:.0%}"


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
    return lambda rows: rows[workload, "cold"]["rss_growth_bytes"] / rows[workload, "cold"]["measured_bytes"]


def _most_growth(structure: str) -> Callable[[Rows], float]:
    """Of any operation's time, over a bare dict's."""
    operations = {"index": scale.OPERATIONS, "freelist": ("insert", "clear")}[structure]
    return lambda rows: max(rows[scale.NAME, f"{structure}_{name}"]["growth_over_dict"] for name in operations)


def _num_allocations(rows: Rows) -> float | None:
    """Of all paths of users, in all workloads."""
    counts = [row["num_allocations"] for (workload, path), row in rows.items() if path in _STEADY]
    return sum(counts) if counts else None


_RAW = "0.014 to 0.016"
HOST_TARGETS = [
    Target("W2 cold, of the raw limit", _figure("W2", "cold", "ratio_raw"), 0.85, 0.95, _RAW, is_floor=True),
    Target("W3 cold, of the raw limit", _figure("W3", "cold", "ratio_raw"), 0.85, 0.95, _RAW, is_floor=True),
    Target("W1 cold, us per shard", _figure("W1", "cold", "us_per_shard"), 8, 4.5, "114"),
    Target("W1 warm, us per shard", _figure("W1", "warm", "us_per_shard"), 1.3, 0.8, "1.0"),
    Target("W1 already localized, us per shard", _figure("W1", "localized", "us_per_shard"), 0.5, 0.3, "0.64"),
    Target("W3 cold, CPU s per GB, client", _figure("W3", "cold", "cpu_s_per_gb_client"), 0.2, 0.15, "7.1"),
    Target("W3 cold, CPU s per GB, owner", _figure("W3", "cold", "cpu_s_per_gb_server"), 0.2, 0.15, "3.1"),
    Target("W3 cold beside busy Python, GB/s", _figure("W3", "cold_busy_python", "gb_per_s"), 1.5, 2.5, is_floor=True),
    Target("W3 cold, busy Python loses, %", _figure("W3", "cold_busy_python", "lost_percent"), 15, 5),
    # Beyond staging, which is there already, only the tensors' own objects are left: under 0.02 of these payloads.
    Target("W2 cold, client memory by payload", _growth("W2"), 0.02, None, "4", must_words="staging only"),
    Target("W3 cold, client memory by payload", _growth("W3"), 0.02, None, "4", must_words="staging only"),
    Target("W4 index, us per hit", _figure("W4", "index_hit", "us_per_shard"), 2.5, 1.5),
    Target("W4 index, us per insert", _figure("W4", "index_insert", "us_per_shard"), 5, 4),
    Target("W4 index, us per clear", _figure("W4", "index_clear", "us_per_shard"), 3, 2),
    Target("W4 index, growth by the dict's", _most_growth("index"), 2),
    Target("W4 free list, growth by the dict's", _most_growth("freelist"), 2),
    Target("allocations after warm-up", _num_allocations, 0),
]
DEVICE_TARGETS = [
    Target(
        "W3 pipeline, of the pinned peak",
        _figure("W3", "pipeline", "ratio_pinned"),
        0.85,
        0.95,
        is_floor=True,
    ),
    Target("W1 cold, times upstream_cold", _figure("W1", "cold", "ratio_upstream"), 10, 20, is_floor=True),
]
