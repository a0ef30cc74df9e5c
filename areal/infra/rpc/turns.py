"""Who may be answered, where only so many can be at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

RETRY_AFTER_S = 0.05  # what somebody who was refused is told
# Who does not come back within this is forgotten. Clients wait up to half longer than they are told, and then some.
_KEPT_S = 4 * RETRY_AFTER_S


class Turns:
    """Places for answers under way. Who was refused comes back, and then goes before those who were served meanwhile.

    Else one who asks again and again, as for a large batch, would find each place that it leaves free itself.

    Args:
        num_places: Answers under way at once.
        now: Seconds, monotonic.
    Attributes:
        num_taken: Places that are taken.
        num_refusals: So far.
    Thread-safety: one thread, the event loop's.
    """

    def __init__(self, num_places: int, now: Callable[[], float] = time.monotonic) -> None:
        self.num_taken = self.num_refusals = 0
        self._num_places, self._now = num_places, now
        self._refused: dict[Hashable, float] = {}  # when, by client; the longest ago first

    def take(self, client: Hashable) -> bool:
        """Take a place; whether there was one for this client. It is given back with `leave`."""
        self._forget_who_stays_away()
        has_priority = self._refused.pop(client, None) is not None
        num_free = self._num_places - self.num_taken
        if num_free > (0 if has_priority else len(self._refused)):
            self.num_taken += 1
            return True
        self._refused[client] = self._now()
        self.num_refusals += 1
        return False

    def leave(self) -> None:
        """Give a place back."""
        self.num_taken -= 1

    def _forget_who_stays_away(self) -> None:
        since = self._now() - _KEPT_S
        while self._refused and next(iter(self._refused.values())) < since:
            del self._refused[next(iter(self._refused))]
