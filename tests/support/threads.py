"""Threads that race, and whose failures a test sees."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence


def run_threads(works: Sequence[Callable[[], object]], timeout_s: float = 60.0) -> None:
    """Start all at once, switch between them as often as the interpreter can, and raise what the first one raised."""
    barrier = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            barrier.wait(timeout_s)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a thread did not end"
    if errors:
        raise errors[0]
