"""`--record FILE`, one line of JSON for each look, and `--timeline FILE`, an HTML page that needs nothing else."""

from __future__ import annotations

import collections
import importlib.resources
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpu_cache.report.schema import MAX_SURVIVED
from gpu_cache.smi import figures
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import Process
from gpu_cache.units import ratio

SCHEMA_VERSION = 1
FIGURES = (
    "device_bytes", "device_capacity_bytes", "num_entries", "clears", "cleared",
    *(f"{link}_{key}" for link in ("fetch", "h2d") for key in ("bytes", "busy_seconds")),
)  # fmt: skip
MAX_SAMPLES = 4000  # more are thinned out evenly; counters keep what happened between
MAX_SOURCES = 16  # with a colour of their own
OTHERS, UNINDEXED = "other sources", "alignment, and held after a clear"
_PLACE = "/*RECORDING*/null"
_BROUGHT = re.compile(r"/\*(uplot/[\w.]+)\*/")  # a file of the chart library, in this package


def line(node: Node) -> str:
    """One look."""
    sample = {
        "schema_version": SCHEMA_VERSION,
        "unix_time": round(node.unix_time, 3),
        "hostname": node.hostname,
        "processes": [_sampled(process) for process in node.processes],
    }
    return json.dumps(sample, separators=(",", ":"))


def _sampled(process: Process) -> dict[str, Any]:
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
        except (ValueError, RecursionError) as error:
            if text.endswith("\n"):
                raise ValueError(f"line {number} is no JSON") from error
            return
        if not isinstance(sample, dict) or sample.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"line {number} is not of a recording of version {SCHEMA_VERSION}")
        yield sample


def page(found: Iterable[Mapping[str, Any]]) -> str:
    """The HTML.

    Raises:
        ValueError: There is nothing to draw.
    """
    recording = json.dumps(drawing(list(found)), separators=(",", ":")).replace("<", "\\u003c")
    folder = importlib.resources.files("gpu_cache.smi")
    template = (folder / "timeline.html").read_text("utf-8")
    whole = _BROUGHT.sub(lambda found: (folder / found[1]).read_text("utf-8"), template)
    return whole.replace(_PLACE, recording)


def drawing(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The page's curves: for each process one value for each sample, null where it did not report."""
    samples = samples[:: len(samples) // MAX_SAMPLES + 1]
    names = dict.fromkeys(one["name"] for sample in samples for one in _processes(sample))
    if not names:
        raise ValueError("the recording has no process with a cache")
    sources = _most_cached(samples)
    times = [figures.number(sample, "unix_time") or 0.0 for sample in samples]
    found = [{one["name"]: one for one in _processes(sample)} for sample in samples]
    return {
        "hostname": figures.text(samples[0], "hostname"),
        "start": times[0],
        "times": [round(time - times[0], 3) for time in times],
        "sources": [*sources, OTHERS, UNINDEXED],
        "processes": [_curves([at.get(name) for at in found], sources) for name in names],
    }


def _processes(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = sample.get("processes")
    listed = found if isinstance(found, list) else []
    return [one for one in listed if isinstance(one, dict) and isinstance(one.get("name"), str)]


def _most_cached(samples: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sources that get a colour, in the order of their names."""
    most: collections.Counter[str] = collections.Counter()
    for sample in samples:
        for one in _processes(sample):
            resident = figures.mapping(one, "sources")
            for address in resident:
                most[address] = max(most[address], figures.integer(resident, address) or 0)
    return sorted(address for address, _ in most.most_common(MAX_SOURCES))


def _curves(found: Sequence[Mapping[str, Any] | None], sources: Sequence[str]) -> dict[str, Any]:
    """The curves of one process, over all samples."""
    last = next(one for one in reversed(found) if one)
    pool = [figures.number(one or {}, "device_bytes") for one in found]
    return {
        "gpu": figures.text(last, "gpu"),
        "pid": figures.text(last, "pid"),
        "title": figures.text(last, "title"),
        "states": [figures.text(one or {}, "state") for one in found],
        "capacity": figures.largest(figures.number(one or {}, "device_capacity_bytes") for one in found),
        "pool": pool,
        "stack": _stack(found, pool, sources),
        "survivors": _survivors(found),
        "clears": _growth(found, "clears"),
        "cleared": _growth(found, "cleared"),
        **{f"{link}_bytes": _growth(found, f"{link}_bytes") for link in ("fetch", "h2d")},
        **{f"{link}_speed": _speed(found, link) for link in ("fetch", "h2d")},
    }


def _stack(
    found: Sequence[Mapping[str, Any] | None], pool: Sequence[float | None], sources: Sequence[str]
) -> list[list[float | None]]:
    """Bytes by source, then of all other sources, then what the pool holds beyond them."""
    curves: list[list[float | None]] = []
    resident = [figures.mapping(one or {}, "sources") for one in found]
    for address in sources:
        curves.append([figures.number(at, address) or 0 for at in resident])
    total = [figures.total(figures.number(at, address) for address in at) or 0 for at in resident]
    named = [sum(curve[i] or 0 for curve in curves) for i in range(len(found))]
    curves.append([whole - part for whole, part in zip(total, named, strict=True)])
    curves.append([max((held or 0) - whole, 0) for held, whole in zip(pool, total, strict=True)])
    return [[None if held is None else value for value, held in zip(curve, pool, strict=True)] for curve in curves]


def _survivors(found: Sequence[Mapping[str, Any] | None]) -> dict[int, list[float]]:
    """Bytes by the number of clears survived, for each number that occurs."""
    curves: dict[int, list[float]] = {}
    for i, one in enumerate(found):
        rows = one.get("survivors") if one else None
        for row in rows if isinstance(rows, list) else []:
            numbers = figures.numbers({"": row}, "")
            if len(numbers) == 3 and 0 < numbers[0] <= MAX_SURVIVED:
                curves.setdefault(int(numbers[0]), [0.0] * len(found))[i] = numbers[2]
    return dict(sorted(curves.items()))


def _growth(found: Sequence[Mapping[str, Any] | None], key: str) -> list[float]:
    """The growth of a counter since the sample before; 0 where one of the two is missing."""
    values = [figures.number(one or {}, key) for one in found]
    grown = [
        max(after - before, 0) if before is not None and after is not None else 0
        for before, after in itertools.pairwise(values)
    ]
    return [0.0, *grown]


def _speed(found: Sequence[Mapping[str, Any] | None], link: str) -> list[float | None]:
    """Bytes per busy second since the sample before; 0 without a transfer, null without a new report."""
    fresh = _growth(found, "report_time")
    moved, busy = _growth(found, f"{link}_bytes"), _growth(found, f"{link}_busy_seconds")
    return [
        (ratio(nbytes, seconds) or 0.0) if is_fresh else None
        for nbytes, seconds, is_fresh in zip(moved, busy, fresh, strict=True)
    ]
