"""The memory of the live view: transfers of the last minute, of GPUs and of processes, and the log of events."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_cache import units
from gpu_cache.smi import figures
from gpu_cache.smi.node import Node, Row
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, OK, Process

SPAN_S = 60.0
LEVELS = "▁▂▃▄▅▆▇█"
_MAX_EVENTS = 200
LINKS = ("fetch", "h2d")

Trace = collections.deque[tuple[float, float | None]]  # unix time, bytes per second of wall clock


class Event(NamedTuple):
    unix_time: float
    who: str
    what: str
    state: str


class History:
    """Grows with each look. Bytes per second of wall clock, so that a pause between steps shows as one."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque(maxlen=_MAX_EVENTS)
        self._last: Node | None = None
        self._traces: dict[tuple[object, str], Trace] = {}
        self._speeds: dict[tuple[Path, str], float] = {}

    @property
    def events(self) -> list[Event]:
        """The latest first."""
        return sorted(self._events, reverse=True)

    def add(self, node: Node) -> None:
        """One more look."""
        self._events.extend(between(self._last, node))
        before = {process.file.path: process for process in self._last.processes} if self._last else {}
        for link in LINKS:
            speeds = {p.file.path: self._speed(before.get(p.file.path), p, link) for p in node.processes}
            for process in node.processes:
                self._append(_key(process), link, node.unix_time, speeds[process.file.path])
            for row in node.rows:
                total = figures.total(speeds[process.file.path] for process in row.processes)
                self._append(_key(row), link, node.unix_time, total)
        self._last = node

    def _append(self, key: object, link: str, now: float, speed: float | None) -> None:
        trace = self._traces.setdefault((key, link), collections.deque())
        trace.append((now, speed))
        while trace[0][0] < now - SPAN_S:
            trace.popleft()

    def _speed(self, earlier: Process | None, process: Process, link: str) -> float | None:
        """Between the last two reports; the same again while there is no new one."""
        key = (process.file.path, link)
        if not process.is_reporting:
            return None
        if earlier is not None and process.file.modified > earlier.file.modified:
            grown = (process.figure(f"{link}_bytes") or 0) - (earlier.figure(f"{link}_bytes") or 0)
            self._speeds[key] = max(grown, 0) / (process.file.modified - earlier.file.modified)
        return self._speeds.get(key)

    def trace(self, of: Row | Process, link: str) -> Sequence[tuple[float, float | None]]:
        """The last minute of a GPU or a process."""
        return self._traces.get((_key(of), link), ())

    def sparkline(self, of: Row | Process, link: str, width: int) -> str:
        """The last minute, as high as the largest value; a blank where nothing is known."""
        now = self._last.unix_time if self._last else 0.0
        values = buckets(self.trace(of, link), now, width)
        largest = figures.largest(values) or 1
        return "".join(" " if value is None else LEVELS[round(value / largest * 7)] for value in values)


def _key(of: Row | Process) -> object:
    return (of.label, of.uuid) if isinstance(of, Row) else of.file.path


def buckets(trace: Sequence[tuple[float, float | None]], now: float, count: int) -> list[float | None]:
    """The last minute cut into `count` parts, each with its largest value; None where nothing is known."""
    found: list[float | None] = [None] * count
    for unix_time, value in trace:
        place = count - 1 - int((now - unix_time) / SPAN_S * count)
        if 0 <= place < count and value is not None:
            found[place] = max(found[place] or 0, value)
    return found


def between(before: Node | None, after: Node) -> list[Event]:
    """In the order of time. Without a look before, what the reports tell of the past."""
    known = {process.file.path: process for process in before.processes} if before else {}
    found: list[Event] = []
    for process in after.processes:
        earlier = known.pop(process.file.path, None)
        found += _of_process(earlier, process, is_first=before is None)
    ended = [Event(after.unix_time, process.label, "ended", "") for process in known.values() if process.state != DEAD]
    return sorted([*found, *ended])


def _of_process(earlier: Process | None, process: Process, *, is_first: bool) -> Iterator[Event]:
    state, reported = process.state, process.file.modified
    if earlier is not None and _is_leaking_clear(earlier, process):
        yield Event(reported, process.label, _clear(earlier, process), LEAK)
    elif (earlier.state if earlier else OK) != state:
        what = {
            LEAK: f"{units.count(process.figure('outlived_entries'))} entries survived 2+ clear_batches()",
            HUNG: "last report",
            DEAD: "ended without cleanup",
            NEWER: "reports in a newer schema",
            OK: "reports again" if earlier and earlier.state == HUNG else "leaks no more",
        }
        yield Event(reported, process.label, what[state], state)
    elif earlier is None and not is_first:
        yield Event(reported, process.label, f"{process.title} started", OK)


def _is_leaking_clear(earlier: Process, process: Process) -> bool:
    return process.state == LEAK and (process.figure("clears") or 0) > (earlier.figure("clears") or 0)


def _clear(earlier: Process, process: Process) -> str:
    freed = (process.figure("cleared") or 0) - (earlier.figure("cleared") or 0)
    entries = process.figure("outlived_entries")
    survived = process.figure("outlived_max_clears")
    text = f"clear_batches(): {units.count(freed)} freed, {units.count(entries)} survive"
    return f"{text} their {units.ordinal(int(survived))}" if survived else text
