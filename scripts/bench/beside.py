"""Another thread of the trainer, with work of its own: what does it lose while the cache works?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.exactness import BenchError

PYTHON, TORCH = "python", "torch"
_SPIN = range(100)


class Span(NamedTuple):
    """What the thread did over some time.

    Attributes:
        seconds: How long that was.
        rate: Steps a second.
        longest_s: The longest gap between two of its steps.
        cpu_s: Its processor time.
    """

    seconds: float
    rate: float
    longest_s: float
    cpu_s: float


class Beside:
    """Runs one step after another in a thread, for as long as the context is entered.

    Args:
        step: A few microseconds of work.
        settle: Called by the thread when it is told to end: waits for what its steps left behind.
    Thread-safety: `begin`, `span` and `over` from one thread, inside the context.
    """

    def __init__(self, step: Callable[[], object], settle: Callable[[], None] = lambda: None) -> None:
        self._step, self._settle = step, settle
        self._num_steps = 0  # written by the thread alone, as is _error
        self._error: BaseException | None = None
        # The thread measures each gap from _last_s; `begin` moves that, so that no gap began before the span.
        self._last_s = self._longest_s = 0.0
        self._is_at_work, self._is_over = threading.Event(), threading.Event()

    def __enter__(self) -> Beside:
        self._is_over.clear()
        self._is_at_work.clear()
        self._thread = threading.Thread(target=self._run, name="bench-beside", daemon=True)
        self._thread.start()
        self._is_at_work.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def begin(self) -> None:
        """Start a span."""
        self._began = self._num_steps, time.clock_gettime(self._clock), time.perf_counter()
        self._last_s, self._longest_s = self._began[2], 0.0

    def span(self) -> Span:
        """What the thread has done since `begin`; a gap that has not ended yet counts as far as it goes.

        Raises:
            BenchError: A step failed.
        """
        now = time.perf_counter()
        longest_s = max(self._longest_s, now - self._last_s)
        if self._error is not None:
            raise BenchError(f"the thread beside failed: {self._error!r}") from self._error
        num_steps, cpu_s, began = self._began
        elapsed = now - began
        cpu_s = time.clock_gettime(self._clock) - cpu_s
        return Span(elapsed, (self._num_steps - num_steps) / elapsed, longest_s, cpu_s)

    def over(self, seconds: float) -> Span:
        """The span while the calling thread sleeps."""
        self.begin()
        time.sleep(seconds)
        return self.span()

    def _run(self) -> None:
        # Local names: the loop itself is to cost little beside the step.
        step, is_over, now = self._step, self._is_over.is_set, time.perf_counter
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            step()
            self._is_at_work.set()
            while not is_over():
                step()
                self._num_steps += 1
                ended = now()
                if ended - self._last_s > self._longest_s:
                    self._longest_s = ended - self._last_s
                self._last_s = ended
            self._settle()
        except Exception as error:
            self._error = error
            self._is_at_work.set()
            self._is_over.wait()  # while the context is entered the meter may ask for the clock of this thread


def busy_python() -> Beside:
    """Pure Python, which gives the GIL away only when asked to."""
    return Beside(lambda: sum(number * number for number in _SPIN))


def busy_torch(device: str) -> Beside:
    """Small operations in place, one launch after another; each gives the GIL away for a moment."""
    weights = torch.ones(64, 64, device=device)

    def settle() -> None:
        if weights.device.type != "cpu":
            torch.accelerator.synchronize(weights.device)

    return Beside(weights.neg_, settle)


def busy(kind: str, device: str) -> Beside:
    """The thread of one kind."""
    return busy_python() if kind == PYTHON else busy_torch(device)
