"""Comma-separated values: `--query-gpu`, `--query-proc`, `--query-source`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_cache.config import MIB
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process
from gpu_cache.units import DASH, ratio

UNKNOWN = "[N/A]"


class Field(NamedTuple):
    """A column. `show` gives a number in bytes, seconds or as a ratio, or text, or None."""

    meaning: str
    show: Callable[[Any], float | str | None]
    unit: str = ""
    decimals: int = 0
    scale: float = 1


mebibytes = functools.partial(Field, unit="MiB", scale=1 / MIB)
seconds = functools.partial(Field, unit="s")
rate = functools.partial(Field, unit="GB/s", decimals=1, scale=1e-9)
share = functools.partial(Field, unit="%", decimals=1, scale=100)
milliseconds = functools.partial(Field, unit="ms", decimals=1, scale=1000)


def figure(key: str) -> Callable[[Any], float | None]:
    """A figure of a process or a source, or of all processes on a GPU."""
    return lambda of: of.figure(key)


def lately(key: str) -> Callable[[Process], float | None]:
    return lambda process: process.rate(key)


_OF_BOTH = {
    "pool.used": mebibytes("device memory cached or still held", figure("device_bytes")),
    "pool.capacity": mebibytes("the most that the pool may take", figure("device_capacity_bytes")),
    "pool.utilization": share(
        "used of capacity", lambda of: ratio(of.figure("device_bytes"), of.figure("device_capacity_bytes"))
    ),
    "pinned.used": mebibytes("pinned memory allocated", figure("pinned_capacity_bytes")),
    "host.used": mebibytes("cached in host memory", figure("host_bytes")),
    "host.capacity": mebibytes("the most that the host tier may take", figure("host_capacity_bytes")),
    "entries": Field("cached tensors", figure("num_entries")),
}

FIELDS: dict[str, dict[str, Field]] = {
    "gpu": {
        "index": Field("NVML's index, in PCI bus order", lambda row: row.label),
        "uuid": Field("as NVML spells it", lambda row: row.uuid),
        "name": Field("of the GPU", lambda row: row.name),
        "memory.used": mebibytes("by all processes, as NVML counts it", lambda row: row.gpu and row.gpu.used_bytes),
        "memory.total": mebibytes("of the GPU", lambda row: row.gpu and row.gpu.total_bytes),
        "processes": Field("with a cache", lambda row: len(row.processes)),
        **_OF_BOTH,
    },
    "proc": {
        "gpu.index": Field("NVML's index, or the process's own with a star", lambda p: p.seat),
        "gpu.uuid": Field("as the process reports it", lambda p: p.uuid or None),
        "pid": Field("as seen from here", lambda p: p.host_pid),
        "role": Field("role and rank", lambda p: p.title),
        "state": Field("ok, leak, hung, dead or newer", lambda p: p.state),
        "report.age": seconds("since the last report", lambda p: p.report_age_s, decimals=1),
        "memory.used": mebibytes("of the GPU by the whole process, as NVML counts it", lambda p: p.memory_bytes),
        **_OF_BOTH,
        "lookups": Field("since start, as all counts", figure("requested")),
        "hit_ratio": share("look-ups that found the tensor", lambda p: p.hit_ratio),
        "fetch.bytes": mebibytes("fetched", figure("fetch_bytes")),
        "fetch.rate": rate("over busy seconds, of the latest 10 s with a fetch", lately("fetch_bytes_per_second")),
        "fetch.wall_rate": rate("over the last 10 s", lately("fetch_bytes_per_wall_second")),
        "fetch.errors": Field("failed fetches", figure("fetch_errors")),
        "h2d.rate": rate("copies to the device, over busy seconds", lately("h2d_bytes_per_second")),
        "h2d.wall_rate": rate("over the last 10 s", lately("h2d_bytes_per_wall_second")),
        "pinned.wait": seconds("blocked for a staging slot", figure("pinned_wait_seconds"), decimals=1),
        "evictions": Field("to make room", figure("evictions")),
        "overflows": Field("tensors that found no room", figure("overflows")),
        "alloc_failures": Field("failed allocations", figure("alloc_failures")),
        "clears": Field("clears, those between two fetches as one", figure("clears")),
        "oldest.age": seconds("of the oldest entry", lambda p: p.oldest_age_s),
        "outlived.entries": Field("that survived two clears or more", figure("outlived_entries")),
        "outlived.bytes": mebibytes("of those", figure("outlived_bytes")),
    },
    "source": {
        "node": Field("its address", lambda s: s.address),
        "entries": Field("cached now", figure("entries")),
        "resident": mebibytes("of those", figure("resident_bytes")),
        "fetch.bytes": mebibytes("fetched since start", figure("fetch_bytes")),
        "fetch.rate": rate("since start, over busy seconds", lambda s: s.bytes_per_second),
        "fetch.p50": milliseconds("median duration of a fetch", lambda s: s.duration_s(0.5)),
        "fetch.p99": milliseconds("its 99th percentile", lambda s: s.duration_s(0.99)),
        "fetch.errors": Field("failed fetches", figure("fetch_errors")),
        "fetch.reasons": Field("why they failed, with the number of each", lambda s: _listed(s.errors_by_reason)),
        "oldest.age": seconds("of the oldest entry", lambda s: s.oldest_age_s),
    },
}


def lines(node: Node, kind: str, names: Sequence[str], *, has_head: bool, has_units: bool) -> list[str]:
    """One for each GPU, process or source, below their names."""
    fields = [FIELDS[kind][name] for name in names]
    subjects: dict[str, Sequence[Any]] = {"gpu": node.rows, "proc": node.processes, "source": node.sources}
    rows = [", ".join(_cell(field, of, has_units) for field in fields) for of in subjects[kind]]
    heads = (f"{name} [{one.unit}]" if one.unit else name for name, one in zip(names, fields, strict=True))
    return [", ".join(heads), *rows] if has_head else rows


def help_text(kind: str) -> str:
    """The names of the fields."""
    width = max(map(len, FIELDS[kind]))
    rows = (f"  {name:<{width}}  {f'[{one.unit or DASH}]':<6}  {one.meaning}" for name, one in FIELDS[kind].items())
    return "\n".join([f"Fields of --query-{kind}, separated by commas:", *rows])


def _listed(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {name}" for name, count in counts.items()) or DASH


def _cell(field: Field, of: Any, has_units: bool) -> str:
    value = field.show(of)
    if value is None:
        return UNKNOWN
    if isinstance(value, str):
        return value.replace(",", ";")
    text = f"{value * field.scale:.{field.decimals}f}"
    return f"{text} {field.unit}" if has_units and field.unit else text
