"""A machine made up for a test: reports, NVML, clock, terminal width; and the tool run on it."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gpu_cache.smi.main import main
from gpu_cache.smi.node import Node, Observer
from gpu_cache.smi.nvml import Nvml
from tests.support.smi_nvml import FakeNvml
from tests.support.smi_reports import DEAD_S, MIB, Folder, dead_trainer, report, trainers

GOLDEN = Path(__file__).parents[1] / "golden/smi"
HOSTNAME = "gpu-a-017"
_LETTER = 12.2  # the width of one in a picture


@dataclasses.dataclass
class Run:
    code: int
    out: str
    err: str


class Machine:
    """Runs the tool as on a terminal of some width, though its output is captured."""

    def __init__(self, folder: Folder, nvml: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.folder = folder
        self.nvml = nvml
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.observer = Observer(
            lambda: [folder.path],
            nvml=Nvml(nvml),
            clock=lambda: self.folder.now,
            hostname=HOSTNAME,
            procfs=folder.procfs,
        )

    def look(self) -> Node:
        return self.observer.look()

    def run(self, *arguments: str, width: int = 100) -> Run:
        """The exit code, and what was written; both parts of a screen if it goes to a terminal."""
        self._monkeypatch.setenv("COLUMNS", str(width))
        self._capsys.readouterr()
        try:
            code = main(list(arguments), self.observer)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = self._capsys.readouterr()
        return Run(code, out, err)

    def screen(self, *arguments: str, width: int = 100) -> str:
        """As on a terminal, where warnings stand below the boxes."""
        done = self.run(*arguments, width=width)
        return done.out + done.err


@contextmanager
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, nvml: Any = None) -> Iterator[Machine]:
    """Without a process yet."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    folder = Folder(tmp_path)
    try:
        yield Machine(folder, nvml or FakeNvml(), monkeypatch, capsys)
    finally:
        folder.close()
        monkeypatch.undo()
        time.tzset()


def add_trainers(folder: Folder) -> None:
    """Those of the specification's first screen."""
    for made, age_s in trainers():
        folder.add(made, age_s=age_s, host_pid=made["pid"])
    folder.add(dead_trainer(), age_s=DEAD_S, is_alive=False)


def add_strange(folder: Folder) -> None:
    """Those of the specification's screen of stale, hung and foreign processes."""
    folder.add(report(3), host_pid=41876)
    hung = next((made, age_s) for made, age_s in trainers() if made["rank"] == 5)
    folder.add(hung[0] | {"sources": {}}, age_s=hung[1], host_pid=41878)
    folder.add(dead_trainer(), age_s=DEAD_S, is_alive=False)
    hits = int(0.88 * 15_348_000) + 1
    foreign = report(
        7, role="critic", pid=212, pid_namespace=1, device_bytes=4096 * MIB, num_entries=220, hits=hits,
        pinned_capacity_bytes=1024 * MIB, host_bytes=0, fetch_bytes_per_second=9.8e9, h2d_bytes_per_second=22.7e9,
        oldest_entry_age_seconds=13.9,
    )  # fmt: skip
    folder.add(foreign)
    folder.add(report(7, role="ref", pid=51120, schema_version=2), host_pid=51120)


def matches_golden(name: str, found: str) -> bool:
    """Whether it is what the golden file says; UPDATE_GOLDEN=1 makes it so."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(found)
    assert found == path.read_text(), f"{name} differs; look, then UPDATE_GOLDEN=1"
    return True


def words_of(svg: str) -> str:
    """The text of a picture of a terminal, each word in its place."""
    found: dict[float, str] = {}
    for x, y, text in re.findall(r"<text [^>]*?x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*clip-path[^>]*>(.*?)</text>", svg):
        words = unescape(text).replace("\N{NO-BREAK SPACE}", " ")
        found[float(y)] = found.get(float(y), "").ljust(round(float(x) / _LETTER)) + words
    return "".join(f"{found[y].rstrip()}\n" for y in sorted(found))
