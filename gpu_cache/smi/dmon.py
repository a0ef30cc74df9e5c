"""`--dmon`: one line for each process and tick, for logs. Columns keep their places."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from gpu_cache import units
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process
from gpu_cache.smi.tables import WIDE, Column, count_of


def mib_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.mib(process.figure(key))


def rate_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.gigabytes(process.rate(key))


_COLUMNS = (
    Column("gpu\nIdx", lambda p: p.seat, 4),
    Column("pid\n#", lambda p: p.pid, 8),
    Column(" role\n name", lambda p: f" {p.title.replace(' ', '_')[:12]}", 13, justify="left"),
    Column("state\n-", lambda p: p.state, 6, justify="left"),
    Column("pool\nMiB", mib_of("device_bytes"), 7),
    Column("pinned\nMiB", mib_of("pinned_capacity_bytes"), 7, WIDE),
    Column("host\nMiB", mib_of("host_bytes"), 7, WIDE),
    Column("entries\n#", count_of("num_entries"), 8),
    Column("hit\n%", lambda p: units.percent(p.hit_ratio), 6),
    Column("fetch\nGB/s", rate_of("fetch_bytes_per_second"), 6),
    Column("h2d\nGB/s", rate_of("h2d_bytes_per_second"), 6, WIDE),
    Column("evict\n/s", lambda p: units.decimal(p.rate("evictions_per_second")), 6, WIDE),
    Column("oldest\ns", lambda p: units.count(p.oldest_age_s), 7),
)


def heads(width: int) -> list[str]:
    """Names and units; a log's reader skips lines that begin with #."""
    names, units_of = (_line((column.head.split("\n")[row] for column in _COLUMNS), width) for row in (0, 1))
    return [f"#time     {names}", f"#HH:MM:SS {units_of}"]


def lines(node: Node, width: int) -> list[str]:
    when = time.strftime("%H:%M:%S", time.localtime(node.unix_time))
    return [f" {when} {_line((column.show(process) for column in _COLUMNS), width)}" for process in node.processes]


def _line(texts: Iterable[str], width: int) -> str:
    """A long number is never cut."""
    cells = (
        text.ljust(column.width) if column.justify == "left" else text.rjust(column.width)
        for column, text in zip(_COLUMNS, texts, strict=True)
        if column.at <= width
    )
    return " ".join(cells)
