"""Keeps the report of a cache fresh, and warns in the log of what it shows."""

from __future__ import annotations

import logging
import math
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gpu_cache import units
from gpu_cache.config import CacheConfig
from gpu_cache.process import OwnThread
from gpu_cache.report.compose import Engine, Index, Reporter, Unused, encoded, summary_of
from gpu_cache.report.files import HostileDirectoryError, ReportFiles
from gpu_cache.report.schema import SourceStats, report_name
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

PERIOD_S = 1.0  # between two reports
_RETRY_S = 60.0  # after a report that could not be written
_LATE = 1.5  # periods after which a call of the cache reports in the thread's place
_SETTLE_S = 0.02  # from a clear to its report, as a step clears its owners one by one
_CLOSE_WAIT_S = 1.0

_NAMED = 3  # shards in a warning of a leak
_SLOW_RATIO = 0.3  # to the median of the others, as in dashboards/alerts.yml
_LEAST_BUSY_S = 1.0  # in a minute; less says nothing about a node's bandwidth
_LEAST_OTHERS = 2


class Lazy(Protocol):
    @property
    def current(self) -> Engine | None: ...  # None before the first use


class Publisher:
    """Writes the report of one cache. No failure reaches the caller.

    A thread reports once a second and soon after a clear; calls of the cache report while the thread is late. The first
    report makes files and thread, if `config.stats` says so and the directory is safe. There is none before the first
    use of the cache, unless figures beside it are to be told.

    Args:
        index: The cache's.
        lazy: Has the engine.
        config: The cache's settings, as given.
    Thread-safety: any thread. A call that finds another one reporting leaves the next report to it.
    """

    def __init__(self, index: Index, lazy: Lazy, config: CacheConfig) -> None:
        self._lazy, self._config = lazy, config
        # Single values without a lock; a race costs a report too many, or one a period later.
        self._late_at = self._due_at = self._clears_from = 0.0
        self._is_due = self._is_closed = self._has_warned = False
        self._wake = threading.Event()
        self._thread: OwnThread | None = None
        # Threads take turns, and write under it. Guards _reporter, _alarms, _files, _write_at, _unused.
        self._turn = threading.Lock()
        self._reporter, self._alarms = Reporter(index), Alarms(index)
        self._files: ReportFiles | None = None
        self._write_at = 0.0
        self._unused: Unused | None = None  # in the engine's place until there is one

    def __repr__(self) -> str:
        return f"Publisher({self._files or 'off'})"

    def report_beside(self, figures: Callable[[], Mapping[str, int]]) -> None:
        """Add these figures, asked at each report, to all that follow."""
        self._reporter.beside = figures

    def touch(self) -> None:
        """Report from a call of the cache if the thread is late. A comparison otherwise."""
        if time.monotonic() >= self._late_at:
            self.publish()

    def soon(self) -> None:
        """Report a clear when the step's other clears are done, unless a clear was reported just before."""
        if self._thread is not None and time.monotonic() >= self._clears_from:
            self._wake.set()

    def publish(self) -> None:
        """Report now. If another thread is reporting, it reports once more."""
        self._is_due = True
        while self._is_due and self._turn.acquire(blocking=False):
            try:
                self._is_due = False
                self._attempt(self._report, "reporting for gpu-cache-smi")
            finally:
                self._turn.release()

    def summary(self) -> str:
        """The figures as of now in the box of `gpu-cache-smi`; "" before the engine is there."""
        engine = self._lazy.current
        with self._turn:
            return "" if engine is None else summary_of(self._reporter.compose(engine))

    def retire(self) -> None:
        """The cache is gone: the thread cleans up when it wakes. Only sets a flag, as a collection may call it."""
        self._is_closed = True

    def close(self) -> None:
        """End, and remove the files; waits a second for the thread. Idempotent."""
        deadline = time.monotonic() + _CLOSE_WAIT_S
        self._ask_to_end()
        self._clean_up()
        if self._thread is not None:
            self._thread.wait(deadline)

    def disown(self) -> None:
        """In a forked child, where the thread does not exist: leave the files to the parent."""
        self._is_closed = True
        if self._files is not None:
            self._files.disown()

    def _ask_to_end(self) -> None:
        self._is_closed = True
        self._wake.set()

    def _report(self) -> None:
        if self._is_closed or (engine := self._lazy.current or self._stand_in()) is None:
            return
        now = time.monotonic()
        self._due_at, self._late_at = now + PERIOD_S, now + _LATE * PERIOD_S
        report = self._reporter.compose(engine)
        self._alarms.look(report)
        if not engine.config.stats or now < self._write_at:
            return
        try:
            files = self._files or self._start(engine.config)
            files.write(encoded(report), self._reporter.leaks)
        except HostileDirectoryError as error:
            self._write_at = math.inf
            self._warn(f"no reports for gpu-cache-smi: {error}")
        except OSError as error:
            self._write_at = now + _RETRY_S
            self._warn(f"no reports for gpu-cache-smi for now: {error}; trying again every {_RETRY_S:.0f} s")

    def _stand_in(self) -> Unused | None:
        """In the place of an engine, if there is something to tell beside the cache, or was."""
        if self._unused is None and self._reporter.beside():
            self._unused = Unused(self._config)
        return self._unused

    def _start(self, config: CacheConfig) -> ReportFiles:
        files = self._files = ReportFiles(report_name(config.role or "", config.rank or 0, os.getpid()), os.environ)
        self._thread = OwnThread(self._run, "gpu-cache-publish", self._ask_to_end)
        self._thread.start()
        return files

    def _run(self) -> None:
        while self._files is not None:
            has_cleared = self._wake.wait(max(0.0, self._due_at - time.monotonic()))
            self._wake.clear()
            if has_cleared and not self._is_closed:
                self._clears_from = time.monotonic() + PERIOD_S  # steps may be short, and reports cost something
                time.sleep(_SETTLE_S)
            if self._is_closed:  # a closed cache leaves the device alone
                break
            if (engine := self._lazy.current) is not None:
                self._attempt(engine.gather, "timing copies")
            if has_cleared or time.monotonic() >= self._due_at:
                self.publish()
        self._clean_up()

    def _attempt(self, work: Callable[[], None], named: str) -> None:
        try:
            work()
        except Exception:
            self._warn(f"{named} failed: {traceback.format_exc()}")

    def _clean_up(self) -> None:
        """Remove the files behind a report that another thread is writing."""
        if self._turn.acquire(timeout=_CLOSE_WAIT_S):
            try:
                files, self._files = self._files, None
                if files is not None:
                    files.remove()
            finally:
                self._turn.release()

    def _warn(self, message: str) -> None:
        """Warn once, as a fault recurs every second; in text, as a handler that keeps an exception keeps tensors."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(message)


class Alarms:
    """Warns of a leak and of slow sources, at most once a minute of each. One thread at a time."""

    def __init__(self, index: Index, now: Callable[[], float] = time.monotonic) -> None:
        self._index = index
        self._may_tell_leak, self._minute = Throttle(now=now), Throttle(now=now)
        self._was_leaking = False
        self._a_minute_ago: Mapping[str, SourceStats] = {}

    def look(self, report: Mapping[str, Any]) -> None:
        """Warn of what a report shows."""
        is_leaking = report["outlived_entries"] > 0
        # Twice in a row: a look may fall between the clears of one step, which does them owner by owner.
        if is_leaking and self._was_leaking and self._may_tell_leak.opens():
            self._tell_leak(report)
        self._was_leaking = is_leaking
        if self._minute.opens():
            _tell_slow(_speeds(self._a_minute_ago, report["sources"]))
            self._a_minute_ago = report["sources"]

    def _tell_leak(self, report: Mapping[str, Any]) -> None:
        shards = "; ".join(
            f"{one.key!r} ({units.size(one.nbytes)} from {one.source}, {units.age(one.age_s)} old, survived "
            f"{one.clears_survived} clears)"
            for one in self._index.oldest(_NAMED, is_outlived=True)
        )
        logger.warning(
            f"{report['outlived_entries']} shards ({units.size(report['outlived_bytes'])}) survived 2 or more "
            f"clears, the oldest: {shards}. Clear them, or fetch with keep=True what is to stay. All of them: "
            f"gpu-cache-smi --leaks {os.getpid()}"
        )


def _tell_slow(speeds: Mapping[str, float]) -> None:
    for node, speed in speeds.items():
        others = [other for name, other in speeds.items() if name != node]
        if len(others) >= _LEAST_OTHERS and speed < _SLOW_RATIO * (median := statistics.median(others)):
            logger.warning(
                f"{node} delivers {units.speed(speed)}, the median of the {len(others)} other sources is "
                f"{units.speed(median)}: look at its load and its network"
            )


def _speeds(before: Mapping[str, SourceStats], now: Mapping[str, SourceStats]) -> dict[str, float]:
    """Bytes per busy second of each node between two looks, where it was busy enough to tell."""
    speeds = {}
    for node, one in now.items():
        old_bytes, old_s = (old["fetch_bytes"], old["fetch_busy_seconds"]) if (old := before.get(node)) else (0, 0.0)
        if (busy_s := one["fetch_busy_seconds"] - old_s) >= _LEAST_BUSY_S:
            speeds[node] = (one["fetch_bytes"] - old_bytes) / busy_s
    return speeds
