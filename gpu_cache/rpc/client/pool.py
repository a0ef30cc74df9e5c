"""Kept-alive connections between two requests, how many there may be at once, and what is known of their servers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from gpu_cache.process import leave_to_parent
from gpu_cache.rpc.client.connection import NodeConnection, max_descriptors, out_of_descriptors

# Idle connections are kept so long, over all nodes: a connection to a worker that is gone would stay open for ever.
_MAX_IDLE = 256
# Shares of the descriptors that this process may have: for all connections, and for idle ones.
_SHARE, _IDLE_SHARE = 1 / 2, 1 / 4


class Restart(NamedTuple):
    """Another server took the place of one that had answered from the same address."""

    before: str  # the incarnation that answered first
    now: str


class NodeState:
    """The form that one node's server spoke when it last answered, and which server that was.

    A server names its incarnation, a random id that it takes when it starts. AReaL's do not, and are taken to be one.

    Args:
        on_removal: Called when an answer says that the owner has removed shards since the answer before.
    Attributes:
        is_binary: Whether it spoke the binary form; few shards are asked for before it did.
        memory: The socket that its server announces to processes of its host; None before it answered.
    Thread-safety: any thread: two threads that learn something at once learn the same.
    """

    def __init__(self, on_removal: Callable[[], object] = lambda: None) -> None:
        self.is_binary = False
        self.memory: str | None = None
        self._on_removal = on_removal
        self._removals = ""
        self._known = Restart("", "")

    @property
    def restart(self) -> Restart | None:
        """The latest restart that was noticed."""
        return self._known if self._known.before else None

    def note(self, incarnation: str) -> bool:
        """Note which server answered.

        Returns:
            Whether it is another one than before. Then nothing holds that was learnt of that one.
        """
        known = self._known
        if not incarnation or incarnation in known:  # a late answer of the incarnation before
            return False
        self._known = Restart(known.now, incarnation)  # one step: readers see two that belong together
        if known.now:
            self.is_binary, self._removals = False, ""  # another server counts from zero
        return bool(known.now)

    def note_removals(self, removals: str) -> None:
        """Note how often the owner has removed shards, as an answer says; a restart begins a new count."""
        known, self._removals = self._removals, removals
        if known and known != removals:
            self._on_removal()


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """One requester's place among those that may be connected at once."""

    is_taken: bool = False
    is_given_up: bool = False  # set by any thread, which then calls `wake`


