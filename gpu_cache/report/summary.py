"""A process in one line, in the box in which `gpu-cache-smi` shows it; without that tool's libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_cache import units

_WIDTH = 97
_HEADS = (
    " GPU      PID  Role         State     Pool   Pinned     Host Entries    Hit  Fetch    H2D Oldest ",
    "                                       MiB      MiB      MiB              %   GB/s   GB/s    age ",
)


def summary_of(report: Mapping[str, Any]) -> str:
    """The process box of a report, as of now."""
    rates, num_entries = report["rates_10s"], report["num_entries"]
    state = "LEAK" if report["outlived_entries"] else "ok"
    kind, _, index = report["device"].partition(":")
    figures = [
        (8, units.mib(report["device_bytes"])),
        (9, units.mib(report["pinned_capacity_bytes"])),
        (9, units.mib(report["host_bytes"])),
        (8, units.count(num_entries)),
        (7, units.percent(units.ratio(report["hits"] + report["host_hits"], report["requested"]))),
        (7, units.gigabytes(rates["fetch_bytes_per_second"])),
        (7, units.gigabytes(rates["h2d_bytes_per_second"])),
        (7, units.age(report["oldest_entry_age_seconds"] if num_entries else None)),
    ]
    title = f"{report['role']}/{report['rank']}"
    line = f"{f'{index or 0}*' if kind == 'cuda' else kind:>4}{report['pid']:>9}  {title[:12]:<13}{state:<6}"
    line += "".join(text.rjust(width) for width, text in figures) + " "
    rule = f"+{'-' * _WIDTH}+"
    return "\n".join([rule, *(f"|{head}|" for head in _HEADS), f"|{'=' * _WIDTH}|", f"|{line}|", rule])
