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
from bench.beside import Beside, Span

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# The thread beside is watched alone for so long before a call, and for as long as the call after it, but no longer.
_ALONE_S, _MOST_ALONE_S = 0.05, 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Of one call.

    Attributes:
        seconds: On the clock.
        client_cpu_s: CPU seconds of all threads of this process, but for the one beside.
        server_cpu_s: CPU seconds of the owner.
        allocated: What was taken from the device and given back.
        lost: Which part of its steps the thread beside lost; None where there was none.
        stall_s: By how much its longest gap was longer than when it is alone for as long; None likewise.
    """

    seconds: float
    client_cpu_s: float
    server_cpu_s: float
    allocated: Allocated
    lost: float | None = None
    stall_s: float | None = None


class Meter:
    """Measures calls.

    Args:
        server_cpu: CPU seconds of the owner so far.
        watch: Of what is allocated.
    """

    def __init__(self, server_cpu: Callable[[], float], watch: AllocationWatch) -> None:
        self._server_cpu, self._watch = server_cpu, watch

    def timed(self, call: Callable[[], Any], beside: Beside | None = None) -> tuple[Cost, Any]:
        """What a call costs, and its result. It begins with no garbage, and the thread beside is at work already."""
        return self._timed(call) if beside is None else self._timed_beside(call, beside)

    def _timed(self, call: Callable[[], Any]) -> tuple[Cost, Any]:
        gc.collect()
        server_began = self._server_cpu()
        self._watch.begin()
        cpu_began, began = time.process_time(), time.perf_counter()
        result = call()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        allocated = self._watch.end()
        return Cost(seconds, cpu_s, self._server_cpu() - server_began, allocated), result

    def _timed_beside(self, call: Callable[[], Any], beside: Beside) -> tuple[Cost, Any]:
        spans: list[Span] = []

        def watched() -> Any:
            beside.begin()
            result = call()
            spans.append(beside.span())
            return result

        with beside:
            before = beside.over(_ALONE_S)
            cost, result = self._timed(watched)
            (during,) = spans
            # As long as the call, or a fair part of it: the longer one looks, the longer the longest gap.
            after = beside.over(min(during.seconds, _MOST_ALONE_S))
        # On a busy machine it may not have had a turn: then it had nothing to lose.
        alone = (before.rate * before.seconds + after.rate * after.seconds) / (before.seconds + after.seconds)
        cost = dataclasses.replace(
            cost,
            client_cpu_s=max(cost.client_cpu_s - during.cpu_s, 0.0),
            lost=1 - during.rate / alone if alone else 0.0,
            stall_s=during.longest_s - after.longest_s,
        )
        return cost, result


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
