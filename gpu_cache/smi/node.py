"""One look at a machine: its GPUs, its processes with a cache, their sources."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_cache.report import schema as report
from gpu_cache.report.schema import LOCAL_SOURCE, NODE_CACHE, OTHER_SOURCES, SHARED_MEMORY, SOURCE_DURATION_EDGES_S
from gpu_cache.smi import figures, folder
from gpu_cache.smi.folder import ReportFile, read_folders
from gpu_cache.smi.nvml import Devices, Gpu, Nvml
from gpu_cache.smi.process import DEAD, STATES, Process
from gpu_cache.units import ratio

_SHORT_WAYS = {SHARED_MEMORY: "shm", NODE_CACHE: "node"}  # that are shown


@dataclasses.dataclass(frozen=True)
class Row:
    """A GPU, or what stands for one that NVML does not know, with the processes on it."""

    label: str
    name: str
    gpu: Gpu | None
    processes: tuple[Process, ...]

    @property
    def uuid(self) -> str | None:
        """As NVML says it, else its processes."""
        return self.gpu.uuid if self.gpu else self.processes[0].uuid or None

    def figure(self, key: str) -> float | None:
        """A figure over all processes on it."""
        return figures.total(process.figure(key) for process in self.processes)

    def rate(self, key: str) -> float | None:
        """A rate of all processes on it together."""
        return figures.total(process.rate(key) for process in self.processes)

    @property
    def hit_ratio(self) -> float | None:
        return ratio(figures.total(process.hits for process in self.processes), self.figure("requested"))


@dataclasses.dataclass(frozen=True)
class Source:
    """One node. `parts` are what each process reports of it."""

    address: str
    parts: tuple[tuple[Process, Mapping[str, Any]], ...]

    def figure(self, key: str) -> float | None:
        """A figure over all processes."""
        return figures.total(figures.number(one, key) for _, one in self.parts)

    @property
    def title(self) -> str:
        if self.address == LOCAL_SOURCE:
            return "local (same node)"
        used = {figures.text(one, "transport") for _, one in self.parts}  # by the latest answer to each process
        way = next((short for way, short in _SHORT_WAYS.items() if way in used), "")
        return f"{self.address} ({way})" if way else self.address

    @property
    def bytes_per_second(self) -> float | None:
        """Since start, over the seconds in which each process had a transfer in flight."""
        return ratio(self.figure("fetch_bytes"), self.figure("fetch_busy_seconds"))

    @property
    def errors_by_reason(self) -> Counter[str]:
        """Over all processes."""
        return sum((errors_by_reason(one) for _, one in self.parts), Counter())

    @property
    def oldest_age_s(self) -> float | None:
        return figures.largest(process.oldest_of(one, "entries") for process, one in self.parts)

    def duration_s(self, quantile: float) -> float | None:
        """A quantile of a fetch's duration, such as the median for 0.5."""
        found = [figures.numbers(one, "fetch_durations") for _, one in self.parts]
        fitting = [counts for counts in found if len(counts) == len(SOURCE_DURATION_EDGES_S) + 1]
        return quantile_of([sum(column) for column in zip(*fitting, strict=True)], SOURCE_DURATION_EDGES_S, quantile)


@dataclasses.dataclass(frozen=True)
class Filters:
    """The processes and GPUs to show; empty: all."""

    gpus: tuple[str, ...] = ()
    pids: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def admits_gpu(self, label: str, uuid: str | None) -> bool:
        wanted = (label.rstrip("*"), label.partition(":")[0], uuid)
        return not self.gpus or any(gpu in wanted for gpu in self.gpus)

    def admits(self, process: Process) -> bool:
        return (
            self.admits_gpu(process.seat, process.uuid)
            and (not self.pids or process.pid in self.pids)
            and (not self.roles or process.role in self.roles or process.title in self.roles)
        )


@dataclasses.dataclass(frozen=True)
class Node:
    """The machine as of `unix_time`.

    Attributes:
        unread: Files that hold no report one could read.
        expired: Reports of processes that have been dead for long; not shown.
    """

    unix_time: float
    hostname: str
    devices: Devices
    processes: tuple[Process, ...] = ()
    unread: tuple[ReportFile, ...] = ()
    expired: tuple[ReportFile, ...] = ()
    searched: tuple[Path, ...] = ()
    filters: Filters = Filters()

    @property
    def rows(self) -> list[Row]:
        """By GPU: those of NVML, used or not, then those that only a process knows, then the host."""
        known = [
            Row(gpu.label, gpu.name, gpu, tuple(p for p in self.processes if p.gpu is gpu))
            for gpu in self.devices.gpus
            if self.filters.admits_gpu(gpu.label, gpu.uuid)
        ]
        others: dict[tuple[str, str], list[Process]] = {}
        for process in self.processes:
            if process.gpu is None:
                others.setdefault((process.seat, process.uuid), []).append(process)
        return known + [Row(seat, found[0].gpu_name, None, tuple(found)) for (seat, _), found in others.items()]

    @property
    def sources(self) -> list[Source]:
        wanted = self.filters.sources
        found = sources_of(self.processes)
        return [source for source in found if not wanted or any(name in source.title for name in wanted)]

    @property
    def states(self) -> dict[str, int]:
        """How many processes are in each state; states of none are left out."""
        found = Counter(process.state for process in self.processes)
        return {state: found[state] for state in STATES if found[state]}

    @property
    def is_denied(self) -> bool:
        """Whether there are reports and none of them may be read."""
        return not self.processes and any(file.is_denied for file in self.unread)

    def summed(self, key: str) -> float:
        """A figure over all processes, 0 for none."""
        return figures.total(process.figure(key) for process in self.processes) or 0

    def filtered(self, filters: Filters) -> Node:
        """Only what passes."""
        admitted = tuple(process for process in self.processes if filters.admits(process))
        return dataclasses.replace(self, processes=admitted, filters=filters)


