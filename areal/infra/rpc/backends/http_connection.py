"""Kept-alive HTTP connections whose bodies are received straight into the caller's buffers.

`http.client` writes requests and reads headers; bodies are received by few, large calls on a blocking socket: beside a
busy Python thread every call costs up to 5 ms, the time to get the interpreter back.
Source: our measurement over loopback, 0.6 to 1.7 GB/s this way beside such a thread, 0.01 with one call a shard.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

# The most buffers of one call: IOV_MAX of Linux is 1,024.
_MAX_BUFFERS = 1000
# What is read of a body before room is made for more: a length that was only announced must not cost memory.
_PIECE_BYTES = 1 << 20
# Over all nodes. Workers come and go; a connection to one that is gone would stay open for ever.
_MAX_IDLE = 256
_SHORTEST_S = 1e-3  # of a time-out: none at all would mean for ever


class DeadlineSocket(socket.socket):
    """A blocking socket whose calls end: by a deadline, after a silence, or when another thread cuts it.

    The time-outs are the kernel's, as one of Python's would make the socket non-blocking and `MSG_WAITALL` useless.
    Thread-safety: one thread; `cut` from any.
    """

    deadline = 0.0  # of all calls together, `time.monotonic()`
    patience_s = 0.0  # of one call
    _is_cut = False

    def cut(self) -> None:
        """Make the call under way fail at once, and every later one. Idempotent."""
        self._is_cut = True
        with contextlib.suppress(OSError):  # closed, or not connected
            self._set_timeout(_SHORTEST_S)  # for a call that has looked at _is_cut and not yet begun
            self.shutdown(socket.SHUT_RDWR)

    def connect(self, address: Any, /) -> None:
        """As `socket.connect`, in time."""
        self._in_time(super().connect, address)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """As `socket.sendall`, in time."""
        left = memoryview(data)
        while left:
            left = left[self._in_time(super().send, left, flags) :]

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As `socket.recv_into`, in time."""
        return self._in_time(super().recv_into, buffer, nbytes, flags)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> tuple[int, list[Any], int, Any]:
        """As `socket.recvmsg_into`, in time."""
        return self._in_time(super().recvmsg_into, buffers, ancbufsize, flags)

    def _in_time(self, call: Callable[..., ResultT], *args: Any) -> ResultT:
        left_s = min(self.deadline - time.monotonic(), self.patience_s)
        if left_s <= 0:
            raise TimeoutError("no time is left")
        self._set_timeout(left_s)
        if self._is_cut:
            raise ConnectionAbortedError("the connection was cut off on purpose")
        try:
            return call(*args)
        except BlockingIOError:
            raise TimeoutError(f"nothing came or went for {left_s:.3g} s") from None

    def _set_timeout(self, seconds: float) -> None:
        whole = max(seconds, _SHORTEST_S)
        timeval = struct.pack("@ll", int(whole), int(whole % 1 * 1e6))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class HttpAnswer:
    """The answer to one request: status, headers, and a body that is read exactly once.

    Attributes:
        retry_after_s: Seconds that the server asks to wait; NaN where it says so in another form; None: it does not.
        unread_bytes: Of the body; -1 where the server does not say before it ends.
    """

    def __init__(self, response: http.client.HTTPResponse, sock: DeadlineSocket) -> None:
        self.status = response.status
        self.content_type = response.headers.get_content_type()
        self.retry_after_s = _seconds(response.headers.get("Retry-After"))
        self.unread_bytes = -1 if response.length is None else response.length
        self._response, self._sock = response, sock
        self._may_be_ahead = True  # http.client may have read more than the headers

    @property
    def is_complete(self) -> bool:
        """Whether the body was read to its end, so that the connection can serve another request."""
        return self.unread_bytes == 0 and not self._response.will_close

    def close(self) -> None:
        """Let the connection go: it is closed with its last user, or serves another request."""
        self._response.close()

    def read(self, nbytes: int) -> bytearray:
        """The next `nbytes` of a body of known length; raises as `fill`."""
        body = bytearray(nbytes)
        self.fill([memoryview(body)] if nbytes else [])
        return body

    def read_rest(self, limit: int) -> bytearray:
        """The rest of the body, but at most `limit` bytes; raises as `fill`, and `http.client.HTTPException`."""
        body = bytearray()
        while self.unread_bytes and len(body) < limit:
            wanted = min(limit - len(body), _PIECE_BYTES)
            if self.unread_bytes > 0:
                body += self.read(min(wanted, self.unread_bytes))
            elif piece := self._response.read(wanted):  # chunked, or until the connection closes
                body += piece
            else:
                self.unread_bytes = 0
        return body

    def fill(self, left: list[memoryview]) -> None:
        """Receive the next bytes of the body into buffers until all are full.

        Args:
            left: Buffers with room for a byte or more, the next one last. What is filled is taken away: after a
                failure this is what is still to come.
        Raises:
            ConnectionError: The body ended early.
            TimeoutError: No more of it came in time.
            ValueError: The body has not as many bytes.
        """
        wanted = sum(map(len, left))
        if wanted > self.unread_bytes:
            raise ValueError(f"{wanted:,} bytes wanted of a body that has {self.unread_bytes:,} left")
        if left and self._may_be_ahead:
            self._take_what_is_ahead(left, wanted)
        while left:
            self._receive(left)

    def _take_what_is_ahead(self, left: list[memoryview], wanted: int) -> None:
        """Copy what came along with the headers."""
        num_ahead = len(self._response.fp.peek())
        taken = memoryview(self._response.fp.read(min(num_ahead, wanted)))
        self._may_be_ahead = len(taken) < num_ahead
        while taken:
            count = min(len(left[-1]), len(taken))
            left[-1][:count] = taken[:count]
            taken = taken[count:]
            self._advance(left, count)

    def _receive(self, left: list[memoryview]) -> None:
        """One call; fills as many buffers as it takes, waiting for all of them."""
        batch = left[: -_MAX_BUFFERS - 1 : -1]
        if len(batch) == 1:
            count = self._sock.recv_into(batch[0], 0, socket.MSG_WAITALL)
        else:
            count = self._sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
        if not count:
            raise ConnectionError(f"the connection ended {self.unread_bytes:,} bytes before the body did")
        self._advance(left, count)

    def _advance(self, left: list[memoryview], count: int) -> None:
        self.unread_bytes -= count
        while count:
            buffer = left.pop()
            if count < len(buffer):
                left.append(buffer[count:])
            count -= min(count, len(buffer))


