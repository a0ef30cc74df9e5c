"""Kept-alive connections between two requests."""

from __future__ import annotations

import threading

from areal.infra.rpc.backends.http_connection import NodeConnection
from gpu_cache.process import leave_to_parent

# Of idle connections, over all nodes. Workers come and go; one to a worker that is gone would stay open for ever.
_MAX_IDLE = 256


class ConnectionPool:
    """Idle connections. Thread-safety: any thread."""

    def __init__(self) -> None:
        # Guards _idle, _is_closed.
        self._lock = threading.Lock()
        self._idle: list[NodeConnection] = []  # longest idle first
        self._is_closed = False
        leave_to_parent(self)

    def disown(self) -> object:
        """Be empty in a forked child, where the lock may be held for good; sockets are left to the parent."""
        self._lock, kept, self._idle = threading.Lock(), self._idle, []
        return kept

    def acquire(self, address: str) -> NodeConnection:
        """An idle connection to the node that is still alive, or a new one, not yet connected.

        Raises:
            AddressError: Not an address.
        """
        while (connection := self._take_idle(address)) is not None:
            if not connection.is_stale:
                return connection
            connection.close()
        return NodeConnection(address)

    def release(self, connection: NodeConnection) -> None:
        """Keep the connection for the next request if its last answer was read to the end, else close it."""
        unwanted: list[NodeConnection] = []
        is_kept = connection.can_be_reused
        with self._lock:
            (self._idle if is_kept else unwanted).append(connection)
            while len(self._idle) > (0 if self._is_closed else _MAX_IDLE):
                unwanted.append(self._idle.pop(0))
        for surplus in unwanted:
            surplus.close()

    def forget(self, address: str) -> None:
        """Close the idle connections to a node: one of them turned out to be dead."""
        while (connection := self._take_idle(address)) is not None:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and what comes back from now on. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take_idle(self, address: str) -> NodeConnection | None:
        """The one to the node that was idle for the shortest time."""
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position].address == address:
                    return self._idle.pop(position)
        return None
