"""One picture of the live view: GPUs with a minute of transfers, one of four lists, the latest events."""

from __future__ import annotations

import time
from typing import NamedTuple, TypeVar

from rich.text import Text

from gpu_cache import __version__, units
from gpu_cache.smi import columns, figures, history
from gpu_cache.smi.boxes import nothing
from gpu_cache.smi.columns import RED, Column, cells, size_of
from gpu_cache.smi.events import Event
from gpu_cache.smi.graphs import ASCII, BLOCKS, bar, sparkline
from gpu_cache.smi.history import History
from gpu_cache.smi.node import Node, Row
from gpu_cache.smi.process import Process
from gpu_cache.smi.view import EVENTS, HELP, LEAKS, PROCESSES, SOURCES, View

T = TypeVar("T")

BAR_WIDTH = 14
GRAPHS = (20, 14)  # characters of the two sparklines, where there is room
_FIXED = 68  # characters of a GPU's line without them
_NUM_EVENTS = 3
_SMALL_HEIGHT = 24


class Size(NamedTuple):
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        return self.width >= columns.WIDE

    @property
    def graphs(self) -> tuple[int, int]:
        """Characters of the sparklines; they go first where it is narrow."""
        room = min(self.width - 1 - _FIXED, sum(GRAPHS))
        fetch = room * GRAPHS[0] // sum(GRAPHS)
        return (fetch, room - fetch) if self.width >= columns.NARROW + 2 else (0, 0)


def wait_ms(process: Process) -> str:
    """Milliseconds in each second of the last ten in which a fetch waited for a staging slot."""
    return units.milliseconds(process.rate("pinned_wait_seconds_per_second"))


_PROCESS: list[Column[Process]] = [
    Column("GPU", "", 5, 5, lambda p: p.seat),
    Column("PID", "", 8, 8, lambda p: p.pid),
    Column("Role", "", 14, 14, lambda p: p.title, is_left=True, gap=2),
    Column("State", "", 6, 6, columns.state_of, columns.state_style, is_left=True),
    Column("Pool", "", 9, 9, size_of("device_bytes"), columns.pool_style),
    Column("Host", "", 8, 0, size_of("host_bytes")),
    Column("Entries", "", 9, 9, lambda p: units.count(p.figure("num_entries"))),
    Column("Hit%", "", 7, 7, lambda p: units.percent(p.hit_ratio)),
    Column("Fetch", "", 9, 9, columns.speed_of("fetch_bytes_per_second")),
    Column("Evict/s", "", 8, 0, lambda p: units.decimal(p.rate("evictions_per_second"))),
    Column("Wait ms", "", 8, 0, wait_ms),
    Column("Oldest", "", 7, 8, lambda p: units.age(p.oldest_age_s), lambda p: columns.age_style(p.oldest_age_s)),
]
_LEAK: list[Column[Process]] = [
    *_PROCESS[:3],
    Column("Entries", "", 8, 8, lambda p: units.count(p.figure("outlived_entries")), columns.state_style),
    Column("Bytes", "", 9, 9, lambda p: units.size(p.figure("outlived_bytes"))),
    Column("Clears", "", 9, 9, lambda p: units.count(p.figure("outlived_max_clears"))),
    Column("Oldest", "", 8, 8, lambda p: units.age(p.oldest_age_s)),
    Column("See", "", 30, 0, lambda p: f"gpu-cache-smi --leaks {p.pid}"),
]


def frame(node: Node, past: History, view: View, size: Size, *, is_ascii: bool = False) -> list[Text]:
    """Not more lines than the terminal has."""
    top = [_title(node, view, size), Text("")]
    if view.is_helping:
        return (top + [Text(line) for line in HELP.splitlines()])[: size.height]
    rows = [row for row in node.rows if view.gpu in ("", row.label.rstrip("*"))]
    gpus = [_gpu_head(size), *(_gpu(row, node, past, size, is_ascii) for row in rows), Text("")]
    if not node.processes:
        gpus.insert(0, Text(f" waiting: {nothing(node)}"))
    above = [*top, *gpus, _menu(view, size, is_ascii)]
    below: list[Text] = []
    if view.view != EVENTS and size.height >= _SMALL_HEIGHT and past.events:
        latest = sorted(past.events, reverse=True)[:_NUM_EVENTS]
        below = [Text(""), *(_event(event, size) for event in latest)]
    room = size.height - len(above) - len(below)
    lines = above + _scrolled(_list(node, past, view, size), room, view) + below
    for line in lines:
        line.truncate(size.width)
    return lines[: size.height]


def _title(node: Node, view: View, size: Size) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(node.unix_time))
    interval = f"{view.interval_s:.1f}" if view.interval_s >= 1 else f"{view.interval_s:g}"
    left = f"gpu-cache-smi {__version__}   {node.hostname}   every {interval} s   {clock}"
    left += "   PAUSED" if view.is_paused else ""
    if view.message:
        return Text(f"{left}   {view.message}")
    return Text(f"{left}{' ' * 12}q quit  ? help  space pause" if size.is_wide else f"{left}   ? help")


