"""Interleaved rounds: each path once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.meter import Cost, timed, with_growth
from bench.paths import Path

RAW, JSON = "raw", "json"
_GB = 1e9


@dataclass
class Course:
    """What one path cost, round by round.

    Attributes:
        path: Which.
        costs: One for each timed round.
        rss_growth_bytes: The most that the client's memory grew in the round before them.
    """

    path: Path
    rss_growth_bytes: int = 0
    costs: list[Cost] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Bytes per second, round by round."""
        return [self.path.nbytes / cost.seconds for cost in self.costs]


def run_rounds(
    paths: Sequence[Path], num_rounds: int, server_cpu: Callable[[], float], advance: Callable[[str], None]
) -> list[Course]:
    """Run each path once to check what it brings and how memory grows, then in rounds to time it.

    Args:
        paths: What to run. Each round begins with another one.
        num_rounds: How often.
        server_cpu: CPU seconds of the owner so far.
        advance: Told the path before each run.
    Raises:
        BenchError: A path brought other bits than were sent.
    """
    courses = [Course(path) for path in paths]
    for course in courses:
        advance(course.path.name)
        course.rss_growth_bytes = _checked(course.path)
    for number in range(num_rounds):
        first = number % len(courses)
        for course in courses[first:] + courses[:first]:
            advance(course.path.name)
            course.costs.append(_timed(course.path, server_cpu))
    return courses


def rows(workload: str, total_bytes: int, courses: Sequence[Course]) -> list[dict[str, Any]]:
    """The figures of each path: medians over the rounds, scaled to the whole workload where a part was run.

    `ratio_raw` and `ratio_json` are medians of how many times as fast it was as these in the same round. What makes
    no sense is None: bytes per second where none move, ratios of a clear.
    """
    rates = {course.path.name: course.rates for course in courses}
    return [_row(workload, total_bytes / course.path.nbytes, course, rates) for course in courses]


def _row(workload: str, scale: float, course: Course, rates: dict[str, list[float]]) -> dict[str, Any]:
    path, seconds = course.path, [cost.seconds for cost in course.costs]
    gigabytes = path.nbytes / _GB
    is_reading = path.name != "clear"
    return {
        "workload": workload,
        "path": path.name,
        "seconds": statistics.median(seconds) * scale,
        "seconds_min": min(seconds) * scale,
        "seconds_max": max(seconds) * scale,
        "gb_per_s": statistics.median(course.rates) / _GB if path.is_transfer else None,
        "us_per_shard": statistics.median(seconds) / path.num_shards * 1e6,
        "cpu_s_per_gb_client": statistics.median(cost.client_cpu_s for cost in course.costs) / gigabytes,
        "cpu_s_per_gb_server": statistics.median(cost.server_cpu_s for cost in course.costs) / gigabytes,
        "rss_growth_bytes": course.rss_growth_bytes,
        "ratio_raw": _ratio(course.rates, rates[RAW]) if is_reading else None,
        "ratio_json": _ratio(course.rates, rates[JSON]) if is_reading else None,
        "measured_bytes": path.nbytes,
    }


def _ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(own, other, strict=True))


def _checked(path: Path) -> int:
    result, growth = with_growth(partial(path.run, path.prepare()))
    path.check(result)
    path.finish()
    return growth


def _timed(path: Path, server_cpu: Callable[[], float]) -> Cost:
    _, cost = timed(partial(path.run, path.prepare()), server_cpu)
    path.finish()
    return cost
