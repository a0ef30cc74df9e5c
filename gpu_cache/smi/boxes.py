"""The default screen: boxes of devices, processes and sources, laid out as nvidia-smi does."""

from __future__ import annotations

import os
import time

from rich.text import Text

from gpu_cache import __version__, units
from gpu_cache.report.schema import WINDOW_S
from gpu_cache.smi import columns
from gpu_cache.smi.columns import DIM, NARROW, RED, WIDE, YELLOW
from gpu_cache.smi.node import HOST_SEAT, Filters, Node, Row
from gpu_cache.smi.nvml import Gpu
from gpu_cache.smi.problems import Problem, summed_up
from gpu_cache.units import DASH

DEVICES, PROCESSES, SOURCES = "gpu", "proc", "source"
_CELLS = (25, 23, 26, 20)  # widths in the device box; the last is left out at 78 characters
_HEADS = (
    " GPU  Name               ",
    "  GPU-Mem Used / Total ",
    "  Pool Used / Cap     Use ",
    "  Pinned  Host Tier ",
)


def screen(node: Node, boxes: tuple[str, ...], is_wide: bool) -> list[Text]:
    """The whole of it, without the warnings."""
    if not node.processes and not node.devices.gpus:
        return [Text(nothing(node))]
    lines = [Text(clock_line(node.unix_time))]
    if not node.processes:
        return lines + _head(node, is_wide) + _no_process(node, is_wide)
    parts = []
    if DEVICES in boxes:
        parts.append(_head(node, is_wide) + _devices(node, is_wide))
    if PROCESSES in boxes:
        parts.append(_processes(node, is_wide))
    if SOURCES in boxes and node.sources:
        parts.append(_sources(node, is_wide))
    for number, part in enumerate(parts):
        lines += [Text("")] * bool(number) + part
    if PROCESSES in boxes or DEVICES in boxes:
        lines += _footnote(node)
    return lines


def nothing(node: Node) -> str:
    """Why there is no process to show."""
    if node.filters != Filters():
        return "no process passes the filters"
    where = ", ".join(map(str, node.searched)) or "any folder"
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


def compact(node: Node, width: int) -> list[Text]:
    """For terminals narrower than the boxes: a line each process, with the figures that matter most."""
    if not node.processes:
        return [Text(nothing(node))]
    role = max(width - 36, 10)
    lines = [Text(f"{node.hostname}  {_census(node)}")]
    lines.append(Text(f"{'GPU':>4}{'PID':>8}  {'Role':<{role}}{'State':<6}{'Pool':>9}{'Oldest':>7}"))
    for one in node.processes:
        line = Text(f"{one.seat:>4}{one.pid:>8}  {one.title[: role - 1]:<{role}}")
        line.append(f"{columns.state_of(one):<6}", columns.state_style(one))
        line.append(f"{units.size(one.figure('device_bytes')):>9}", columns.pool_style(one))
        line.append(f"{units.age(one.oldest_age_s):>7}", columns.age_style(one.oldest_age_s))
        line.stylize(columns.row_style(one))
        lines.append(line)
    return lines


def clock_line(unix_time: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(unix_time))


def problem_lines(problems: list[Problem], is_wide: bool, room: int = NARROW) -> list[Text]:
    """WARN and NOTE below the boxes, in lines that fit into `room`, if that is less than the boxes take."""
    width = WIDE if is_wide else min(NARROW, room)
    return [Text(line) for problem in summed_up(problems) for line in problem.lines(width)]


def _rule(fill: str, is_wide: bool, corner: str = "+") -> Text:
    return Text(f"{corner}{fill * ((WIDE if is_wide else NARROW) - 2)}{corner}")


def _spread(left: str, right: str, is_wide: bool) -> Text:
    """One line of a box, both ends filled."""
    inside = (WIDE if is_wide else NARROW) - 4
    return Text(f"| {left}{right.rjust(inside - len(left))} |" if len(left) < inside else f"| {left[:inside]} |")


