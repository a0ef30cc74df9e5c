"""Warnings of calls that go on without some shards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from gpu_cache.errors import FetchError
from gpu_cache.throttle import Throttle

logger = logging.getLogger(__name__)

_TEXT = "going on without shards: %s%s"


class Lacks:
    """Warns of shards that calls with `on_error="none"` lack: once a minute for each node and reason.

    It logs those between at the level DEBUG, and counts them in the next warning.

    Args:
        now: Seconds, monotonic.
    Thread-safety: any thread; the worst that a race does is a second line, or a count that lacks some.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._gates: dict[tuple[str, str], Throttle] = {}  # by node and reason
        self._num_untold = 0  # shards

    def tell(self, error: FetchError, causes: Iterable[tuple[str, str]]) -> None:
        """Log the error of a call that goes on without `error.failures`.

        Args:
            error: Logged as text: its frames hold blocks.
            causes: Node and reason of each of these failures.
        """
        opened = [self._gates.setdefault(cause, Throttle(now=self._now)).opens() for cause in set(causes)]
        if not any(opened):
            self._num_untold += len(error.failures)
            logger.debug(_TEXT, str(error), "")
            return
        others, self._num_untold = self._num_untold, 0
        logger.warning(_TEXT, str(error), f" ({others:,} more since the last of these lines)" if others else "")
