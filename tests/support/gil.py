"""How often code gives the GIL away. Beside a busy thread each time may cost 5 ms."""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def counted_turns() -> Iterator[Callable[[], int]]:
    """Count how often a waiting thread gets the GIL. It gets it only if another thread gives it away."""
    interval_s, turns, is_over = sys.getswitchinterval(), itertools.count(1), threading.Event()
    taken = [0]

    def take_turns() -> None:
        while not is_over.is_set():
            taken[0] = next(turns)
            time.sleep(0)

    thread = threading.Thread(target=take_turns)
    gc.disable()
    try:
        sys.setswitchinterval(1000.0)  # first: a thread that waits already asks for the GIL after the interval before
        thread.start()
        yield lambda: taken[0]
    finally:
        sys.setswitchinterval(interval_s)
        gc.enable()
        is_over.set()
        thread.join()
