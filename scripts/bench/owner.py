"""The client's side of the owner: start it, ask it, notice its death, stop it."""

from __future__ import annotations

import contextlib
import multiprocessing
from functools import cached_property
from typing import Any

from bench import owner_process
from bench.owner_process import CPU, RESTORE, STOP, Failure, Offer
from bench.workloads import Workload

_STOP_WAIT_S = 5.0
# Seconds to import: done once for all owners of a run.
_PRELOADED = ["torch", "numpy", "aiohttp", "uvloop"]


class OwnerError(RuntimeError):
    """The owner died, or could not do what it was told."""


class Owner:
    """The process that keeps a workload. A context manager: leaving it ends the process.

    Args:
        workload: What it keeps.
        fraction: Of the workload's trajectories, as given to `make_workload`.
    """

    def __init__(self, workload: Workload, fraction: float) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, workload.name, fraction)
        self._process = context.Process(
            target=owner_process.main, args=arguments, name=f"owner-{workload.name}", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the pipe ends when the owner does

    @cached_property
    def offer(self) -> Offer:
        """What it says that it has; it says so when it is up, and must be heard before anything else is asked.

        Raises:
            OwnerError: It did not come up.
        """
        offer: Offer = self._receive()
        return offer

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far."""
        return float(self._ask(CPU))

    def restore(self) -> None:
        """Put every shard back into its store, under the same id."""
        self._ask(RESTORE)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(STOP)
        self._end()

    def _ask(self, order: str) -> Any:
        try:
            self._pipe.send(order)
        except OSError:
            raise self._death() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(answer, Failure):
            raise OwnerError(f"the owner (pid {self._process.pid}) failed:\n{answer.text}")
        return answer

    def _death(self) -> OwnerError:
        self._process.join(_STOP_WAIT_S)
        return OwnerError(f"the owner (pid {self._process.pid}) died with exit code {self._process.exitcode}")

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(_STOP_WAIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