class NodeConnection:
    """One connection to one node. One thread at a time; `cancel` from any, but not while another closes it.

    Raises:
        ValueError: Not an address.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._host, self._port = split_address(address)
        self._http = http.client.HTTPConnection(self._host, self._port)
        self._http.auto_open = 0
        self._sock: DeadlineSocket | None = None
        self._answer: HttpAnswer | None = None
        self._is_cancelled = False

    def request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], deadline: float, patience_s: float
    ) -> HttpAnswer:
        """Send a request and read the answer's headers, connecting first if need be.

        Args:
            method: As the three that follow, of the request.
            path: See above.
            body: See above.
            headers: See above.
            deadline: `time.monotonic()` by which the body must be read, too.
            patience_s: Longest silence.
        Raises:
            OSError: Not connected, cut off, or too late (TimeoutError).
            http.client.HTTPException: Not an HTTP answer.
        """
        if self._answer is not None:
            self._answer.close()
            self._answer = None  # whatever happens now, the connection is not to be kept for it
        sock = self._sock or self._connect(deadline, patience_s)
        sock.deadline, sock.patience_s = deadline, patience_s
        self._http.request(method, path, body, dict(headers))
        self._answer = HttpAnswer(self._http.getresponse(), sock)
        return self._answer

    @property
    def can_be_reused(self) -> bool:
        """Whether the last answer was read to its end."""
        return self._answer is not None and self._answer.is_complete

    @property
    def is_stale(self) -> bool:
        """Whether an idle connection was closed by the server, or has something on it that nobody asked for."""
        assert self._sock is not None
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def cancel(self) -> None:
        """Cut the connection, so that a blocked call of another thread fails at once. Idempotent."""
        self._is_cancelled = True
        if (sock := self._sock) is not None:
            sock.cut()

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._answer is not None:
            self._answer.close()
        self._http.close()
        if self._sock is not None:
            self._sock.close()

    def _connect(self, deadline: float, patience_s: float) -> DeadlineSocket:
        """Try each address of the host, each with its share of the time."""
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for num_left, (family, kind, protocol, _, location) in zip(range(len(found), 0, -1), found, strict=True):
            sock = self._sock = DeadlineSocket(family, kind, protocol)
            sock.deadline, sock.patience_s = deadline, patience_s / num_left
            if self._is_cancelled:  # before there was a socket to cut
                sock.cut()
            try:
                sock.connect(location)
                break
            except OSError:
                sock.close()
                if num_left == 1:
                    raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._http.sock = sock
        return sock


class ConnectionPool:
    """Idle connections. Thread-safety: any thread."""

    def __init__(self) -> None:
        # Guards _idle, _is_closed.
        self._lock = threading.Lock()
        self._idle: list[NodeConnection] = []  # longest idle first
        self._is_closed = False

    def acquire(self, address: str, *, fresh: bool = False) -> NodeConnection:
        """An idle connection to the node that is still alive, or a new one, not yet connected; `fresh`: the latter.

        Raises:
            ValueError: Not an address.
        """
        while not fresh and (connection := self._take_idle(address)) is not None:
            if not connection.is_stale:
                return connection
            connection.close()
        return NodeConnection(address)

    def release(self, connection: NodeConnection) -> None:
        """Keep the connection for the next request if its last answer was read to the end, else close it."""
        surplus = connection
        if connection.can_be_reused:
            with self._lock:
                if not self._is_closed:
                    self._idle.append(connection)
                    ...