def _gpu_head(size: Size) -> Text:
    fetch, _ = size.graphs
    head = " GPU  Pool                                Hit%    "
    if not fetch:
        return Text(f"{head}Fetch       H2D")
    over = ", last 60 s" if size.is_wide else ""
    return Text(f"{head}{f'Fetch{over}':<{fetch + 10}}{f'H2D{over}'}")


def _gpu(row: Row, node: Node, past: History, size: Size, is_ascii: bool) -> Text:
    used, capacity = row.summed("device_bytes"), row.summed("device_capacity_bytes")
    line = Text(f"{row.label:>3}   " if len(row.label) < 3 else f"{row.label:>4}  ")
    if used is None or capacity is None:
        return line.append("no process")
    share = units.ratio(used, capacity) or 0.0
    style = next((style for process in row.processes if (style := columns.pool_style(process))), "")
    line.append(bar(share, BAR_WIDTH, is_ascii), style or None)
    line.append(f"{units.percent(share, 0) + '%':>5}{f'{units.size(used)}/{units.size(capacity)}':>16}")
    hits = units.ratio(_total(row, "hits", "host_hits"), row.summed("requested"))
    line.append(f"{units.percent(hits):>7}")
    for link, width in zip(history.LINKS, size.graphs, strict=True):
        line.append(f"{units.speed(_speed(row, link)):>9} ")
        values = history.buckets(past.trace(row, link), node.unix_time, width)
        line.append(sparkline(values, ASCII if is_ascii else BLOCKS))
    line.rstrip()
    return line


def _total(row: Row, *keys: str) -> float | None:
    return figures.total(row.summed(key) for key in keys)


def _speed(row: Row, link: str) -> float | None:
    """Over busy seconds, of the processes on the GPU together."""
    return figures.total(process.rate(f"{link}_bytes_per_second") for process in row.processes)


def _menu(view: View, size: Size, is_ascii: bool) -> Text:
    arrow = "v" if is_ascii else "▾"
    wanted = f"{view.filter}_" if view.is_typing else view.filter or "none"
    gap = " " * (4 if size.is_wide else 2)
    line = Text(f" sort: {view.sort} {arrow} (s){gap}filter: {wanted} (/){gap}{'view: ' if size.is_wide else ''}")
    for number, (name, shown) in enumerate(_MENU.items()):
        line.append(gap[:2] if size.is_wide and number else " " * bool(number))
        line.append(shown, "bold" if name == view.view else None)
    return line


_MENU = {PROCESSES: "[p]rocesses", SOURCES: "so[u]rces", LEAKS: "[l]eaks", EVENTS: "[e]vents"}


def _list(node: Node, past: History, view: View, size: Size) -> list[Text]:
    if view.view == SOURCES:
        return _table(columns.SOURCE, node.sources, size)
    if view.view == EVENTS:
        return [_event(event, size) for event in sorted(past.events, reverse=True)]
    found = view.processes(node)
    if view.view == PROCESSES:
        return _table(_PROCESS, found, size)
    leaking = [process for process in found if process.figure("outlived_entries")]
    return _table(_LEAK, leaking, size) if leaking else [Text(" nothing survived two clears")]


def _scrolled(lines: list[Text], room: int, view: View) -> list[Text]:
    """The part of a list that fits, from the row on that the arrows chose; says how many rows are not shown."""
    num_heads = int(view.view != EVENTS)
    num_shown, num_rows = max(room - num_heads - 1, 0), len(lines) - num_heads
    if len(lines) <= room:
        view.offset = 0
        return lines
    view.offset = min(view.offset, num_rows - num_shown)
    rows = lines[num_heads + view.offset :][:num_shown]
    hidden = Text(
        f" ... {view.offset} above, {num_rows - num_shown - view.offset} more: arrows, PgUp, PgDn", columns.DIM
    )
    return [*lines[:num_heads], *rows, hidden]


def _table(of_columns: list[Column[T]], rows: list[T], size: Size) -> list[Text]:
    head = Text("".join(column.cell(column.head, size.is_wide) for column in of_columns).rstrip())
    return [head, *(_line(of_columns, row, size) for row in rows)]


def _line(of_columns: list[Column[T]], row: T, size: Size) -> Text:
    line = columns.row(of_columns, row, size.is_wide)[1:-2]
    if isinstance(row, Process):
        line.stylize(columns.row_style(row))
    assert line.plain == cells(of_columns, row, size.is_wide)
    return line


def _event(event: Event, size: Size) -> Text:
    when = time.strftime("%H:%M:%S", time.localtime(event.unix_time))
    gap, width = ("  ", 54) if size.is_wide else (" ", min(size.width - 31, 49))
    line = Text(f" {when}{gap}{event.who:<15}{gap}{event.what[:width]:<{width}} ")
    return line.append(event.state.upper(), RED if event.state in ("leak", "hung") else None)
