"""Keeps the report of a cache fresh: once a second, after a clear, and from the cache's calls if nothing else does."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

from gpu_cache.process import OwnThread
from gpu_cache.report.alarms import Alarms
from gpu_cache.report.compose import Engine, Index, Reporter, encoded
from gpu_cache.report.files import HostileDirectoryError, ReportFiles, report_files
from gpu_cache.report.schema import PERIOD_S, report_name

logger = logging.getLogger(__name__)

_LATE = 1.5  # periods after which a call of the cache does what the thread had no chance to do
_SETTLE_S = 0.02  # from a clear to its report, as a step clears its owners one by one
_RETRY_S = 60.0
_CLOSE_WAIT_S = 1.0


class Lazy(Protocol):
    @property
    def current(self) -> Engine | None:
        """The engine, once there is one."""


class Publisher:
    """Writes the report of one cache, and lets it warn of what its figures show. Nothing reaches the caller.

    Makes no file and no thread before the first `touch` with an engine; with reports off, or in a directory that
    others may write, it only warns.

    Args:
        index: Of the cache.
        lazy: Its engine, once there is one.
        period_s: Between two reports.
        retry_s: After one that could not be written.
        environ: Where the directory is looked up.
    Thread-safety: any thread; whoever finds a report being written leaves it to that.
    """

    def __init__(
        self,
        index: Index,
        lazy: Lazy,
        *,
        period_s: float | None = None,
        retry_s: float = _RETRY_S,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._lazy, self._environ = lazy, environ
        self._period_s, self._retry_s = PERIOD_S if period_s is None else period_s, retry_s
        self._reporter = Reporter(index)
        self._alarms = Alarms(lambda most: index.oldest(most, is_outlived=True))
        self._late_at = self._due_at = self._write_at = self._clears_from = 0.0
        self._is_due = self._is_closed = self._has_warned = False
        self._wake = threading.Event()
        # A turn rather than a lock: who has it writes the report too. Guards _files, _reporter, _alarms.
        self._turn = threading.Lock()
        self._files: ReportFiles | None = None
        self._thread: OwnThread | None = None
        self._is_started = False

    def __repr__(self) -> str:
        return f"Publisher({self._files or 'off'})"

    def touch(self) -> None:
        """The cache is in use: report if nobody did for too long. A comparison otherwise."""
        if time.monotonic() >= self._late_at:
            self.publish()

    def soon(self) -> None:
        """Something was cleared: report when the others are too, unless a clear was reported just before."""
        if self._thread is not None and time.monotonic() >= self._clears_from:
            self._wake.set()

    def publish(self) -> None:
        """Report now; who is at it already reports once more."""
        self._is_due = True
        while self._is_due and self._turn.acquire(blocking=False):
            try:
                self._is_due = False
                self._report()
            except Exception:
                self._warn(f"reporting for gpu-cache-smi failed: {traceback.format_exc()}")
            finally:
                self._turn.release()

    def report(self) -> dict[str, Any]:
        """The report as of now, unwritten; of a cache with an engine."""
        engine = self._lazy.current
        assert engine is not None
        with self._turn:
            return self._reporter.compose(engine)

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

    def _ask_to_end(self) -> None:
        self._is_closed = True
        self._wake.set()

    def disown(self) -> None:
        """In a forked child, where the thread does not exist: leave the files to the parent."""
        self._is_closed = True
        if self._files is not None:
            self._files.disown()

    def _report(self) -> None:
        now, engine = time.monotonic(), self._lazy.current
        self._due_at, self._late_at = now + self._period_s, now + _LATE * self._period_s
        if engine is None or self._is_closed:
            return
        self._start(engine)
        report = self._reporter.compose(engine)
        self._alarms.look(report, report["sources"])
        if self._files is not None and now >= self._write_at:
            self._write(self._files, encoded(report), now)

    def _write(self, files: ReportFiles, content: bytes, now: float) -> None:
        try:
            files.write(content, self._reporter.leaks)
        except HostileDirectoryError as error:
            self._files = None
            self._warn(f"no reports for gpu-cache-smi: {error}")
        except OSError as error:
            self._write_at = now + self._retry_s
            self._warn(f"no reports for gpu-cache-smi for now: {error}; trying again every {self._retry_s:.0f} s")

    def _start(self, engine: Engine) -> None:
        """At the first report: files and thread, if they are wanted."""
        if self._is_started:
            return
        self._is_started = True
        config = engine.config
        if not config.stats:
            return
        try:
            self._files = report_files(report_name(config.role or "", config.rank or 0, os.getpid()), self._environ)
        except HostileDirectoryError as error:
            self._warn(f"no reports for gpu-cache-smi: {error}")
            return
        self._thread = OwnThread(self._run, "gpu-cache-publish", self._ask_to_end)
        self._thread.start()

    def _run(self) -> None:
        while self._files is not None:
            has_cleared = self._wake.wait(max(0.0, self._due_at - time.monotonic()))
            self._wake.clear()
            if has_cleared and not self._is_closed:
                self._clears_from = time.monotonic() + self._period_s  # steps may be short, and reports cost something
                time.sleep(_SETTLE_S)
            if self._is_closed:  # a closed cache leaves the device alone
                break
            self._gather()
            if has_cleared or time.monotonic() >= self._due_at:
                self.publish()
        self._clean_up()

    def _gather(self) -> None:
        try:
            if (engine := self._lazy.current) is not None:
                engine.gather()
        except Exception:
            self._warn(f"timing copies failed: {traceback.format_exc()}")

    def _clean_up(self) -> None:
        """In turn, behind a report that is being written."""
        if self._turn.acquire(timeout=_CLOSE_WAIT_S):
            try:
                files, self._files = self._files, None
                if files is not None:
                    files.remove()
            finally:
                self._turn.release()

    def _warn(self, message: str) -> None:
        """Once, as what fails now fails every second; in text, as an exception kept by a handler keeps tensors."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(message)
