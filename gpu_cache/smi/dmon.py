"""`--dmon`: one line for each process and tick, for logs."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpu_cache import units
from gpu_cache.smi import columns
from gpu_cache.smi.columns import Column
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process


def mib_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.mib(process.figure(key))


def rate_of(key: str) -> Callable[[Process], str]:
    return lambda process: units.gigabytes(process.rate(key))


_COLUMNS: list[Column[Process]] = [
    Column("gpu", "Idx", 5, 5, lambda p: p.seat),
    Column("pid", "#", 9, 9, lambda p: p.pid),
    Column("role", "name", 15, 15, lambda p: p.title.replace(" ", "_"), is_left=True, gap=2),
    Column("state", "-", 6, 6, lambda p: p.state, is_left=True),
    Column("pool", "MiB", 8, 8, mib_of("device_bytes")),
    Column("pinned", "MiB", 8, 0, mib_of("pinned_capacity_bytes")),
    Column("host", "MiB", 8, 0, mib_of("host_bytes")),
    Column("entries", "#", 9, 9, lambda p: units.count(p.figure("num_entries"))),
    Column("hit", "%", 7, 7, lambda p: units.percent(p.hit_ratio)),
    Column("fetch", "GB/s", 7, 7, rate_of("fetch_bytes_per_second")),
    Column("h2d", "GB/s", 7, 0, rate_of("h2d_bytes_per_second")),
    Column("evict", "/s", 7, 0, lambda p: units.decimal(p.rate("evictions_per_second"))),
    Column("oldest", "s", 8, 8, lambda p: units.count(p.oldest_age_s)),
]


def heads(is_wide: bool) -> list[str]:
    """Names and units; a log's reader skips lines that begin with #."""
    names, unit = (line[1:].rstrip("|").rstrip() for line in columns.heads(_COLUMNS, is_wide))
    return [f"#time    {names}", f"#HH:MM:SS{unit}"]


def lines(node: Node, is_wide: bool) -> list[str]:
    when = time.strftime("%H:%M:%S", time.localtime(node.unix_time))
    return [f" {when}{columns.cells(_COLUMNS, process, is_wide)}" for process in node.processes]
