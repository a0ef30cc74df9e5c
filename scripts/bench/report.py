"""What the user sees: the conditions, the workloads, and a table of each."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import scale
from bench.targets import Verdict
from bench.workloads import Workload
from gpu_cache.native import blocks

Row = Mapping[str, Any]
_SHORT_S = 0.01
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")

_HEADINGS = (
    "ms", "spread", "GB/s", "us/shard", "CPU s/GB", "owner's", "memory", "x raw", "slabs", "faults"
)  # fmt: skip
NOTES = """\
raw        one tuned socket (reno, writes of 1 MiB) into one buffer: bytes, no shards      memcpy  between two buffers
json       AReaL's JSON form, 32 shards a request, by this project's codec
defaults/  through a cache with a user's settings, CacheConfig()      tuned/  everything preallocated and written before
           both over HTTP, as with GPU_CACHE_SHM=0      samehost/  at defaults, from the owner's memory
one        small shards, a call for each
cold       localize, nothing cached      warm   localize, new handles, all cached
localized  localize of handles that have their tensors      clear  clear_everywhere: evicted here, deleted at the owner
step       as the demo has it: prefetch, five reads through new handles, clear_everywhere
remotize   the batch stored in this process, as an owner does it: a copy of each tensor
hits       localize of a flat list of cached handles, five reads, each drops the one before
hits_get_many  get_many of its keys, likewise
areal/hits the same from a dict that hands out the tensors that it keeps, as AReaL's buffer does
areal/own_hits   AReaL's own localize, where AReaL is installed; then the hits are compared with it, else with the dict
+python, +torch   the same, while another thread of the trainer runs pure Python, or small operations of torch
Each round runs every path once; milliseconds are medians over the rounds, spread is from the least to the most. Ratios
are medians too, of terms of one round. x raw: how many times as fast as raw; x quiet: how many times as long as with
nothing beside it. Lost: how many steps fewer a second the thread beside makes than alone. Stall: by how many ms its
longest gap is longer than when it is alone for as long. Slabs: taken from the device or given back, in all timed
rounds; faults: page faults of this process, a call. Memory is the most that the client grew during one untimed run.
Every path's bits are compared once. One owner process, loopback. CPU s/GB: of client and owner; that of a thread beside
is left out."""
DEVICE_NOTES = """\
pinned_peak      one pinned copy of all bytes      pipeline  get_many from a source that takes no time: room, tensors,
                 staging buffers, copies; the bytes are not looked at      get_clear_30  of 30 such shards, and clear
larger           pipeline with five such batches at once: more than is preallocated at defaults
upstream_cold    AReaL's way: tensors on the host from JSON, then .to(device) one by one
upstream_second  the same at a later read: the host has the tensors, .to(device) again; compare with warm
new blocks: of torch's allocator, slabs included, or of pinned memory, in all timed rounds. Memory: at the most."""
SCALE_NOTES = """\
The index and the free list alone, in batches of 1,000, each pass in another random order; keys are equal, not
identical. us per entry; growth: over the smallest number; and that by the growth of a bare dict of the same keys."""


def machine(device: str) -> str:
    """Where this runs, in a line."""
    made_in = "Python" if blocks is None else "C++"
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    congestion = _CONGESTION.read_text().strip() if _CONGESTION.exists() else "unknown"
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), load {load} · Python {platform.python_version()} · "
        f"torch {torch.__version__}, one thread · blocks and hits in {made_in} · cache on {device} · "
        f"host's congestion control {congestion}"
    )


def workload_table(workloads: Sequence[Workload], sizes: Sequence[int] = ()) -> Table:
    """What travels; for scale, where nothing does, the numbers of entries."""
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
    if sizes:
        table.add_row(scale.NAME, "index, free list", f"none: {sizes[0]:,} to {sizes[-1]:,} entries")
    return table


def print_workload(console: Console, workload: Workload, rows: Sequence[Row], is_host: bool) -> None:
    """The tables of a workload, and why rows are missing."""
    ran = [row for row in rows if not row["skipped"]]
    if ran:
        console.print(result_table(workload, ran))
        console.print(beside_table(workload, ran))
        if not is_host:
            console.print(device_table(workload, ran))
    for row in rows:
        if row["skipped"]:
            console.print(f"{row['path']} was not run: {row['skipped']}")


