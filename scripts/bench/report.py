"""What the user sees: the conditions, the workloads, and a table of each."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.workloads import Workload

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")

NOTES = """\
raw        one tuned socket (reno, writes of 1 MiB) into one buffer: bytes, no shards      memcpy  between two buffers
json       AReaL's JSON form, 32 shards a request, by this project's codec
cold       localize, nothing cached      prefetch   prefetch().result(), then localize
warm       localize, new handles, all cached      localized  localize of handles that have their tensors
clear      clear_everywhere: evicted here, deleted at the owner
Each round runs every path once. Ratios are medians of how many times as fast a path was as raw or json in the same
round; seconds are median (least to most). Memory is the most that the client grew during one untimed run, where every
path's bits were compared too. Buffers and slabs are allocated and written before: page faults of fresh memory are in
no row, but json's tensors are new each time. One owner process, loopback. CPU s/GB: of client and owner."""


def machine(device: str) -> str:
    """Where this runs, in a line."""
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    congestion = _CONGESTION.read_text().strip() if _CONGESTION.exists() else "unknown"
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), load {load} · Python {platform.python_version()} · "
        f"torch {torch.__version__}, one thread · cache on {device} · host's congestion control {congestion}"
    )


def workload_table(workloads: Sequence[Workload]) -> Table:
    """What travels."""
    table = Table(title="Workloads", title_justify="left")
    for heading in ("", "what", "tensors of a trajectory"):
        table.add_column(heading)
    for heading in ("trajectories", "shards", "MB", "smallest", "median", "largest shard"):
        table.add_column(heading, justify="right")
    for one in workloads:
        lengths = sorted(one.shard_bytes)
        tensors = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, (dtype, _) in one.layout.items())
        table.add_row(
            one.name,
            one.title,
            tensors,
            f"{len(one.lengths):,}",
            f"{one.num_shards:,}",
            f"{one.nbytes / 1e6:.1f}",
            *(_bytes(lengths[at]) for at in (0, len(lengths) // 2, -1)),
        )
    return table


def result_table(workload: Workload, rows: Sequence[Mapping[str, Any]], num_rounds: int) -> Table:
    """The figures of a workload's paths."""
    parts = [row for row in rows if row["measured_bytes"] != workload.nbytes]
    caption = ", ".join(f"* run on {row['measured_bytes'] / 1e6:.0f} MB, seconds scaled" for row in parts)
    table = Table(
        title=f"{workload.name} {workload.title}, {workload.nbytes / 1e6:.1f} MB, median of {num_rounds} rounds",
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
    )
    table.add_column("path")
    for heading in ("ms", "least - most", "GB/s", "us/shard", "CPU s/GB", "owner's", "memory", "x raw", "x json"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["path"] + ("*" if row in parts else ""), *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        _number(row["seconds"] * 1e3),
        f"{_number(row['seconds_min'] * 1e3)} - {_number(row['seconds_max'] * 1e3)}",
        _number(row["gb_per_s"]),
        _number(row["us_per_shard"]),
        _number(row["cpu_s_per_gb_client"]),
        _number(row["cpu_s_per_gb_server"]),
        _bytes(row["rss_growth_bytes"]),
        _number(row["ratio_raw"]),
        _number(row["ratio_json"]),
    ]


def _number(figure: float | None) -> str:
    """Three digits that mean something."""
    if figure is None:
        return "-"
    if figure >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}" if figure >= 0.1 else f"{figure:.3f}"


def _bytes(nbytes: int) -> str:
    if nbytes < 10_000:
        return f"{nbytes:,} B"
    return f"{nbytes / 1e3:,.0f} kB" if nbytes < 1_000_000 else f"{nbytes / 1e6:,.1f} MB"
