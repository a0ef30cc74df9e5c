"""The JSON document. Keys end in their unit, unknown is null, and keys are only added within a schema version."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from gpu_cache import __version__
from gpu_cache.report.schema import WINDOW_S
from gpu_cache.smi import figures
from gpu_cache.smi.node import Node, Row, errors_by_reason
from gpu_cache.smi.problems import Problem, problems_of
from gpu_cache.smi.process import Process

SCHEMA_VERSION = 1
_RATES = ("bytes_per_second", "window_age_seconds", "bytes_per_wall_second")
_HELD = {
    "pool_used_bytes": "device_bytes",
    "pool_capacity_bytes": "device_capacity_bytes",
    "pinned_bytes": "pinned_capacity_bytes",
    "host_bytes": "host_bytes",
    "entries": "num_entries",
}
_SHARED = ("shared_bytes", "shared_reserved_bytes")  # counted for the owner of that memory alone
_OF_SOURCE = ("entries", "resident_bytes", "fetch_bytes", "fetch_busy_seconds", "fetch_errors")


def document(node: Node) -> dict[str, Any]:
    """Everything of one look."""
    when = datetime.datetime.fromtimestamp(node.unix_time, datetime.UTC)
    return {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "hostname": node.hostname,
        "query_time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "driver_version": node.devices.driver_version,
        "window_seconds": WINDOW_S,
        "gpus": [_gpu(row) for row in node.rows],
        "processes": [_process(process, node.filters.sources) for process in node.processes],
        "problems": [_problem(problem) for problem in problems_of(node)],
    }


def as_text(node: Node, *, is_one_line: bool) -> str:
    """For people and jq, or one line for a log."""
    made = document(node)
    return json.dumps(made, separators=(",", ":")) if is_one_line else json.dumps(made, indent=2)


def _gpu(row: Row) -> dict[str, Any]:
    gpu = row.gpu
    return {
        "index": gpu.index if gpu else None,
        "uuid": row.uuid,
        "name": row.name,
        "memory_used_bytes": gpu.used_bytes if gpu else None,
        "memory_total_bytes": gpu.total_bytes if gpu else None,
        **{name: row.figure(key) for name, key in _HELD.items()},
        "label": row.label,
    }


def _process(process: Process, sources: tuple[str, ...]) -> dict[str, Any]:
    return {
        "pid": process.own_pid,
        "host_pid": process.host_pid,
        "role": process.role,
        "rank": process.rank,
        "gpu_uuids": [process.uuid] if process.uuid else [],
        "state": process.state,
        "report_age_seconds": round(process.report_age_s, 3),
        "lookups": process.figure("requested"),
        "hits": process.hits,
        "hit_ratio": _rounded(process.hit_ratio, 4),
        **_link(process, "fetch"),
        **_link(process, "h2d"),
        "oldest_entry_age_seconds": _rounded(process.oldest_age_s),
        "outlived_entries": process.figure("outlived_entries"),
        "outlived_bytes": process.figure("outlived_bytes"),
        "sources": {
            address: _source(process, one)
            for address, one in process.sources.items()
            if not sources or any(name in address for name in sources)
        },
        "memory_used_bytes": process.memory_bytes,
        **{name: process.figure(key) for name, key in _HELD.items()},
        **{key: found for key in _SHARED if (found := process.figure(key)) is not None},
        **{key: process.figure(key) for key in ("evictions", "overflows", "alloc_failures", "fetch_errors", "clears")},
        "version": figures.text(process.report, "version") or None,
        "user": process.user,
        "command": process.command or None,
    }


def _link(process: Process, link: str) -> dict[str, float | None]:
    """Bytes, busy seconds and rates of fetches or of copies."""
    totals = {f"{link}_{key}": process.figure(f"{link}_{key}") for key in ("bytes", "busy_seconds")}
    return totals | {f"{link}_{key}": process.rate(f"{link}_{key}") for key in _RATES}


def _source(process: Process, one: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: figures.number(one, key) for key in _OF_SOURCE}
    found["fetch_errors_by_reason"] = dict(+errors_by_reason(one))
    found["oldest_entry_age_seconds"] = _rounded(process.oldest_of(one, "entries"))
    return found | ({"transport": transport} if (transport := figures.text(one, "transport")) else {})


def _problem(problem: Problem) -> dict[str, Any]:
    process = problem.process
    return {
        "severity": problem.severity,
        "code": problem.code,
        "pid": (process.host_pid or process.own_pid) if process else None,
        "gpu": process.gpu.index if process and process.gpu else None,
        "message": problem.message,
        "action": problem.action or None,
    }


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
