"""One look at a process and its cache."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STEP_S = 0.1
# Of glibc's mallopt.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


@dataclass(frozen=True, slots=True)
class Sample:
    """One second of the run.

    Attributes:
        rss_bytes: Of the soak process.
        server_bytes: Of the server that is never killed.
        threads: Of the soak process, those of libraries too.
        descriptors: Open files and sockets of the soak process.
        cache: `buffer_stats()`.
    """

    rss_bytes: int
    server_bytes: int
    threads: int
    descriptors: int
    cache: Mapping[str, float]


def keep_malloc_from_hoarding() -> None:
    """Give what is freed back to the system, so that RSS shows what is in use.

    Source: our measurement. By default glibc raises its threshold for mmap, and RSS grew by 5 MB a minute for ten
    minutes, all of it free memory in arenas (`mallinfo2`); with these two it stayed within 3 MB.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
    libc.mallopt(_M_ARENA_MAX, 2)


def look(server_pid: int, cache: Mapping[str, float]) -> Sample:
    """What is the case now."""
    return Sample(rss_bytes(os.getpid()), rss_bytes(server_pid), num_threads(), num_descriptors(), cache)


def rss_bytes(pid: int) -> int:
    """Of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def num_threads() -> int:
    """Of this process, as the kernel counts them."""
    return len(os.listdir("/proc/self/task"))


def num_descriptors() -> int:
    """Open ones of this process, without the one that looks."""
    return len(os.listdir("/proc/self/fd")) - 1


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether it came true within that time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_STEP_S)
    return True


def settled_counts(quiet_s: float, limit_s: float) -> tuple[int, int]:
    """Threads and descriptors, once neither has changed for some time."""
    deadline = time.monotonic() + limit_s
    found, since = (num_threads(), num_descriptors()), time.monotonic()
    while time.monotonic() < min(deadline, since + quiet_s):
        time.sleep(_STEP_S)
        if (now := (num_threads(), num_descriptors())) != found:
            found, since = now, time.monotonic()
    return found
