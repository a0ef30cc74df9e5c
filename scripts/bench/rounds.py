"""Interleaved rounds: each path once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.gpu_paths import PINNED_PEAK, UPSTREAM_COLD, UPSTREAM_SECOND
from bench.meter import Cost, Meter, with_growth
from bench.paths import Path

RAW, JSON = "raw", "json"
_GB = 1e9


@dataclass(frozen=True)
class Plan:
    """How many rounds.

    Attributes:
        most: So many, if there is time.
        least: So many, however long they take.
        seconds: None beyond `least` is begun that would, if it took as long as those before, end later than this.
    """

    most: int
    least: int
    seconds: float

    def rounds(self, now: Callable[[], float] = time.monotonic) -> Iterator[int]:
        """Their numbers; the clock runs from the first."""
        began = now()
        for number in range(self.most):
            if number >= self.least and (now() - began) * (number + 1) / number > self.seconds:
                return
            yield number


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


def run_rounds(paths: Sequence[Path], plan: Plan, meter: Meter, advance: Callable[[str], None]) -> list[Course]:
    """Run each path once to check what it brings and how memory grows, then in rounds to time it.

    Args:
        paths: What to run. Each round begins with another one.
        plan: How often.
        meter: Measures.
        advance: Told the path before each run.
    Raises:
        BenchError: A path brought other bits than were sent.
    """
    courses = [Course(path) for path in paths]
    for course in courses:
        advance(course.path.name)
        course.rss_growth_bytes = _checked(course.path)
    for number in plan.rounds():
        first = number % len(courses)
        for course in courses[first:] + courses[:first]:
            advance(course.path.name)
            course.costs.append(_timed(course.path, meter))
    return courses


def rows(workload: str, total_bytes: int, courses: Sequence[Course]) -> list[dict[str, Any]]:
    """The figures of each path: medians over the rounds, scaled to the whole workload where a part was run.

    A `ratio_` is the median of how many times as fast the path was as another one in the same round. What makes no
    sense is None: bytes per second where none move, ratios of a clear.
    """
    rates = {course.path.name: course.rates for course in courses}
    return [_row(workload, total_bytes / course.path.nbytes, course, rates) for course in courses]


def _row(workload: str, scale: float, course: Course, rates: dict[str, list[float]]) -> dict[str, Any]:
    path, costs = course.path, course.costs
    seconds = [cost.seconds for cost in costs]
    gigabytes = path.nbytes / _GB
    return {
        "workload": workload,
        "path": path.name,
        "seconds": statistics.median(seconds) * scale,
        "seconds_min": min(seconds) * scale,
        "seconds_max": max(seconds) * scale,
        "num_rounds": len(costs),
        "gb_per_s": statistics.median(course.rates) / _GB if path.is_transfer else None,
        "us_per_shard": statistics.median(seconds) / path.num_shards * 1e6,
        "cpu_s_per_gb_client": statistics.median(cost.client_cpu_s for cost in costs) / gigabytes,
        "cpu_s_per_gb_server": statistics.median(cost.server_cpu_s for cost in costs) / gigabytes,
        "rss_growth_bytes": course.rss_growth_bytes,
        **_ratios(course, rates),
        "lost_percent": _lost_percent(costs),
        "num_allocations": sum(cost.allocated.count for cost in costs),
        "device_growth_bytes": _device_growth(costs),
        "measured_bytes": path.nbytes,
    }


def _ratios(course: Course, rates: dict[str, list[float]]) -> dict[str, float | None]:
    """To the raw socket, to JSON, to the device's link, and to AReaL's way to the device, of a first or later read."""
    upstream = UPSTREAM_COLD if course.path.is_transfer else UPSTREAM_SECOND
    others = {"ratio_raw": RAW, "ratio_json": JSON, "ratio_pinned": PINNED_PEAK, "ratio_upstream": upstream}
    return {
        name: _ratio(course.rates, rates[other]) if course.path.is_reading and other in rates else None
        for name, other in others.items()
    }


def _ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(own, other, strict=True))


def _lost_percent(costs: Sequence[Cost]) -> float | None:
    lost = [cost.lost * 100 for cost in costs if cost.lost is not None]
    return statistics.median(lost) if lost else None


def _device_growth(costs: Sequence[Cost]) -> int | None:
    """The most in any round."""
    return max((c.allocated.device_bytes for c in costs if c.allocated.device_bytes is not None), default=None)


def _checked(path: Path) -> int:
    prepared = path.prepare()
    with path.beside or contextlib.nullcontext():
        result, growth = with_growth(partial(path.run, prepared))
    path.check(result)
    path.finish()
    return growth


def _timed(path: Path, meter: Meter) -> Cost:
    cost = meter.timed(partial(path.run, path.prepare()), path.beside)
    path.finish()
    return cost
