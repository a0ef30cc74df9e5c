"""`--record FILE`: what a timeline needs of each look, one line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from gpu_cache.smi import figures
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process

SCHEMA_VERSION = 1
FIGURES = (
    "device_bytes",
    "device_capacity_bytes",
    "num_entries",
    "clears",
    "cleared",
    "fetch_bytes",
    "fetch_busy_seconds",
    "h2d_bytes",
    "h2d_busy_seconds",
)


def line(node: Node) -> str:
    """One look."""
    sample = {
        "schema_version": SCHEMA_VERSION,
        "unix_time": round(node.unix_time, 3),
        "hostname": node.hostname,
        "processes": [_process(process) for process in node.processes],
    }
    return json.dumps(sample, separators=(",", ":"))


def _process(process: Process) -> dict[str, Any]:
    survivors = process.report.get("survivors")
    return {
        "name": process.file.name,
        "gpu": process.seat,
        "pid": process.pid,
        "title": process.title,
        "state": process.state,
        "report_time": round(process.file.modified, 3),
        **{key: process.figure(key) for key in FIGURES},
        "sources": {address: figures.number(one, "resident_bytes") for address, one in process.sources.items()},
        "survivors": survivors if process.is_counted and isinstance(survivors, list) else [],
    }


def samples(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The looks in a recording. A last line that is cut off, as of a recording under way, is left out.

    Raises:
        ValueError: This is no recording, or one of a newer tool.
    """
    for number, text in enumerate(lines, 1):
        try:
            sample = json.loads(text, parse_constant=lambda _: None)
        except ValueError as error:
            if text.endswith("\n"):
                raise ValueError(f"line {number} is no JSON") from error
            return
        if not isinstance(sample, dict) or sample.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"line {number} is not of a recording of version {SCHEMA_VERSION}")
        yield sample
