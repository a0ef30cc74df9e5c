"""Rates of the last seconds, from counters that are looked at now and then."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from gpu_cache.report.schema import WINDOW_S, Rates
from gpu_cache.units import ratio

_COUNTERS = (
    "fetch_bytes", "fetch_busy_seconds", "h2d_bytes", "h2d_busy_seconds", "evictions", "pinned_wait_seconds",
    "overflows", "alloc_failures",
)  # fmt: skip


class _Look(NamedTuple):
    """At the counters, and when."""

    at_s: float
    counters: Mapping[str, float]

    def grown(self, since: _Look, key: str) -> float:
        return self.counters.get(key, 0) - since.counters.get(key, 0)


@dataclasses.dataclass
class _Link:
    """The latest window in which something moved over the network, or to the device."""

    name: str
    bytes_per_second: float | None = None
    moved_at_s: float | None = None

    def look(self, begin: _Look, previous: _Look, now: _Look) -> None:
        """Remember this window, if anything moved in it."""
        if any(now.grown(previous, f"{self.name}_{what}") > 0 for what in ("bytes", "busy_seconds")):
            self.moved_at_s = now.at_s
        busy_s = now.grown(begin, f"{self.name}_busy_seconds")
        if busy_s > 0:
            self.bytes_per_second = ratio(now.grown(begin, f"{self.name}_bytes"), busy_s)

    def age_s(self, now_s: float) -> float | None:
        return None if self.moved_at_s is None or self.bytes_per_second is None else now_s - self.moved_at_s


class RateWindow:
    """Looks of the last WINDOW_S. One thread at a time.

    Args:
        began_s: When every counter was 0.
    """

    def __init__(self, began_s: float) -> None:
        self._looks: deque[_Look] = deque([_Look(began_s, {})])
        self._fetch, self._h2d = _Link("fetch"), _Link("h2d")

    def rates(self, counters: Mapping[str, float], now_s: float) -> Rates:
        """The rates as of now; `counters` are those of `BufferStats`."""
        looks, now = self._looks, _Look(now_s, {key: counters[key] for key in _COUNTERS if key in counters})
        while len(looks) > 1 and looks[1].at_s <= now_s - WINDOW_S:
            looks.popleft()
        begin, span_s = looks[0], max(now_s - looks[0].at_s, 1e-3)
        for link in (self._fetch, self._h2d):
            link.look(begin, looks[-1], now)
        looks.append(now)
        return Rates(
            fetch_bytes_per_second=_rounded(self._fetch.bytes_per_second, 0),
            fetch_window_age_seconds=_rounded(self._fetch.age_s(now_s), 3),
            fetch_bytes_per_wall_second=round(now.grown(begin, "fetch_bytes") / span_s),
            h2d_bytes_per_second=_rounded(self._h2d.bytes_per_second, 0),
            h2d_window_age_seconds=_rounded(self._h2d.age_s(now_s), 3),
            h2d_bytes_per_wall_second=round(now.grown(begin, "h2d_bytes") / span_s),
            evictions_per_second=round(now.grown(begin, "evictions") / span_s, 3),
            pinned_wait_seconds_per_second=round(now.grown(begin, "pinned_wait_seconds") / span_s, 6),
            overflows=int(now.grown(begin, "overflows")),
            alloc_failures=int(now.grown(begin, "alloc_failures")),
        )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
