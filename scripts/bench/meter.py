"""What a call costs: seconds, CPU seconds of both processes, and growth of this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call.

    Attributes:
        seconds: On the clock.
        client_cpu_s: CPU seconds of all threads of this process.
        server_cpu_s: The same of the owner.
    """

    seconds: float
    client_cpu_s: float
    server_cpu_s: float


def timed(call: Callable[[], Any], server_cpu: Callable[[], float]) -> tuple[Any, Cost]:
    """The result of a call, and what it cost; begins with no garbage."""
    gc.collect()
    server_began = server_cpu()
    cpu_began, began = time.process_time(), time.perf_counter()
    result = call()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    return result, Cost(seconds, cpu_s, server_cpu() - server_began)


def with_growth(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result of a call, and by how many bytes this process's memory grew at the most while it ran.

    What earlier calls freed goes back to the system first, so that it does not hide growth.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not allowed here: the peak so far stands, and growth below it is not seen
        _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    result = call()
    return result, max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{_STATUS} has no {field}")
