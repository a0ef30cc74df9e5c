"""What the consumers did and what they met, counted; the operations under way, so that a stuck one is noticed."""

from __future__ import annotations

import collections
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gpu_cache import CacheFullError, FetchError
from gpu_cache.errors import failure_reason

# What faults, kills and clears lead to. "answer" is not among them: the proxies alter no byte.
EXPECTED_REASONS = frozenset({"missing", "connection", "timeout"})
# A prefetch puts nothing outside the pool; whoever asks for a tensor gets it, pool full or not.
EXPECTED_OF_PREFETCH = EXPECTED_REASONS | {"full"}
_KEPT = 20  # texts of each kind


@dataclass(slots=True)
class _UnderWay:
    name: str
    started: float
    limit_s: float
    is_told: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Tally:
    """Counts of one run.

    Thread-safety: any thread.
    """

    def __init__(self) -> None:
        # Guards everything below.
        self._lock = threading.Lock()
        self.operations: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.checks = 0
        self.wrong: list[str] = []
        self.stuck: list[str] = []
        self.unexpected: list[str] = []
        self._under_way: dict[int, _UnderWay] = {}

    @contextlib.contextmanager
    def operation(self, name: str, limit_s: float) -> Iterator[None]:
        """Count what happens within; errors end here. One that takes longer than `limit_s` is a failure."""
        under_way = _UnderWay(name, time.monotonic(), limit_s)
        with self._lock:
            self._under_way[threading.get_ident()] = under_way
        try:
            yield
        except Exception as error:
            self.note_error(error)
        finally:
            with self._lock:
                del self._under_way[threading.get_ident()]
                self.operations[name] += 1
            self._tell_if_overdue(under_way, "")

    def note_check(self, fault: str) -> None:
        """A tensor was compared; `fault` is "" if it was as it must be."""
        with self._lock:
            self.checks += 1
        if fault:
            self._append(self.wrong, fault)

    def note_error(self, error: BaseException, expected: frozenset[str] = EXPECTED_REASONS) -> None:
        """Count an error by its reasons; keep the text of one that no fault explains."""
        reasons = _reasons(error)
        with self._lock:
            self.errors.update(reasons)
        if not reasons <= expected:
            self.note_unexpected("".join(traceback.format_exception(error)))

    def note_unexpected(self, text: str) -> None:
        """Keep the text of something that should not have happened."""
        self._append(self.unexpected, text)

    def look_for_stuck(self) -> None:
        """Note operations under way that should have ended long ago, and where they are."""
        with self._lock:
            under_way = dict(self._under_way)
        frames = sys._current_frames()
        for thread, one in under_way.items():
            if one.seconds > one.limit_s:
                self._tell_if_overdue(one, "".join(traceback.format_stack(frames.get(thread))))

    @property
    def num_operations(self) -> int:
        """Of all kinds."""
        with self._lock:
            return self.operations.total()

    def error_counts(self) -> dict[str, int]:
        """By reason."""
        with self._lock:
            return dict(sorted(self.errors.items()))

    def _tell_if_overdue(self, one: _UnderWay, where: str) -> None:
        if one.seconds > one.limit_s and not one.is_told:
            one.is_told = True
            self._append(self.stuck, f"{one.name}: {one.seconds:.1f} s, at most {one.limit_s:.1f} expected\n{where}")

    def _append(self, texts: list[str], text: str) -> None:
        with self._lock:
            if len(texts) < _KEPT:
                texts.append(text)


class ErrorLog(logging.Handler):
    """Takes the library's log: an error in it is something that should not have happened; warnings are dropped."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def emit(self, record: logging.LogRecord) -> None:
        """Keep an error's text."""
        if record.levelno >= logging.ERROR:
            self._tally.note_unexpected(self.format(record))


def _reasons(error: BaseException) -> set[str]:
    causes: Iterable[BaseException] = (error,)
    if isinstance(error, FetchError) and error.failures:
        causes = error.failures.values()
    return {_reason(cause) for cause in causes}


def _reason(error: BaseException) -> str:
    if isinstance(error, CacheFullError):
        return "full"
    return failure_reason(error) if isinstance(error, FetchError) else type(error).__name__
