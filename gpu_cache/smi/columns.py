"""Columns of the boxes: where each figure stands, at 99 characters and at 78."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from rich.text import Text

from gpu_cache import units
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, Process
from gpu_cache.smi.sources import Source

WIDE, NARROW = 99, 78
RED, YELLOW, DIM = "red", "yellow", "dim"
GLUE = "\N{NO-BREAK SPACE}"  # joins words that stay on one line
_OLD_S = 3600

T = TypeVar("T")


def plain(_: object) -> str:
    return ""


class Column(NamedTuple, Generic[T]):
    """One column of a box.

    Attributes:
        width: With the blanks before it; of the first column, without.
        narrow: The same at 78 characters, where 0 leaves the column out.
        is_left: Whether it is flush left, after `gap` blanks.
    """

    head: str
    unit: str
    width: int
    narrow: int
    show: Callable[[T], str]
    style: Callable[[T], str] = plain
    is_left: bool = False
    gap: int = 0

    def cell(self, text: str, is_wide: bool) -> str:
        width = self.width if is_wide else self.narrow
        if not width:
            return ""
        if not self.is_left:
            return text.rjust(width)  # a long number is never cut
        return " " * self.gap + text[: width - self.gap - 1].ljust(width - self.gap)


def row(columns: list[Column[T]], of: T, is_wide: bool, style: str = "") -> Text:
    """A line of a box; `style` is of the whole line."""
    line = Text("|", style="")
    for column in columns:
        line.append(column.cell(column.show(of), is_wide), column.style(of) or None)
    line.append(" |")
    if style:
        line.stylize(style)
    return line


def cells(columns: list[Column[T]], of: T, is_wide: bool) -> str:
    """The figures alone."""
    return "".join(column.cell(column.show(of), is_wide) for column in columns)


def heads(columns: list[Column[T]], is_wide: bool) -> list[str]:
    """The lines above the rows: names, and units if any column has one."""
    names = "".join(column.cell(column.head, is_wide) for column in columns)
    unit = "".join(column.cell(column.unit, is_wide) for column in columns)
    return [f"|{line} |" for line in (names, unit) if line.strip()]


def state_style(process: Process) -> str:
    return RED if process.state in (HUNG, LEAK) else ""


def age_style(age_s: float | None) -> str:
    return YELLOW if age_s is not None and age_s > _OLD_S else ""


def pool_style(process: Process) -> str:
    """A full pool is normal for a cache; one that had to turn tensors away is not."""
    if process.rate("alloc_failures"):
        return RED
    return YELLOW if process.rate("overflows") else ""


def row_style(process: Process) -> str:
    return DIM if process.state == DEAD else ""


def state_of(process: Process) -> str:
    return process.state.upper() if process.state in (LEAK, HUNG, DEAD, NEWER) else process.state


def size_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.size(process.figure(key))


def speed_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.speed(process.rate(key))


PROCESS: list[Column[Process]] = [
    Column("GPU", "", 4, 4, lambda p: p.seat),
    Column("PID", "", 8, 8, lambda p: p.pid),
    Column("Role", "", 14, 24, lambda p: p.title, is_left=True, gap=2),
    Column("State", "", 6, 6, state_of, state_style, is_left=True),
    Column("Pool", "", 9, 9, size_of("device_bytes"), pool_style),
    Column("Pinned", "", 8, 0, size_of("pinned_capacity_bytes")),
    Column("Host", "", 8, 0, size_of("host_bytes")),
    Column("Entries", "", 8, 8, lambda p: units.count(p.figure("num_entries"))),
    Column("Hit%", "", 6, 0, lambda p: units.percent(p.hit_ratio)),
    Column("Fetch", "", 9, 9, speed_of("fetch_bytes_per_second")),
    Column("H2D", "", 9, 0, speed_of("h2d_bytes_per_second")),
    Column("Oldest", "", 7, 7, lambda p: units.age(p.oldest_age_s), lambda p: age_style(p.oldest_age_s)),
]

SOURCE: list[Column[Source]] = [
    Column("Source node", "", 25, 24, lambda s: s.title, is_left=True, gap=1),
    Column("Entries", "", 8, 8, lambda s: units.count(s.entries)),
    Column("Resident", "", 10, 10, lambda s: units.size(s.resident_bytes)),
    Column("Fetched", "", 10, 0, lambda s: units.size(s.fetch_bytes)),
    Column("Speed", "", 10, 9, lambda s: units.speed(s.bytes_per_second)),
    Column("p50 ms", "", 9, 0, lambda s: units.milliseconds(s.duration_s(0.5))),
    Column("p99 ms", "", 9, 9, lambda s: units.milliseconds(s.duration_s(0.99))),
    Column("Errors", "", 7, 7, lambda s: units.count(s.errors), lambda s: RED if s.errors else ""),
    Column("Oldest", "", 8, 8, lambda s: units.age(s.oldest_age_s), lambda s: age_style(s.oldest_age_s)),
]
