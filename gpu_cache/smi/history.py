"""The memory of the live view: transfers of the last minute by GPU, and the log of events."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

from gpu_cache.smi import figures
from gpu_cache.smi.events import Event, between
from gpu_cache.smi.node import Node, Row
from gpu_cache.smi.process import Process

SPAN_S = 60.0
_MAX_EVENTS = 200
LINKS = ("fetch", "h2d")

Trace = collections.deque[tuple[float, float | None]]  # unix time, bytes per second of wall clock


class History:
    """Grows with each look. Bytes per second of wall clock, so that a pause between steps shows as one."""

    def __init__(self) -> None:
        self.events: collections.deque[Event] = collections.deque(maxlen=_MAX_EVENTS)
        self._last: Node | None = None
        self._traces: dict[tuple[str, str | None, str], Trace] = {}
        self._speeds: dict[tuple[Path, str], float] = {}

    def add(self, node: Node) -> None:
        """One more look."""
        self.events.extend(between(self._last, node))
        before = {process.file.path: process for process in self._last.processes} if self._last else {}
        for row in node.rows:
            for link in LINKS:
                speeds = [self._speed(before.get(process.file.path), process, link) for process in row.processes]
                trace = self._traces.setdefault((row.label, row.uuid, link), collections.deque())
                trace.append((node.unix_time, figures.total(speeds)))
                while trace[0][0] < node.unix_time - SPAN_S:
                    trace.popleft()
        self._last = node

    def _speed(self, earlier: Process | None, process: Process, link: str) -> float | None:
        """Between the last two reports; the same again while there is no new one."""
        key = (process.file.path, link)
        if not process.is_reporting:
            return None
        if earlier is not None and process.file.modified > earlier.file.modified:
            grown = (process.figure(f"{link}_bytes") or 0) - (earlier.figure(f"{link}_bytes") or 0)
            self._speeds[key] = max(grown, 0) / (process.file.modified - earlier.file.modified)
        return self._speeds.get(key)

    def trace(self, row: Row, link: str) -> Sequence[tuple[float, float | None]]:
        """The last minute of a GPU."""
        return self._traces.get((row.label, row.uuid, link), ())


def buckets(trace: Sequence[tuple[float, float | None]], now: float, count: int) -> list[float | None]:
    """The last minute cut into `count` parts, each with its largest value; None where nothing is known."""
    found: list[float | None] = [None] * count
    for unix_time, value in trace:
        place = count - 1 - int((now - unix_time) / SPAN_S * count)
        if 0 <= place < count and value is not None:
            found[place] = max(found[place] or 0, value)
    return found
