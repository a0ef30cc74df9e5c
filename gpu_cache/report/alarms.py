"""What a process says in its log about its own cache: a leak, a slow source. Overflows are told where they happen."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from gpu_cache import units
from gpu_cache.report.schema import EntryInfo, SourceStats
from gpu_cache.throttle import ONE_MINUTE_S, Throttle

logger = logging.getLogger(__name__)

_NAMED = 3  # shards in a message
_SLOW_RATIO = 0.3  # of the median of the others, as in dashboards/alerts.yml
_LEAST_BUSY_S = 1.0  # in a minute; less says nothing about a node's bandwidth
_LEAST_OTHERS = 2


class Alarms:
    """Warns at most once a minute of each.

    Args:
        leaks: The oldest entries that outlived clears.
    Thread-safety: one call at a time.
    """

    def __init__(self, leaks: Callable[[int], Sequence[EntryInfo]], now: Callable[[], float] = time.monotonic) -> None:
        self._leaks = leaks
        self._may_tell_leak, self._minute = Throttle(now=now), Throttle(ONE_MINUTE_S, now)
        self._was_leaking = False
        self._a_minute_ago: Mapping[str, SourceStats] = {}

    def look(self, figures: Mapping[str, float], sources: Mapping[str, SourceStats]) -> None:
        """Warn of what they show; `figures` are those of `BufferStats`."""
        is_leaking = figures["outlived_entries"] > 0
        # Twice in a row: a look may fall between the clears of one step, which does them owner by owner.
        if is_leaking and self._was_leaking and self._may_tell_leak.opens():
            self._tell_leak(figures)
        self._was_leaking = is_leaking
        if self._minute.opens():
            self._tell_slow(sources)
            self._a_minute_ago = sources

    def _tell_leak(self, figures: Mapping[str, float]) -> None:
        oldest = self._leaks(_NAMED)
        shards = "; ".join(
            f"{one.key!r} ({units.mib(one.nbytes, 'MiB')} from {one.source}, {units.age(one.age_s)} old, survived "
            f"{one.clears_survived} clears)"
            for one in oldest
        )
        logger.warning(
            "%d shards (%s) survived 2 or more clears, the oldest: %s. Clear them, or fetch with keep=True what is to "
            "stay. All of them: gpu-cache-smi --leaks %d",
            figures["outlived_entries"],
            units.mib(figures["outlived_bytes"], "MiB"),
            shards,
            os.getpid(),
        )

    def _tell_slow(self, sources: Mapping[str, SourceStats]) -> None:
        speeds = _speeds(self._a_minute_ago, sources)
        for node, speed in speeds.items():
            others = [other for name, other in speeds.items() if name != node]
            if len(others) >= _LEAST_OTHERS and speed < _SLOW_RATIO * statistics.median(others):
                logger.warning(
                    "%s delivers %s GB/s, the median of the %d other sources is %s: look at its load and its network",
                    node,
                    units.gigabytes(speed),
                    len(others),
                    units.gigabytes(statistics.median(others)),
                )


def _speeds(before: Mapping[str, SourceStats], now: Mapping[str, SourceStats]) -> dict[str, float]:
    """Bytes per busy second of each node between two looks, where it was busy enough to tell."""
    speeds = {}
    for node, one in now.items():
        old = before.get(node)
        busy_s = one["fetch_busy_seconds"] - (old["fetch_busy_seconds"] if old else 0.0)
        if busy_s >= _LEAST_BUSY_S:
            speeds[node] = (one["fetch_bytes"] - (old["fetch_bytes"] if old else 0)) / busy_s
    return speeds
