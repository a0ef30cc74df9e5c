"""Places for answers: how many clients a server answers at once, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

RETRY_AFTER_S = 0.05  # the server asks a refused client to wait so long
# A client that does not come back within this is forgotten. It waits up to half longer than it is told, and then some.
_KEPT_S = 4 * RETRY_AFTER_S
# A client that was first refused so long ago has a place kept for it.
_LONG_S = 2.0
# An answer of which so much is still in the kernel is as good as taken: delayed acknowledgements are less.
_LEFT_BYTES = 256 << 10
# A client that takes no more than this, in one of the times below, is as good as gone: 1 MiB/s while others wait. It
# asks no more for shards that it has by then.
_PROGRESS_BYTES = 8 << 20
_STALLED_S = 120.0
# Looked at once a second, a place is freed within 10 s.
_STALLED_BEFORE_OTHERS_S = 8.0
# Others wait if one was refused so lately: those that are not ours come back after the second that they are told.
_WAITING_S = 3.0


class Turns:
    """Places for answers under way. Clients that were refused come back, and go before those that were not.

    Else a client that asks again and again, as for a large batch, would find each place that it leaves free itself.
    The server takes the first refused client that comes, so that no place waits. It keeps a place for a client that
    has been coming for long.

    Args:
        num_places: Answers under way at once.
        now: Seconds, monotonic.
    Attributes:
        num_refusals: So far.
    Thread-safety: one thread, the event loop's.
    """

    def __init__(self, num_places: int, now: Callable[[], float] = time.monotonic) -> None:
        self.num_refusals = 0
        self._num_places, self._now = num_places, now
        self._taken: dict[Place, None] = {}
        self._refused: dict[Hashable, tuple[float, float]] = {}  # when first and last, by client; in order of the first
        self._refused_at = self._pruned_at = float("-inf")

    @property
    def num_taken(self) -> int:
        """Places that are taken. A place whose answer is sent is looked at now: has the client taken it?"""
        self._release()
        return len(self._taken)

    def take(self, client: Hashable) -> Place | None:
        """Take a place; None if there is none for this client. It asks again: what it got before is taken."""
        now = self._now()
        self._forget_who_stays_away(now)
        for place in [place for place in self._taken if place.client == client and place.is_sent]:
            self.leave(place)
        if self._may_take(client, self._num_places - self.num_taken, now):
            self._refused.pop(client, None)
            place = Place(self, client, now)
            self._taken[place] = None
            return place
        self._refused[client] = (self._refused.get(client, (now, now))[0], now)
        self._refused_at = now
        self.num_refusals += 1
        return None

    def stalled(self) -> list[tuple[Place, float]]:
        """The places whose clients take too little, and for how many seconds: less is too long while others wait."""
        now = self._now()
        self._release()
        others_wait = now - self._refused_at <= _WAITING_S
        patience_s = min(_STALLED_S, _STALLED_BEFORE_OTHERS_S) if others_wait else _STALLED_S
        waited = [(place, place.waited_s(now)) for place in self._taken]
        return [(place, seconds) for place, seconds in waited if seconds > patience_s]

    def leave(self, place: Place) -> None:
        """Give a place back."""
        del self._taken[place]

    def _release(self) -> None:
        for place in [place for place in self._taken if place.is_over]:
            self.leave(place)

    def _may_take(self, client: Hashable, num_free: int, now: float) -> bool:
        if client not in self._refused:
            return num_free > len(self._refused)
        for other, (first, _) in self._refused.items():
            if other == client or now - first < _LONG_S or num_free <= 0:
                break
            num_free -= 1
        return num_free > 0

    def _forget_who_stays_away(self, now: float) -> None:
        if now - self._pruned_at > _KEPT_S / 4:  # with many of them not at each request
            self._refused = {client: when for client, when in self._refused.items() if now - when[1] <= _KEPT_S}
            self._pruned_at = now


class Place:
    """One answer under way. A context manager: leaving it gives the place back, once the client has taken the answer.

    Args:
        turns: Where it is from.
        client: The client that holds it.
        now: When it was taken.
    Attributes:
        is_sent: Whether all of the answer was sent, though the client may not have taken it.
    """

    def __init__(self, turns: Turns, client: Hashable, now: float) -> None:
        self.client, self.is_sent = client, False
        self._turns, self._moved_at = turns, now
        self._num_sent: Callable[[], int] = lambda: 0
        self._num_left: Callable[[], int] = lambda: 0
        self._seen_bytes = -1
        self.abort: Callable[[], object] = lambda: None

    def send(self, num_sent: Callable[[], int], num_left: Callable[[], int], abort: Callable[[], object]) -> None:
        """From now on the client is waited for.

        Args:
            num_sent: How many bytes the server has written so far.
            num_left: How many of these the client has not taken; 0 if it is gone.
            abort: Cuts its connection.
        """
        self._num_sent, self._num_left, self.abort = num_sent, num_left, abort
        self._seen_bytes, self._moved_at = 0, self._turns._now()

    def waited_s(self, now: float) -> float:
        """For how long the client has taken too little, in seconds; 0 while the answer is being made."""
        if self._seen_bytes < 0:
            return 0.0
        if (taken := self._num_sent() - self._num_left()) - self._seen_bytes >= _PROGRESS_BYTES:
            self._seen_bytes, self._moved_at = taken, now
        return now - self._moved_at

    @property
    def is_over(self) -> bool:
        """Whether the answer was sent and taken."""
        return self.is_sent and self._num_left() <= _LEFT_BYTES

    def __enter__(self) -> Place:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.is_sent = error is None and self._seen_bytes >= 0
        if not self.is_sent or self.is_over:
            self._turns.leave(self)
