"""`--gc`: the files of processes that ended without cleanup."""

from __future__ import annotations

import contextlib
import fcntl
import os

from gpu_cache.report import schema as report
from gpu_cache.smi.folder import ReportFile
from gpu_cache.smi.node import Node
from gpu_cache.smi.process import DEAD


def remove_dead(node: Node) -> tuple[list[ReportFile], list[ReportFile]]:
    """Delete reports of dead processes, and damaged ones without a lock; tell which went, and which may not go."""
    dead = [file for one in node.processes if one.state == DEAD for file in (one.file, *one.others)]
    damaged = [file for file in node.unread if not file.is_denied]
    removed, refused = [], []
    for file in [*dead, *node.expired, *damaged]:
        try:
            if _remove(file):
                removed.append(file)
        except PermissionError:
            refused.append(file)
    return removed, refused


def _remove(file: ReportFile) -> bool:
    """Delete one report, unless a process holds the lock after all; whether it went."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(file.beside(report.LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        for suffix in report.SUFFIXES:
            file.beside(suffix).unlink(missing_ok=True)
    return True
