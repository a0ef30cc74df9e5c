"""What a call costs: seconds, CPU seconds of both processes, allocations, and growth of this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.allocations import Allocated, AllocationWatch
from bench.beside import Beside, rate

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# The thread beside is watched alone for so long before a call, and again after it.
_ALONE_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Of one call.

    Attributes:
        seconds: On the clock.
        client_cpu_s: CPU seconds of all threads of this process, but for the one beside.
        server_cpu_s: CPU seconds of the owner.
        allocated: On the device and pinned.
        lost: Which part of its steps the thread beside lost; None where there was none.
    """

    seconds: float
    client_cpu_s: float
    server_cpu_s: float
    allocated: Allocated
    lost: float | None = None


class Meter:
    """Measures calls.

    Args:
        server_cpu: CPU seconds of the owner so far.
        watch: Of what is allocated.
    """

    def __init__(self, server_cpu: Callable[[], float], watch: AllocationWatch) -> None:
        self._server_cpu, self._watch = server_cpu, watch

    def timed(self, call: Callable[[], Any], beside: Beside | None = None) -> Cost:
        """What a call costs, which begins with no garbage, and with a thread beside it that is at work already."""
        return self._timed(call) if beside is None else self._timed_beside(call, beside)

    def _timed(self, call: Callable[[], Any]) -> Cost:
        gc.collect()
        server_began = self._server_cpu()
        self._watch.begin()
        cpu_began, began = time.process_time(), time.perf_counter()
        result = call()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        allocated = self._watch.end()
        del result
        return Cost(seconds, cpu_s, self._server_cpu() - server_began, allocated)

    def _timed_beside(self, call: Callable[[], Any], beside: Beside) -> Cost:
        looks = []

        def watched() -> Any:
            looks.append(beside.look())
            result = call()
            looks.append(beside.look())
            return result

        with beside:
            alone = beside.rate_over(_ALONE_S)
            cost = self._timed(watched)
            alone = (alone + beside.rate_over(_ALONE_S)) / 2
        began, ended = looks
        own_cpu_s = max(cost.client_cpu_s - (ended.cpu_s - began.cpu_s), 0.0)
        return dataclasses.replace(cost, client_cpu_s=own_cpu_s, lost=1 - rate(began, ended) / alone)


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