def result_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """The figures of a workload's paths with nothing beside them."""
    quiet = [row for row in rows if row["lost_percent"] is None]
    parts = [row for row in quiet if row["measured_bytes"] < workload.nbytes]
    caption = ", ".join(f"* run on {row['measured_bytes'] / 1e6:.0f} MB, seconds scaled" for row in parts)
    size = f"{workload.nbytes / 1e6:.1f} MB, median of {rows[0]['num_rounds']} rounds"
    title = f"{workload.name}: {workload.title}, {size}"
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    table.add_column("path", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in quiet:
        table.add_row(row["path"] + ("*" if row in parts else ""), *_cells(row))
    return table


def beside_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """The same paths beside busy threads."""
    table = Table(title=f"{workload.name}: {workload.title}, beside a busy thread", title_justify="left")
    table.add_column("path", no_wrap=True)
    for heading in ("ms", "x quiet", "lost", "stall, ms", "slabs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["lost_percent"] is not None:
            figures = [row["seconds"] * 1e3, row["times_quiet"]]
            # Within a call this short the thread has no turn.
            lost = "-" if row["seconds"] < _SHORT_S else _percent(row["lost_percent"])
            table.add_row(row["path"], *map(_number, figures), lost, _number(row["stall_ms"]), f"{row['num_slabs']:,}")
    return table


def device_table(workload: Workload, rows: Sequence[Row]) -> Table:
    """What only a device with memory of its own has."""
    table = Table(title=f"{workload.name}: {workload.title}, the device", title_justify="left")
    table.add_column("path")
    for heading in ("x pinned_peak", "x upstream", "new blocks", "memory beyond the pool"):
        table.add_column(heading, justify="right")
    for row in rows:
        growth = row["device_growth_bytes"]
        table.add_row(
            row["path"],
            _number(row["ratio_pinned"]),
            _number(row["ratio_upstream"]),
            f"{row['num_allocations']:,}",
            "-" if growth is None else _bytes(growth),
        )
    return table


def scale_table(rows: Sequence[Row]) -> Table:
    """A line for each structure and operation."""
    sizes = sorted({row["num_entries"] for row in rows})
    table = Table(title=f"scale, median of {rows[0]['num_rounds']} rounds, us per entry", title_justify="left")
    table.add_column("")
    for heading in (*(f"{number:,}" for number in sizes), "growth", "by the dict's"):
        table.add_column(heading, justify="right")
    for path in dict.fromkeys(row["path"] for row in rows):
        line = sorted((row for row in rows if row["path"] == path), key=lambda row: row["num_entries"])
        figures = [*(row["us_per_shard"] for row in line), line[-1]["growth"], line[-1]["growth_over_dict"]]
        table.add_row(path.replace("_", " "), *map(_number, figures))
    return table


def target_table(found: Sequence[Verdict], *, only_measured: bool = False) -> Table:
    """What should be, and what is."""
    table = Table(title="Targets", title_justify="left")
    table.add_column("what", no_wrap=True)
    for heading in ("wanted", "stretch", "measured"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for verdict in found:
        target = verdict.target
        if only_measured and verdict.measured is None:
            continue
        style = {True: "green", False: "red", None: "dim"}[verdict.is_met]
        table.add_row(
            target.what,
            target.wanted_words or f"{target.wanted:g}",
            "" if target.stretch is None else f"{target.stretch:g}",
            _number(verdict.measured),
            verdict.words,
            style=style,
        )
    return table


def _cells(row: Row) -> list[str]:
    return [
        _number(row["seconds"] * 1e3),
        _percent((row["seconds_max"] - row["seconds_min"]) / row["seconds"] * 100),
        _number(row["gb_per_s"]),
        _number(row["us_per_shard"]),
        _number(row["cpu_s_per_gb_client"]),
        _number(row["cpu_s_per_gb_server"]),
        "-" if row["rss_growth_bytes"] is None else _bytes(row["rss_growth_bytes"]),
        _number(row["ratio_raw"]),
        f"{row['num_slabs']:,}",
        f"{row['page_faults']:,.0f}",
    ]


def _number(figure: float | None) -> str:
    """Three digits that mean something."""
    if not figure:
        return "-" if figure is None else "0"
    magnitude = abs(figure)
    if magnitude >= 10_000:
        return f"{figure / 1e3:,.0f}k"
    if magnitude >= 100:
        return f"{figure:,.0f}"
    if magnitude < 0.001:
        return f"{figure:.1g}"
    return f"{figure:.1f}" if magnitude >= 10 else f"{figure:.2f}" if magnitude >= 0.1 else f"{figure:.3f}"


def _percent(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.0f} %"


def _bytes(nbytes: int) -> str:
    if nbytes < 10_000:
        return f"{nbytes:,} B"
    return f"{nbytes / 1e3:,.0f} kB" if nbytes < 1_000_000 else f"{nbytes / 1e6:,.1f} MB"
