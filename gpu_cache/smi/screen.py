"""The default screen: boxes of devices, processes and sources, laid out as nvidia-smi does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gpu_cache import __version__, units
from gpu_cache.report.schema import WINDOW_S
from gpu_cache.smi import figures, tables
from gpu_cache.smi.node import Filters, Node, Row
from gpu_cache.smi.problems import Problem, summed_up
from gpu_cache.smi.process import HOST_SEAT
from gpu_cache.smi.tables import DIM, NARROW, RED, RULED, WIDE, YELLOW, Column
from gpu_cache.units import DASH

DEVICES, PROCESSES, SOURCES = "gpu", "proc", "source"
BOXES = (DEVICES, PROCESSES, SOURCES)


def screen(node: Node, width: int, boxes: Sequence[str] = BOXES) -> list[RenderableType]:
    """The whole of it, without the warnings; below 78 characters a line for each process."""
    if not node.processes and (not node.devices.gpus or width < NARROW):
        return [nothing(node)]
    if width < NARROW:
        return [
            f"{node.hostname}  {census(node)}",
            tables.table(tables.PROCESS, node.processes, max(width, _LEAST), None),
        ]
    width = tables.fitting(width)
    parts: list[RenderableType] = []
    if not node.processes:
        said = Padding(Text(nothing(node), overflow="fold"), (0, 1))
        parts.append(tables.boxed(_head(node, width), said, width=width))
    elif DEVICES in boxes:
        gpus = tables.table(_GPU, node.rows, width - 2, RULED)
        gpus.show_edge = False
        parts.append(tables.boxed(_head(node, width), gpus, width=width))
    if node.processes and PROCESSES in boxes:
        parts.append(tables.table(tables.PROCESS, node.processes, width))
    if node.sources and SOURCES in boxes:
        parts.append(tables.table(tables.SOURCE, node.sources, width))
    spaced = [line for part in parts for line in ("", part)][1:]
    clock = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(node.unix_time))
    return [clock, *spaced, *(_footnote(node) if boxes != (SOURCES,) else [])]


def nothing(node: Node) -> str:
    """Why there is no process to show."""
    if node.filters != Filters():
        return "no process passes the filters"
    where = ", ".join(figures.printable(str(path)) for path in node.searched) or "any folder"
    return f"no cache reports in {where}" + ("" if os.getuid() == 0 else "; reports of other users need root")


def listing(node: Node) -> list[str]:
    """The GPUs and their processes, one a line, as `nvidia-smi -L` does it."""
    lines: list[str] = []
    for row in node.rows:
        uuid = f" (UUID: {row.uuid})" if row.uuid else ""
        lines.append(f"GPU {row.label}: {row.name}{uuid}" if row.label != HOST_SEAT else "cpu: host memory")
        for one in row.processes:
            lines.append(f"  pid {one.pid}  {one.title}  {one.state}  {one.user}  {one.command or '-'}")
    return lines or [nothing(node)]


def problem_lines(problems: list[Problem], width: int) -> list[str]:
    """WARN and NOTE below the boxes, no wider than they are."""
    return [line for problem in summed_up(problems) for line in problem.lines(tables.fitting(width))]


def census(node: Node) -> str:
    """8 processes: 5 ok, 1 leak."""
    num = len(node.processes)
    states = ", ".join(f"{count} {state}" for state, count in node.states.items())
    return f"{num} process{'' if num == 1 else 'es'}{': ' if states else ''}{states}"


def _head(node: Node, width: int) -> RenderableType:
    driver, cuda = node.devices.driver_version or "N/A", node.devices.cuda_version or "N/A"
    long = " Version" if width == WIDE else ""
    versions = f"GPU-CACHE-SMI {__version__:<8}  Driver{long}: {driver:<12}  CUDA{long}: {cuda:<8}"
    shown = [
        f"{name} {units.size(node.summed(used))} / {units.size(node.summed(capacity))}"
        for name, used, capacity in _MEMORY[: 2 if width == WIDE else 1]
        if node.summed(capacity)
    ]
    of_node = tables.spread(f"Node {node.hostname}   {census(node)}", "  ".join(shown))
    return Group(tables.spread(versions, f"rates: {WINDOW_S:.0f} s busy"), of_node)


_LEAST = 46  # with ten characters for a role
_MEMORY = (("shared", "shared_bytes", "shared_reserved_bytes"), ("host tier", "host_bytes", "host_capacity_bytes"))


def _memory(row: Row) -> str:
    gpu = row.gpu
    if row.label == HOST_SEAT:
        return DASH
    if gpu is None or gpu.used_bytes is None or gpu.total_bytes is None:
        return "N/A"
    return f"{units.size(gpu.used_bytes)} / {units.size(gpu.total_bytes):>8}"


def _pool(row: Row) -> str:
    used, capacity = row.figure("device_bytes"), row.figure("device_capacity_bytes")
    if used is None or capacity is None:
        return DASH
    return f"{units.size(used)} / {units.size(capacity):>7} {units.percent(units.ratio(used, capacity), 0):>3}%"


def pool_style(row: Row) -> str:
    styles = {tables.pool_style(process) for process in row.processes}
    return next((style for style in (RED, YELLOW) if style in styles), "")


def _tiers(row: Row) -> str:
    return f"{units.size(row.figure('pinned_capacity_bytes'))} {units.size(row.figure('host_bytes')):>10}"


_GPU = (
    Column("GPU  Name", lambda row: f"{row.label:>3}  {row.name}", justify="left"),
    Column("GPU-Mem Used / Total", _memory, 21),
    Column("Pool Used / Cap  Use", _pool, 24, 0, pool_style),
    Column("Pinned  Host Tier", _tiers, 18, WIDE - 2),
)


def _footnote(node: Node) -> list[Text]:
    """One dim line: the meaning of a star, and why NVML tells nothing."""
    has_star = any(process.seat.endswith("*") for process in node.processes)
    parts = ["* index inside that process"] * has_star
    if node.devices.problem:
        parts.append(f"NVML not available: {node.devices.problem}")
    elif has_star:
        parts.append("NVML does not know that GPU")
    return [Text("; ".join(parts), DIM)] if parts else []
