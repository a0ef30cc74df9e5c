"""Lists of processes and sources: the columns of each, tables by `rich` at 99 characters, 78, or fewer, and a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from rich.box import Box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpu_cache import units
from gpu_cache.smi.process import DEAD, HUNG, LEAK, OK, Process

WIDE, NARROW = 99, 78
RED, YELLOW, DIM = "red", "yellow", "dim"
_OLD_S = 3600

# As nvidia-smi draws them: processes without lines between columns, GPUs with.
OPEN = Box("+--+\n|  |\n|==|\n|  |\n|--|\n|--|\n|  |\n+--+\n", ascii=True)
RULED = Box("+-++\n| ||\n|=+|\n| ||\n|-||\n|-+|\n| ||\n+-++\n", ascii=True)


class Column(NamedTuple):
    """One column of a list.

    Attributes:
        show: Its text, for a row's subject.
        width: The least, in characters.
        at: The narrowest table that has it.
        justify: A column that is flush left takes the room that is left, and is cut where there is none.
    """

    head: str
    show: Callable[[Any], str]
    width: int = 0
    at: int = 0
    style: Callable[[Any], str] = lambda _: ""
    justify: Literal["left", "right"] = "right"

    def cell(self, of: Any) -> Text:
        return Text(self.show(of), self.style(of), justify=self.justify, no_wrap=True, overflow="crop")


def table(columns: Iterable[Column], rows: Iterable[Any], width: int, box: Box | None = OPEN) -> Table:
    """The columns that fit into a width, framed as the box says."""
    shown = [column for column in columns if column.at <= width]
    made = Table(box=box, width=width, padding=(0, int(box is not OPEN)), collapse_padding=True, pad_edge=bool(box))
    for number, column in enumerate(shown):
        is_last = box is OPEN and number == len(shown) - 1
        ratio = 1 if column.justify == "left" and not column.width else None
        head = Text(column.head, justify=column.justify, no_wrap=True, overflow="crop")
        made.add_column(_edged(head, is_last), min_width=column.width, ratio=ratio, no_wrap=True)
    for row in rows:
        cells = (_edged(column.cell(row), box is OPEN and column is shown[-1]) for column in shown)
        made.add_row(*cells, style=row_style(row))
    return made


def fitting(width: int) -> int:
    """The width of the boxes on a terminal of some width."""
    return WIDE if width >= WIDE else min(width, NARROW)


def _edged(text: Text, is_last: bool) -> Text | Padding:
    """With a blank before the frame."""
    return Padding(text, (0, 1, 0, 0)) if is_last else text


def boxed(*parts: Any, width: int) -> Table:
    """Parts above each other in one frame, with a line between."""
    made = Table(box=RULED, width=width, padding=0, show_header=False, show_lines=True)
    for part in parts:
        made.add_row(part)
    return made


def spread(left: str, right: str = "") -> Table:
    """One line, both ends filled; the right end goes first."""
    made = Table.grid(expand=True, padding=(0, 1), pad_edge=True)
    made.add_column(ratio=1)
    made.add_column()
    made.add_row(Text(left, no_wrap=True, overflow="crop"), Text(right, no_wrap=True, overflow="crop"))
    return made


def row_style(row: object) -> str:
    return DIM if isinstance(row, Process) and row.state == DEAD else ""


def state_style(process: Process) -> str:
    return RED if process.state in (HUNG, LEAK) else ""


def age_style(of: Any) -> str:
    return YELLOW if of.oldest_age_s is not None and of.oldest_age_s > _OLD_S else ""


def pool_style(process: Process) -> str:
    """A full pool is normal for a cache; one that had to turn tensors away is not."""
    if process.rate("alloc_failures"):
        return RED
    return YELLOW if process.rate("overflows") else ""


def size_of(key: str) -> Callable[[Any], str]:
    return lambda of: units.size(of.figure(key))


def count_of(key: str) -> Callable[[Any], str]:
    return lambda of: units.count(of.figure(key))


def speed_of(key: str) -> Callable[[Any], str]:
    return lambda of: units.speed(of.rate(key))


GPU = Column("GPU", lambda p: p.seat, 4)
PID = Column("PID", lambda p: p.pid, 7)
ROLE = Column(" Role", lambda p: f" {p.title}", justify="left")
STATE = Column("State", lambda p: p.state if p.state == OK else p.state.upper(), 5, 0, state_style, "left")
POOL = Column("Pool", size_of("device_bytes"), 7, 0, pool_style)
PINNED = Column("Pinned", size_of("pinned_capacity_bytes"), 7, WIDE)
HOST = Column("Host", size_of("host_bytes"), 7, WIDE)
ENTRIES = Column("Entries", count_of("num_entries"), 7, NARROW)
HIT = Column("Hit%", lambda p: units.percent(p.hit_ratio), 5, WIDE)
FETCH = Column("Fetch", speed_of("fetch_bytes_per_second"), 8, NARROW)
H2D = Column("H2D", speed_of("h2d_bytes_per_second"), 8, WIDE)
OLDEST = Column("Oldest", lambda of: units.age(of.oldest_age_s), 6, 0, age_style)

PROCESS = (GPU, PID, ROLE, STATE, POOL, PINNED, HOST, ENTRIES, HIT, FETCH, H2D, OLDEST)
SOURCE = (
    Column(" Source node", lambda s: f" {s.title}", justify="left"),
    Column("Entries", count_of("entries"), 7),
    Column("Resident", size_of("resident_bytes"), 9),
    Column("Fetched", size_of("fetch_bytes"), 9, WIDE),
    Column("Speed", lambda s: units.speed(s.bytes_per_second), 9),
    Column("p50 ms", lambda s: units.milliseconds(s.duration_s(0.5)), 8, WIDE),
    Column("p99 ms", lambda s: units.milliseconds(s.duration_s(0.99)), 8),
    Column("Errors", count_of("fetch_errors"), 6, 0, lambda s: RED if s.figure("fetch_errors") else ""),
    OLDEST,
)

# Of --dmon: one line for each process and tick. Columns keep their places, each with its unit below its name.
_LOG = (
    Column("gpu\nIdx", lambda p: p.seat, 4),
    Column("pid\n#", lambda p: p.pid, 8),
    Column(" role\n name", lambda p: f" {p.title.replace(' ', '_')[:12]}", 13, justify="left"),
    Column("state\n-", lambda p: p.state, 6, justify="left"),
    Column("pool\nMiB", lambda p: units.mib(p.figure("device_bytes")), 7),
    Column("pinned\nMiB", lambda p: units.mib(p.figure("pinned_capacity_bytes")), 7, WIDE),
    Column("host\nMiB", lambda p: units.mib(p.figure("host_bytes")), 7, WIDE),
    Column("entries\n#", count_of("num_entries"), 8),
    Column("hit\n%", lambda p: units.percent(p.hit_ratio), 6),
    Column("fetch\nGB/s", lambda p: units.gigabytes(p.rate("fetch_bytes_per_second")), 6),
    Column("h2d\nGB/s", lambda p: units.gigabytes(p.rate("h2d_bytes_per_second")), 6, WIDE),
    Column("evict\n/s", lambda p: units.decimal(p.rate("evictions_per_second")), 6, WIDE),
    Column("oldest\ns", lambda p: units.count(p.oldest_age_s), 7),
)


def log_heads(width: int) -> list[str]:
    """Names and units; a log's reader skips lines that begin with #."""
    names, units_of = (_log_line((column.head.split("\n")[row] for column in _LOG), width) for row in (0, 1))
    return [f"#time     {names}", f"#HH:MM:SS {units_of}"]


def log_lines(processes: Iterable[Process], unix_time: float, width: int) -> list[str]:
    when = time.strftime("%H:%M:%S", time.localtime(unix_time))
    return [f" {when} {_log_line((column.show(process) for column in _LOG), width)}" for process in processes]


def _log_line(texts: Iterable[str], width: int) -> str:
    """A long number is never cut."""
    cells = (
        text.ljust(column.width) if column.justify == "left" else text.rjust(column.width)
        for column, text in zip(_LOG, texts, strict=True)
        if column.at <= width
    )
    return " ".join(cells)