def sources_of(processes: Iterable[Process]) -> list[Source]:
    """All of them: by address, the node itself and the rest last."""
    found: dict[str, list[tuple[Process, Mapping[str, Any]]]] = {}
    for process in processes:
        for address, one in process.sources.items():
            found.setdefault(address, []).append((process, one))
    last = ("", LOCAL_SOURCE, OTHER_SOURCES)
    order = sorted(found, key=lambda address: (last.index(address) if address in last else 0, address))
    return [Source(address, tuple(found[address])) for address in order]


def errors_by_reason(one: Mapping[str, Any]) -> Counter[str]:
    """Failed fetches of a source by reason, from one process's report; "other" where the report gives none."""
    reasons = figures.mapping(one, "fetch_errors_by_reason")
    found = Counter({figures.printable(reason): figures.integer(reasons, reason) or 0 for reason in reasons})
    if (num := figures.integer(one, "fetch_errors")) is not None:
        found["other"] += max(num - found.total(), 0)
    return found


def host_of(address: str) -> str:
    """An address without its port."""
    host, colon, port = address.rpartition(":")
    return host if colon and port.isdigit() and (":" not in host or host.endswith("]")) else address


def quantile_of(counts: Sequence[float], edges: Sequence[float], quantile: float) -> float | None:
    """By linear interpolation in its bucket, as Prometheus does it; above the last edge, that edge."""
    if len(counts) != len(edges) + 1 or not sum(counts):
        return None
    wanted = quantile * sum(counts)
    below = [0.0, *itertools.accumulate(counts)]
    for bucket, upper in enumerate(edges):
        if below[bucket + 1] >= wanted and counts[bucket]:
            lower = edges[bucket - 1] if bucket else 0.0
            return lower + (upper - lower) * (wanted - below[bucket]) / counts[bucket]
    return edges[-1]


class Observer:
    """Looks at the machine.

    Args:
        folders: Where reports may be, asked at each look: containers come and go.
        procfs: Where the kernel tells who holds a lock.
        dead_s: How long a dead process is shown, in seconds.
    """

    def __init__(
        self,
        folders: Callable[[], Sequence[Path]],
        *,
        nvml: Nvml | None = None,
        clock: Callable[[], float] = time.time,
        hostname: str | None = None,
        procfs: Path = Path("/proc"),
        dead_s: float = report.DEAD_S,
    ) -> None:
        self._folders = folders
        self._nvml = nvml or Nvml()
        self.clock = clock
        self._hostname = hostname or socket.gethostname()
        self._procfs, self._dead_s = procfs, dead_s

    def look(self) -> Node:
        """Everything, now."""
        searched = tuple(self._folders())
        files = read_folders(searched)
        now, devices, holders = self.clock(), self._nvml.look(), folder.holders(self._procfs)
        found = [self._process(file, now, devices, holders) for file in files if file.content is not None]
        expired = [one for one in found if one.state == DEAD and one.report_age_s > self._dead_s]
        processes = _one_each([one for one in found if one not in expired])
        return Node(
            unix_time=now,
            hostname=self._hostname,
            devices=devices,
            processes=tuple(sorted(processes, key=lambda process: process.order)),
            unread=tuple(file for file in files if file.content is None),
            expired=tuple(one.file for one in expired),
            searched=searched,
        )

    def _process(self, file: ReportFile, now: float, devices: Devices, holders: dict[folder.LockId, int]) -> Process:
        content = file.content or {}
        lock = folder.lock_id(file.beside(report.LOCK))
        holder = holders.get(lock) if lock else None
        try:
            is_alive = folder.is_held(file.beside(report.LOCK))
        except PermissionError:
            is_alive = holder is not None
        host_pid = holder or self._pid_if_ours(content)
        return Process(
            file=file,
            report=content,
            report_age_s=max(now - file.modified, 0.0),
            is_alive=is_alive,
            host_pid=host_pid,
            gpu=devices.find(figures.text(content, "gpu_uuid")),
            command=self._command(host_pid) if is_alive and host_pid else "",
        )

    def _command(self, pid: int) -> str:
        try:
            raw = (self._procfs / str(pid) / "cmdline").read_bytes()
        except OSError:
            return ""
        return figures.printable(raw.replace(b"\0", b" ").decode(errors="replace").strip())

    def _pid_if_ours(self, content: Mapping[str, Any]) -> int | None:
        """The pid that a process gives itself, if it means the same here."""
        try:
            ours = os.stat(self._procfs / "self/ns/pid").st_ino
        except OSError:
            return None
        return figures.integer(content, "pid") if content.get("pid_namespace") == ours else None


def _one_each(processes: Sequence[Process]) -> list[Process]:
    """A dead process once, by its latest report, whatever the number of its caches."""
    found = [process for process in processes if process.state != DEAD]
    dead: dict[object, list[Process]] = {}
    for process in processes:
        if process.state == DEAD:
            dead.setdefault((process.own_pid, process.report.get("pid_namespace")), []).append(process)
    for caches in dead.values():
        latest, *others = sorted(caches, key=lambda one: one.report_age_s)
        found.append(dataclasses.replace(latest, others=tuple(one.file for one in others)))
    return found
