"""One process with a cache: its report, whether it lives, and which GPU it is on."""

from __future__ import annotations

import dataclasses
import pwd
from collections.abc import Mapping
from typing import Any

from gpu_cache.report import schema as report
from gpu_cache.smi import figures
from gpu_cache.smi.folder import ReportFile
from gpu_cache.smi.nvml import Gpu
from gpu_cache.units import ratio

OK, LEAK, HUNG, DEAD, NEWER = "ok", "leak", "hung", "dead", "newer"
HOST_SEAT = "cpu"
STATES = (OK, LEAK, HUNG, DEAD, NEWER)


@dataclasses.dataclass(frozen=True)
class Process:
    """As of one look. A figure that the report does not have, or that must not be shown, is None.

    Attributes:
        report_age_s: Since the report was written.
        is_alive: Whether its lock is held.
        host_pid: As seen from here; None if it cannot be known.
        gpu: Its GPU, as NVML knows it.
        others: The reports of a dead process's other caches.
        command: Its command line, as the kernel tells it; "" if it does not.
    """

    file: ReportFile
    report: Mapping[str, Any]
    report_age_s: float
    is_alive: bool
    host_pid: int | None
    gpu: Gpu | None
    others: tuple[ReportFile, ...] = ()
    command: str = ""

    @property
    def state(self) -> str:
        if (figures.integer(self.report, "schema_version") or 0) > report.SCHEMA_VERSION:
            return NEWER
        if not self.is_alive:
            return DEAD
        if self.report_age_s >= report.HUNG_AFTER_S:
            return HUNG
        return LEAK if figures.number(self.report, "outlived_entries") else OK

    @property
    def is_counted(self) -> bool:
        """Whether its figures are shown and summed."""
        return self.state in (OK, LEAK, HUNG)

    @property
    def is_reporting(self) -> bool:
        return self.state in (OK, LEAK)

    @property
    def role(self) -> str:
        return figures.text(self.report, "role") or "?"

    @property
    def rank(self) -> int | None:
        return figures.integer(self.report, "rank")

    @property
    def title(self) -> str:
        """actor/0."""
        return self.role if self.rank is None else f"{self.role}/{self.rank}"

    @property
    def own_pid(self) -> int | None:
        """In its own namespace."""
        return figures.integer(self.report, "pid")

    @property
    def pid(self) -> str:
        return "?" if self.host_pid is None else str(self.host_pid)

    @property
    def user(self) -> str:
        """The owner of its report."""
        if self.file.uid is None:
            return "?"
        try:
            return pwd.getpwuid(self.file.uid).pw_name
        except KeyError:
            return str(self.file.uid)

    @property
    def uuid(self) -> str:
        return figures.text(self.report, "gpu_uuid")

    @property
    def gpu_name(self) -> str:
        return "host memory" if self.seat == HOST_SEAT else figures.text(self.report, "gpu_name") or "N/A"

    @property
    def start_time(self) -> float:
        return figures.number(self.report, "start_time") or 0

    @property
    def seat(self) -> str:
        """Which GPU, as the first column says it: NVML's index, the process's own with a star, "cpu", or "-"."""
        if self.gpu is not None:
            return self.gpu.label
        kind, _, index = figures.text(self.report, "device").partition(":")
        return f"{index or 0}*" if kind == "cuda" else kind[:4] or "-"

    @property
    def order(self) -> tuple[object, ...]:
        """GPUs as NVML orders them, then others, then the host; on one GPU by role and rank. The dead come last."""
        place = (0, self.gpu.index, self.gpu.label) if self.gpu else (1 + (self.seat == HOST_SEAT), 0, self.seat)
        return (self.state == DEAD, *place, self.role, self.rank or 0, self.host_pid or 0)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"gpu {self.seat} pid {self.pid}" if self.seat[0].isdigit() else f"pid {self.pid}"

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of the GPU that the process uses, as NVML counts them."""
        return self.gpu.process_bytes.get(self.host_pid) if self.gpu and self.host_pid else None

    def figure(self, key: str) -> float | None:
        """A figure of the report, from its last day on while the process hangs."""
        return figures.number(self.report, key) if self.is_counted else None

    def rate(self, key: str) -> float | None:
        """A figure of `rates_10s`; None while the process does not report."""
        return figures.number(figures.mapping(self.report, "rates_10s"), key) if self.is_reporting else None

    def oldest_of(self, part: Mapping[str, Any], entries: str = "num_entries") -> float | None:
        """Age now of the oldest entry in a part of the report; None where that has no entries."""
        age_s = figures.number(part, "oldest_entry_age_seconds") if figures.number(part, entries) else None
        return None if age_s is None else age_s + self.report_age_s

    @property
    def sources(self) -> dict[str, Mapping[str, Any]]:
        """By address."""
        found = figures.mapping(self.report, "sources") if self.is_counted else {}
        return {figures.printable(name): figures.mapping(found, name) for name in found}

    @property
    def hits(self) -> float | None:
        return figures.total([self.figure("hits"), self.figure("host_hits")])

    @property
    def hit_ratio(self) -> float | None:
        return ratio(self.hits, self.figure("requested"))

    @property
    def oldest_age_s(self) -> float | None:
        """Age of its oldest entry; None when it has none."""
        return self.oldest_of(self.report) if self.is_counted else None
