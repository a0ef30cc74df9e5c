"""What `--watch` shows, on a terminal and elsewhere: GPUs, lists, a minute of transfers, and the log of events."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import RenderableType

from gpu_cache import __version__, units
from gpu_cache.smi import figures, tables
from gpu_cache.smi.node import Node, Row
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, OK, STATES, Process
from gpu_cache.smi.screen import nothing, pool_style
from gpu_cache.smi.tables import NARROW, RED, WIDE, Column, count_of, size_of, table

SPAN_S = 60.0
LEVELS = "▁▂▃▄▅▆▇█"
_MAX_EVENTS = 200
LINKS = ("fetch", "h2d")

PROCESSES, SOURCES, LEAKS, EVENTS = "processes", "sources", "leaks", "events"
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.25, 60.0
# Blocks of bars and sparklines, and the lines of tabs, for terminals that have none.
TO_ASCII = str.maketrans(f"░{LEVELS}━╸╺…", "._.:-=+*#---.")
_BLOCKS = 10  # of the bar
_BAR = _BLOCKS + 5
_OF_GPU, _OF_PROCESS = 66, 91  # characters of a line without its sparklines

Trace = collections.deque[tuple[float, float | None]]  # unix time, bytes per second of wall clock

SORTS: dict[str, Callable[[Process], Any]] = {
    "gpu": lambda p: p.order,
    "pool": lambda p: -(p.figure("device_bytes") or -1),
    "fetch": lambda p: -(p.rate("fetch_bytes_per_second") or -1),
    "hit%": lambda p: 1.0 if p.hit_ratio is None else p.hit_ratio,
    "oldest": lambda p: -(p.oldest_age_s or -1),
    "state": lambda p: -STATES.index(p.state),
}


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
            speeds = {_key(p): self._speed(before.get(p.file.path), p, link) for p in node.processes}
            speeds |= {_key(row): figures.total(speeds[_key(p)] for p in row.processes) for row in node.rows}
            for key, speed in speeds.items():
                trace = self._traces.setdefault((key, link), collections.deque())
                trace.append((node.unix_time, speed))
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
    if earlier and state == LEAK and (process.figure("clears") or 0) > (earlier.figure("clears") or 0):
        yield Event(reported, process.label, _clear(earlier, process), LEAK)
    elif (earlier.state if earlier else OK) != state:
        what = {
            LEAK: f"{units.count(process.figure('outlived_entries'))} entries survived 2+ clears",
            HUNG: "last report",
            DEAD: "ended without cleanup",
            NEWER: "reports in a newer schema",
            OK: "reports again" if earlier and earlier.state == HUNG else "leaks no more",
        }
        yield Event(reported, process.label, what[state], state)
    elif earlier is None and not is_first:
        yield Event(reported, process.label, f"{process.title} started", OK)


def _clear(earlier: Process, process: Process) -> str:
    freed = (process.figure("cleared") or 0) - (earlier.figure("cleared") or 0)
    entries = process.figure("outlived_entries")
    survived = process.figure("outlived_max_clears")
    text = f"clear: {units.count(freed)} freed, {units.count(entries)} survive"
    return f"{text} their {units.ordinal(int(survived))}" if survived else text


def lists(past: History, width: int) -> dict[str, tuple[Column, ...]]:
    """The columns of each list; where there is room, the last of a process is a sparkline of its fetches."""
    room = min(max(width - _OF_PROCESS, 0), int(SPAN_S))
    trace = _trace(past, "fetch", room, WIDE)
    shown = {PROCESSES: (*_PROCESS, trace), SOURCES: tables.SOURCE, LEAKS: _LEAK, EVENTS: _EVENT}
    return {view: tuple(one for one in columns if one.at <= width) for view, columns in shown.items()}


def processes(node: Node, sort: str, wanted: str = "", gpu: str = "") -> list[Process]:
    """Those on a GPU whose role, pid or state has these letters, in order."""
    found = [p for p in node.processes if gpu in ("", p.seat.rstrip("*"))]
    admitted = (p for p in found if any(wanted.lower() in text.lower() for text in (p.title, p.pid, p.state)))
    return sorted(admitted, key=SORTS[sort])


def gpus(node: Node, past: History, width: int, gpu: str = "") -> RenderableType:
    """A line for each GPU. Sparklines take the room that is left, and go first."""
    room = max(min((width - _OF_GPU) // 2, int(SPAN_S)), 0) if width > NARROW else 0
    columns = (
        Column("GPU", lambda row: row.label, 3),
        Column("Pool", _bar, _BAR, 0, pool_style, "left"),
        Column("Used/Cap", _used, 15),
        tables.HIT._replace(at=0),
        tables.FETCH._replace(at=0),
        _trace(past, "fetch", room, NARROW + 1),
        tables.H2D._replace(at=0),
        _trace(past, "h2d", room, NARROW + 1),
    )
    return table(columns, [row for row in node.rows if gpu in ("", row.label.rstrip("*"))], width, None)


def _trace(past: History, link: str, width: int, at: int) -> Column:
    head = "last 60 s" if width > 8 else "60 s"
    return Column(head, lambda of: past.sparkline(of, link, width), width, at, justify="left")


def _bar(row: Row) -> str:
    share = units.ratio(row.figure("device_bytes"), row.figure("device_capacity_bytes"))
    if share is None:
        return "no process"
    full = min(max(round(share * _BLOCKS), 0), _BLOCKS)
    return f"{LEVELS[-1] * full}{'░' * (_BLOCKS - full)}{units.percent(share, 0):>4}%"


def _used(row: Row) -> str:
    used, capacity = row.figure("device_bytes"), row.figure("device_capacity_bytes")
    return "" if used is None else f"{units.size(used)}/{units.size(capacity)}"


def frame(node: Node, past: History, interval_s: float) -> Iterator[RenderableType]:
    """All of it, for a file or pipe."""
    yield title(node, interval_s)
    yield ""
    if not node.processes:
        yield f" waiting: {nothing(node)}"
    yield gpus(node, past, WIDE)
    yield ""
    yield table(lists(past, WIDE)[PROCESSES], node.processes, WIDE, None)
    yield ""
    yield events(past.events[:3], WIDE)


def events(found: Sequence[Event], width: int) -> RenderableType:
    """Without a head."""
    made = table(_EVENT, found, width, None)
    made.show_header = False
    return made


def title(node: Node, interval_s: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(node.unix_time))
    interval = f"{interval_s:.1f}" if interval_s >= 1 else f"{interval_s:g}"
    return f"gpu-cache-smi {__version__}   {node.hostname}   every {interval} s   {clock}"


_PROCESS = (
    *(tables.GPU, tables.PID, tables.ROLE, tables.STATE, tables.POOL, tables.HOST, tables.ENTRIES),
    tables.HIT._replace(at=0),
    tables.FETCH._replace(at=0),
    Column("Evict/s", lambda p: units.decimal(p.rate("evictions_per_second")), 7, WIDE),
    # In each second of the last ten, a fetch waited for a staging slot this long.
    Column("Wait ms", lambda p: units.milliseconds(p.rate("pinned_wait_seconds_per_second")), 7, WIDE),
    tables.OLDEST,
)
_LEAK = (
    *(tables.GPU, tables.PID, tables.ROLE),
    Column("Entries", count_of("outlived_entries"), 7, 0, tables.state_style),
    Column("Bytes", size_of("outlived_bytes"), 8),
    Column("Clears", count_of("outlived_max_clears"), 6),
    tables.OLDEST,
    Column("  See", lambda p: f"  gpu-cache-smi --leaks {p.pid}", 30, NARROW, justify="left"),
)
_EVENT = (
    Column("Time", lambda event: time.strftime("%H:%M:%S", time.localtime(event.unix_time)), 8),
    Column(" Process", lambda event: f" {event.who}", 18, justify="left"),
    Column("Event", lambda event: event.what, justify="left"),
    Column("State", lambda event: event.state.upper(), 5, 0, lambda event: RED * (event.state in (HUNG, LEAK)), "left"),
)
