"""What `--watch` shows, on a terminal and elsewhere: GPUs with a minute of transfers, and lists with theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import RenderableType

from gpu_cache import __version__, units
from gpu_cache.smi import tables
from gpu_cache.smi.history import LEVELS, SPAN_S, Event, History
from gpu_cache.smi.node import Node, Row
from gpu_cache.smi.process import HUNG, LEAK, STATES, Process
from gpu_cache.smi.screen import nothing, pool_style
from gpu_cache.smi.tables import NARROW, RED, WIDE, Column, count_of, size_of, table

PROCESSES, SOURCES, LEAKS, EVENTS = "processes", "sources", "leaks", "events"
MIN_INTERVAL_S, MAX_INTERVAL_S = 0.25, 60.0
# Blocks of bars and sparklines, and the lines of tabs, for terminals that have none.
TO_ASCII = str.maketrans(f"░{LEVELS}━╸╺…", "._.:-=+*#---.")
_BLOCKS = 10  # of the bar
_BAR = _BLOCKS + 5
_OF_GPU, _OF_PROCESS = 66, 91  # characters of a line without its sparklines

SORTS: dict[str, Callable[[Process], Any]] = {
    "gpu": lambda p: p.order,
    "pool": lambda p: -(p.figure("device_bytes") or -1),
    "fetch": lambda p: -(p.rate("fetch_bytes_per_second") or -1),
    "hit%": lambda p: 1.0 if p.hit_ratio is None else p.hit_ratio,
    "oldest": lambda p: -(p.oldest_age_s or -1),
    "state": lambda p: -STATES.index(p.state),
}


def lists(past: History, width: int) -> dict[str, tuple[Column, ...]]:
    """The columns of each list; where there is room, the last of a process is a sparkline of its fetches."""
    room = min(max(width - _OF_PROCESS, 0), int(SPAN_S))
    trace = _trace(past, "fetch", room, WIDE)
    shown = {
        PROCESSES: (*_PROCESS, trace),
        SOURCES: tables.SOURCE,
        LEAKS: _LEAK,
        EVENTS: _EVENT,
    }
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


def _wait(process: Process) -> str:
    """Milliseconds in each second of the last ten in which a fetch waited for a staging slot."""
    return units.milliseconds(process.rate("pinned_wait_seconds_per_second"))


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
    Column("Wait ms", _wait, 7, WIDE),
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
