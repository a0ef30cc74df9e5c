"""A log for the live view: the events between two looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gpu_cache import units
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import DEAD, HUNG, LEAK, NEWER, OK, Process


class Event(NamedTuple):
    unix_time: float
    who: str
    what: str
    state: str


def between(before: Node | None, after: Node) -> list[Event]:
    """In the order of time. Without a look before, what the reports tell of the past."""
    known = {process.file.path: process for process in before.processes} if before else {}
    found: list[Event] = []
    for process in after.processes:
        earlier = known.pop(process.file.path, None)
        found += _of_process(earlier, process, is_first=before is None)
    ended = [Event(after.unix_time, process.label, "ended", "") for process in known.values() if process.state != DEAD]
    return sorted([*found, *ended])


def _of_process(earlier: Process | None, process: Process, *, is_first: bool) -> Iterator[Event]:
    state, reported = process.state, process.file.modified
    if earlier is not None and _is_leaking_clear(earlier, process):
        yield Event(reported, process.label, _clear(earlier, process), LEAK)
    elif (earlier.state if earlier else OK) != state:
        what = {
            LEAK: f"{units.count(process.figure('outlived_entries'))} entries survived 2+ clear_batches()",
            HUNG: "last report",
            DEAD: "ended without cleanup",
            NEWER: "reports in a newer schema",
            OK: "reports again" if earlier and earlier.state == HUNG else "leaks no more",
        }
        yield Event(reported, process.label, what[state], state)
    elif earlier is None and not is_first:
        yield Event(reported, process.label, f"{process.title} started", OK)


def _is_leaking_clear(earlier: Process, process: Process) -> bool:
    return process.state == LEAK and (process.figure("clears") or 0) > (earlier.figure("clears") or 0)


def _clear(earlier: Process, process: Process) -> str:
    freed = (process.figure("cleared") or 0) - (earlier.figure("cleared") or 0)
    entries = process.figure("outlived_entries")
    survived = process.figure("outlived_max_clears")
    text = f"clear_batches(): {units.count(freed)} freed, {units.count(entries)} survive"
    return f"{text} their {units.ordinal(int(survived))}" if survived else text
