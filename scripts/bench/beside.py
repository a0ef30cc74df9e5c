"""Another thread of the trainer, with work of its own: what does it lose while a batch is fetched?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch

from bench.exactness import BenchError

_SPIN = range(100)


class Look(NamedTuple):
    """How far the thread is."""

    num_steps: int
    seconds: float  # on the clock
    cpu_s: float  # of the thread


class Beside:
    """Runs one step after another in a thread, for as long as the context is entered, and counts them.

    Args:
        step: A few microseconds of work.
        settle: Called by the thread when it is told to end: waits for what its steps left behind.
    Thread-safety: `look` from any thread, inside the context.
    """

    def __init__(self, step: Callable[[], object], settle: Callable[[], None] = lambda: None) -> None:
        self._step, self._settle = step, settle
        self._num_steps = 0  # written by the thread alone, as is _error
        self._error: BaseException | None = None
        self._is_at_work, self._is_over = threading.Event(), threading.Event()

    def __enter__(self) -> Beside:
        self._is_over.clear()
        self._is_at_work.clear()
        self._thread = threading.Thread(target=self._run, name="bench-beside", daemon=True)
        self._thread.start()
        self._is_at_work.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def look(self) -> Look:
        """How far it is now.

        Raises:
            BenchError: A step failed.
        """
        if self._error is not None:
            raise BenchError(f"the thread beside failed: {self._error!r}") from self._error
        return Look(self._num_steps, time.perf_counter(), time.clock_gettime(self._clock))

    def rate_over(self, seconds: float) -> float:
        """Steps per second while the calling thread sleeps."""
        began = self.look()
        time.sleep(seconds)
        return rate(began, self.look())

    def _run(self) -> None:
        # A local name: the loop itself is to cost little beside the step.
        step, is_over = self._step, self._is_over.is_set
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            step()
            self._is_at_work.set()
            while not is_over():
                step()
                self._num_steps += 1
            self._settle()
        except Exception as error:
            self._error = error
            self._is_at_work.set()
            self._is_over.wait()  # while the context is entered somebody may ask for the clock of this thread


def rate(began: Look, ended: Look) -> float:
    """Steps per second between two looks."""
    return (ended.num_steps - began.num_steps) / (ended.seconds - began.seconds)


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