def _head(node: Node, is_wide: bool) -> list[Text]:
    driver, cuda = node.devices.driver_version or "N/A", node.devices.cuda_version or "N/A"
    rates = f"rates: {WINDOW_S:.0f} s busy"
    used, capacity = (node.summed(f"host_{key}") for key in ("bytes", "capacity_bytes"))
    if is_wide:
        versions = f"GPU-CACHE-SMI {__version__:<10} Driver Version: {driver:<12} CUDA Version: {cuda:<10}"
        host_tier = [f"host tier {units.size(used)} / {units.size(capacity)}"] if capacity else []
    else:
        versions, host_tier = f"GPU-CACHE-SMI {__version__:<8} Driver: {driver:<12} CUDA: {cuda:<7}", []
    shared, reserved = (node.summed(f"shared_{key}") for key in ("bytes", "reserved_bytes"))
    if reserved:
        host_tier.insert(0, f"shared {units.size(shared)} / {units.size(reserved)}")
    return [
        _rule("-", is_wide),
        _spread(versions, rates, is_wide),
        _spread(f"Node {node.hostname}   {_census(node)}", "  ".join(host_tier), is_wide),
    ]


def _census(node: Node) -> str:
    """8 processes: 5 ok, 1 leak."""
    num = len(node.processes)
    states = ", ".join(f"{count} {state}" for state, count in node.states.items())
    return f"{num} process{'' if num == 1 else 'es'}{': ' if states else ''}{states}"


def _no_process(node: Node, is_wide: bool) -> list[Text]:
    return [
        _rule("-", is_wide),
        _spread("Processes:", "", is_wide),
        _rule("=", is_wide, "|"),
        _spread(f" {nothing(node)}", "", is_wide),
        _rule("-", is_wide),
    ]


def _devices(node: Node, is_wide: bool) -> list[Text]:
    widths = _CELLS if is_wide else _CELLS[:-1]

    def rule(fill: str, corner: str) -> Text:
        return Text(corner + "+".join(fill * width for width in widths) + corner)

    head = Text("|" + "|".join(_HEADS[: len(widths)]) + "|")
    body = [_device(row, is_wide) for row in node.rows]
    return [rule("-", "|"), head, rule("=", "|"), *body, rule("-", "+")]


def _device(row: Row, is_wide: bool) -> Text:
    line = Text(f"|{row.label:>4}  {row.name[:18]:<19}|{_memory(row)} |")
    line.append(f"{_pool(row):>25}", _pool_style(row))
    line.append(" |")
    if is_wide:
        pinned, host = (units.size(row.summed(key)) for key in ("pinned_capacity_bytes", "host_bytes"))
        line.append(f"{pinned:>8}{host:>11} |")
    return line


def _memory(row: Row) -> str:
    gpu = row.gpu or Gpu(0, "", None, "")
    if row.label == HOST_SEAT:
        return f"{DASH:>22}"
    if gpu.used_bytes is None or gpu.total_bytes is None:
        return f"{'N/A':>22}"
    return f"{units.size(gpu.used_bytes):>10} / {units.size(gpu.total_bytes):>9}"


def _pool(row: Row) -> str:
    used, capacity = row.summed("device_bytes"), row.summed("device_capacity_bytes")
    if used is None or capacity is None:
        return DASH
    share = units.percent(units.ratio(used, capacity), 0)
    return f"{units.size(used):>9} / {units.size(capacity):>8}{share + '%':>5}"


def _pool_style(row: Row) -> str:
    styles = {columns.pool_style(process) for process in row.processes}
    return next((style for style in (RED, YELLOW) if style in styles), "")


def _processes(node: Node, is_wide: bool) -> list[Text]:
    rows = [columns.row(columns.PROCESS, process, is_wide, columns.row_style(process)) for process in node.processes]
    return _box(columns.heads(columns.PROCESS, is_wide), rows, is_wide)


def _sources(node: Node, is_wide: bool) -> list[Text]:
    rows = [columns.row(columns.SOURCE, source, is_wide) for source in node.sources]
    return _box(columns.heads(columns.SOURCE, is_wide), rows, is_wide)


def _box(heads: list[str], rows: list[Text], is_wide: bool) -> list[Text]:
    return [_rule("-", is_wide), *map(Text, heads), _rule("=", is_wide, "|"), *rows, _rule("-", is_wide)]


def _footnote(node: Node) -> list[Text]:
    """One dim line: the meaning of a star, and why NVML tells nothing."""
    has_star = any(process.seat.endswith("*") for process in node.processes)
    parts = ["* index inside that process"] * has_star
    if node.devices.problem:
        parts.append(f"NVML not available: {node.devices.problem}")
    elif has_star:
        parts.append("NVML does not know that GPU")
    return [Text("; ".join(parts), DIM)] if parts else []