class ConnectionPool:
    """Idle connections, and places for those in use: together at most half of the descriptors that there may be.

    Args:
        descriptors: How many this process may have; asked before each place is given.
    Thread-safety: any thread.
    """

    def __init__(self, descriptors: Callable[[], int] = max_descriptors) -> None:
        self._descriptors, self._limit = descriptors, descriptors()
        # Guards _limit and every field below.
        self._lock = threading.Lock()
        self._idle: list[NodeConnection] = []  # longest idle first
        self._is_closed = False
        self._queue: dict[Place, threading.Condition] = {}  # conditions of _lock, one for each waiter in order
        self._num_places = 0
        self._ceiling: int | None = None  # the most places, learnt when descriptors ran out; until none is taken
        leave_to_parent(self)

    def disown(self) -> object:
        """Be empty in a forked child, where the lock may be held for good; sockets are left to the parent."""
        self._lock, kept, self._idle = threading.Lock(), self._idle, []
        self._queue, self._num_places, self._ceiling = {}, 0, None
        return kept

    def enter(self, place: Place, deadline: float) -> None:
        """Wait for a place; first come, first served. The requester keeps it until it leaves.

        Args:
            place: The requester's.
            deadline: As by `time.monotonic()`.
        Raises:
            OSError: There was none in time; its number is EMFILE.
            ConnectionAbortedError: It was given up.
        """
        limit = self._descriptors()
        with self._lock:
            self._limit = limit
            if self._queue or not self._has_room_locked():
                self._wait_locked(place, deadline)
            if place.is_given_up:
                raise ConnectionAbortedError("the fetch was given up")
            self._num_places += 1
            place.is_taken = True

    def leave(self, place: Place) -> None:
        """Give a place back, if it is taken."""
        with self._lock:
            if place.is_taken:
                self._leave_locked(place)

    def wake(self) -> None:
        """Let those who wait look whether they were given up."""
        with self._lock:
            for turn in self._queue.values():
                turn.notify()

    def make_room(self, place: Place) -> bool:
        """Descriptors ran out: close what is idle; else give the place back, to enter again when others have left.

        Returns:
            Whether trying again may help; not if this place is the only one.
        """
        with self._lock:
            idle, self._idle = self._idle, []
            may_wait = not idle and self._num_places > 1
            if may_wait:
                self._leave_locked(place)
                self._ceiling = self._num_places
        for connection in idle:
            connection.close()
        return may_wait or bool(idle)

    def acquire(self, address: str) -> NodeConnection:
        """An idle connection to the node that is still alive, or a new one, not yet connected.

        Raises:
            AddressError: Not an address.
        """
        while (connection := self._take_idle(address)) is not None:
            if not connection.is_stale:
                return connection
            connection.close()
        with self._lock:
            unwanted = self._surplus_locked()
        for connection in unwanted:
            connection.close()
        return NodeConnection(address)

    def release(self, connection: NodeConnection, place: Place | None = None) -> None:
        """Keep the connection for the next request if its last answer was read to the end, else close it.

        Args:
            connection: Given back.
            place: Given back with it, if it is taken.
        """
        is_kept, connection.idle_since = connection.can_be_reused, time.monotonic()
        with self._lock:
            if place is not None and place.is_taken:
                self._leave_locked(place)
            if is_kept:
                self._idle.append(connection)
            unwanted = self._surplus_locked()
        for one in unwanted if is_kept else [connection, *unwanted]:
            one.close()

    def forget(self, address: str) -> None:
        """Close the idle connections to a node: one of them turned out to be dead."""
        while (connection := self._take_idle(address)) is not None:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and what comes back from now on. Idempotent."""
        with self._lock:
            self._is_closed = True
            unwanted = self._surplus_locked()
        for connection in unwanted:
            connection.close()

    def _surplus_locked(self) -> list[NodeConnection]:
        """The longest idle, where there are more than may be kept, or than places leave descriptors for; not kept."""
        left = max(0, int(self._limit * _SHARE) - self._num_places)
        most = 0 if self._is_closed else min(_MAX_IDLE, int(self._limit * _IDLE_SHARE), left)
        num_over = max(0, len(self._idle) - most)
        unwanted, self._idle = self._idle[:num_over], self._idle[num_over:]
        return unwanted

    def _has_room_locked(self) -> bool:
        most = max(1, int(self._limit * _SHARE))
        return self._num_places < (most if self._ceiling is None else min(most, self._ceiling))

    def _wait_locked(self, place: Place, deadline: float) -> None:
        """Wait for room, or until it was given up, behind those who came first."""
        turn = self._queue[place] = threading.Condition(self._lock)
        left_s = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        try:
            if not turn.wait_for(lambda: place.is_given_up or self._is_next_locked(place), left_s):
                raise out_of_descriptors(f"{self._num_places:,} connections are in use")
        finally:
            del self._queue[place]
            self._call_next_locked()  # there may be room for one more

    def _is_next_locked(self, place: Place) -> bool:
        return next(iter(self._queue)) is place and self._has_room_locked()

    def _leave_locked(self, place: Place) -> None:
        place.is_taken = False
        self._num_places -= 1
        if not self._num_places:
            self._ceiling = None
        self._call_next_locked()

    def _call_next_locked(self) -> None:
        """Let the first who waits look whether there is a place now."""
        if self._queue:
            next(iter(self._queue.values())).notify()

    def _take_idle(self, address: str) -> NodeConnection | None:
        """The one to the node that was idle for the shortest time."""
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position].address == address:
                    return self._idle.pop(position)
        return None
