"""A gate for log lines that would otherwise come by the thousand."""

from __future__ import annotations

import time
from collections.abc import Callable

ONE_MINUTE_S = 60.0


class Throttle:
    """Opens once, and again when `period_s` have passed since.

    Thread-safety: any thread; the worst that a race does is to open twice.
    """

    def __init__(self, period_s: float = ONE_MINUTE_S, now: Callable[[], float] = time.monotonic) -> None:
        self._period_s, self._now = period_s, now
        self._opens_at = float("-inf")

    def opens(self) -> bool:
        """Whether it does now; if so, it is shut for the next period."""
        if (moment := self._now()) < self._opens_at:
            return False
        self._opens_at = moment + self._period_s
        return True
