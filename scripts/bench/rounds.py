"""Interleaved rounds: each path once a round, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.gpu_paths import PINNED_PEAK, UPSTREAM_COLD, UPSTREAM_SECOND
from bench.meter import Cost, Meter, with_growth
from bench.paths import GET_MANY_HITS, HITS, LOCALIZE_HITS, OWN_HITS, REFERENCE, Path

RAW, MEMCPY, JSON = "raw", "memcpy", "json"
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
        rss_growth_bytes: The most that the client's memory grew in the round before them; None: not looked at.
    """

    path: Path
    rss_growth_bytes: int | None = None
    costs: list[Cost] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Bytes per second, round by round."""
        return [self.path.nbytes / cost.seconds for cost in self.costs]


def run_rounds(paths: Sequence[Path], plan: Plan, meter: Meter, advance: Callable[[str], None]) -> list[Course]:
    """Run each quiet path once to check what it brings and how memory grows, then all of them in rounds to time them.

    What a path brings beside another thread is checked in the first round.

    Args:
        paths: What to run. Each round begins with another one.
        plan: How often.
        meter: Measures.
        advance: Told the path before each run.
    Raises:
        BenchError: A path brought other bits than were sent.
    """
    courses = [Course(path) for path in paths if not path.reason]
    for course in courses:
        if course.path.beside is None:
            advance(course.path.name)
            course.rss_growth_bytes = _checked(course.path)
    for number in plan.rounds() if courses else ():
        first = number % len(courses)
        for course in courses[first:] + courses[:first]:
            advance(course.path.name)
            is_checked = number > 0 or course.path.beside is None
            course.costs.append(_timed(course.path, meter, is_checked))
    return courses


def rows(workload: str, total_bytes: int, courses: Sequence[Course]) -> list[dict[str, Any]]:
    """The figures of each path: medians over the rounds, scaled to the whole workload where a part was run.

    A `ratio_` is the median of how many times as fast the path was as another one in the same round; `times_`, of how
    many times as long it took. What makes no sense is None: bytes per second where none move, ratios of a clear.
    """
    by_name = {course.path.name: course for course in courses}
    return [_row(workload, total_bytes / course.path.nbytes, course, by_name) for course in courses]


def skipped_row(workload: str, path: Path) -> dict[str, Any]:
    """The row of a path that cannot run: why, and no figures."""
    return {"workload": workload, "path": path.name, "skipped": path.reason, **dict.fromkeys(_FIGURES)}


# Of every row; see `rows`.
_FIGURES = (
    "seconds", "seconds_min", "seconds_max", "num_rounds", "gb_per_s", "us_per_shard", "cpu_s_per_gb_client",
    "cpu_s_per_gb_server", "rss_growth_bytes", "ratio_raw", "ratio_memcpy", "ratio_json", "ratio_pinned",
    "ratio_upstream", "times_quiet", "times_reference", "lost_percent", "stall_ms", "num_allocations", "num_slabs",
    "page_faults", "device_growth_bytes", "measured_bytes",
)  # fmt: skip


def _row(workload: str, scale: float, course: Course, by_name: Mapping[str, Course]) -> dict[str, Any]:
    path, costs = course.path, course.costs
    seconds = [cost.seconds for cost in costs]
    gigabytes = path.nbytes / _GB
    return {
        "workload": workload,
        "path": path.name,
        "skipped": "",
        "seconds": statistics.median(seconds) * scale,
        "seconds_min": min(seconds) * scale,
        "seconds_max": max(seconds) * scale,
        "num_rounds": len(costs),
        "gb_per_s": statistics.median(course.rates) / _GB if path.is_transfer else None,
        "us_per_shard": statistics.median(seconds) / path.num_shards * 1e6,
        "cpu_s_per_gb_client": statistics.median(cost.client_cpu_s for cost in costs) / gigabytes,
        "cpu_s_per_gb_server": statistics.median(cost.server_cpu_s for cost in costs) / gigabytes,
        "rss_growth_bytes": course.rss_growth_bytes,
        **_ratios(course, by_name),
        "lost_percent": _median([cost.lost * 100 for cost in costs if cost.lost is not None]),
        "stall_ms": _median([cost.stall_s * 1e3 for cost in costs if cost.stall_s is not None]),
        "num_allocations": sum(cost.allocated.count for cost in costs),
        "num_slabs": sum(cost.allocated.num_slabs for cost in costs),
        "page_faults": statistics.median(cost.allocated.page_faults for cost in costs),
        "device_growth_bytes": _device_growth(costs),
        "measured_bytes": path.nbytes,
    }


def _ratios(course: Course, by_name: Mapping[str, Course]) -> dict[str, float | None]:
    """To the raw socket, a copy between buffers, JSON, the device's link, and AReaL's way to the device, of a first or
    later read.

    And how many times as long as with nothing beside it, and as AReaL's hits, or a dict's.
    """
    path = course.path
    upstream = UPSTREAM_COLD if path.is_transfer else UPSTREAM_SECOND
    others = {
        "ratio_raw": RAW,
        "ratio_memcpy": MEMCPY,
        "ratio_json": JSON,
        "ratio_pinned": PINNED_PEAK,
        "ratio_upstream": upstream,
    }
    found = {name: _ratio(course, by_name.get(other)) if path.is_reading else None for name, other in others.items()}
    base, plus, kind = path.name.partition("+")
    # AReaL's own, where it is installed.
    references = (OWN_HITS, REFERENCE) if base in (LOCALIZE_HITS, GET_MANY_HITS) else (REFERENCE,)
    ran = [by_name[name] for one in references if (name := f"{one}{plus}{kind}") in by_name]
    reference = ran[0] if ran and base in HITS else None
    return {
        **found,
        "times_quiet": _ratio(by_name.get(path.quiet or ""), course),
        "times_reference": _ratio(reference, course),
    }


def _ratio(one: Course | None, other: Course | None) -> float | None:
    """How many times as fast; None if one was not run."""
    if one is None or other is None:
        return None
    return statistics.median(mine / theirs for mine, theirs in zip(one.rates, other.rates, strict=True))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _device_growth(costs: Sequence[Cost]) -> int | None:
    """The most in any round."""
    return max((c.allocated.device_bytes for c in costs if c.allocated.device_bytes is not None), default=None)


def _checked(path: Path) -> int:
    result, growth = with_growth(partial(path.run, path.prepare()))
    path.check(path.name, result)
    del result  # its memory is free when `finish` looks
    path.finish()
    return growth


def _timed(path: Path, meter: Meter, is_checked: bool) -> Cost:
    cost, result = meter.timed(partial(path.run, path.prepare()), path.beside)
    if not is_checked:
        path.check(path.name, result)
    del result
    path.finish()
    return cost
