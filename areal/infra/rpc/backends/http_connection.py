"""Kept-alive HTTP connections whose bodies are received straight into the caller's buffers.

`http.client` writes requests and reads headers; bodies are received by few, large calls on a blocking socket: beside a
busy Python thread every call costs up to 5 ms, the time to get the interpreter back.
Source: our measurement over loopback, 0.6 to 1.7 GB/s this way beside such a thread, 0.01 with one call a shard.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence

# The most buffers of one call: IOV_MAX of Linux is 1,024.
_MAX_BUFFERS = 1000


class HttpAnswer:
    """The answer to one request: status, headers, and a body that is read exactly once."""

    def __init__(self, response: http.client.HTTPResponse, sock: socket.socket, deadline: float) -> None:
        self.status = response.status
        self.content_type = response.headers.get_content_type()
        self.retry_after_s = _seconds(response.headers.get("Retry-After"))
        self._response, self._sock, self._deadline = response, sock, deadline
        self.unread_bytes = -1 if response.length is None else response.length

    @property
    def is_read(self) -> bool:
        """Whether the body was read to its end, so that the connection can serve another request."""
        if self.unread_bytes == 0:
            self._response.close()  # else http.client would wait for it to be read
        return self.unread_bytes == 0 and not self._response.will_close

    def read(self, nbytes: int | None = None) -> bytes:
        """The next `nbytes` of the body; None: the rest."""
        if self.unread_bytes < 0:  # chunked, or until the connection closes
            rest = self._response.read()
            self.unread_bytes = 0
            return rest
        body = bytearray(self.unread_bytes if nbytes is None else nbytes)
        self.read_into([memoryview(body)])
        return bytes(body)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the next bytes of the body.

        Raises:
            ConnectionError: The body ended early.
            TimeoutError: The deadline passed.
        """
        left = [buffer for buffer in buffers if len(buffer)]
        wanted = sum(map(len, left))
        if wanted > self.unread_bytes:
            raise ConnectionError(f"{wanted:,} bytes wanted of a body that has {self.unread_bytes:,} left")
        left.reverse()  # the next one last
        self._take_read_ahead(left)
        while left:
            self._receive(left)

    def _take_read_ahead(self, left: list[memoryview]) -> None:
        """Copy what came along with the headers."""
        ahead = self._response.fp.peek() if left else b""
        wanted = min(len(ahead), sum(map(len, left)))
        taken = memoryview(self._response.fp.read(wanted) if wanted else b"")
        while taken:
            buffer = left.pop()
            count = min(len(buffer), len(taken))
            buffer[:count] = taken[:count]
            taken = taken[count:]
            if count < len(buffer):
                left.append(buffer[count:])
        self.unread_bytes -= wanted

    def _receive(self, left: list[memoryview]) -> None:
        """One call; fills as many buffers as it takes, waiting for all of them."""
        batch = left[: -_MAX_BUFFERS - 1 : -1]
        set_timeout(self._sock, self._deadline - time.monotonic())
        try:
            if len(batch) == 1:
                count = self._sock.recv_into(batch[0], 0, socket.MSG_WAITALL)
            else:
                count = self._sock.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise TimeoutError(f"{self.unread_bytes:,} bytes of the body had not come in time") from None
        if not count:
            raise ConnectionError(f"the connection ended {self.unread_bytes:,} bytes before the body did")
        self.unread_bytes -= count
        while count:
            buffer = left.pop()
            if count < len(buffer):
                left.append(buffer[count:])
            count -= min(count, len(buffer))


class NodeConnection:
    """One connection to one node. One thread at a time; `cancel` from any."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_reused = False
        self._host, self._port = split_address(address)
        self._http: http.client.HTTPConnection | None = None
        self._answer: HttpAnswer | None = None

    def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], deadline: float
    ) -> HttpAnswer:
        """Send a request and read the answer's headers, connecting first if need be.

        Raises:
            OSError: Not connected, cut off, or too late (TimeoutError).
            http.client.HTTPException: Not an HTTP answer.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no time is left")
        if self._http is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=left_s)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.settimeout(None)  # a time-out of Python's would make the socket non-blocking
            self._http = connection
        set_timeout(self._http.sock, left_s)
        sock = self._http.sock
        try:
            self._http.request(method, path, body, dict(headers))
            response = self._http.getresponse()
        except (BlockingIOError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise TimeoutError("no answer in time") from error
            raise
        self._answer = HttpAnswer(response, sock, deadline)
        return self._answer

    @property
    def can_be_reused(self) -> bool:
        """Whether the last answer was read to its end."""
        return self._http is not None and self._answer is not None and self._answer.is_read

    def cancel(self) -> None:
        """Cut the connection, so that a blocked read of another thread fails at once. Idempotent."""
        http_connection = self._http
        sock = None if http_connection is None else http_connection.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # not connected any more
                return

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._http is not None:
            self._http.close()
            self._http = None


class ConnectionPool:
    """Idle connections by node. Thread-safety: any thread."""

    def __init__(self) -> None:
        # Guards _idle, _is_closed.
        self._lock = threading.Lock()
        self._idle: dict[str, list[NodeConnection]] = {}
        self._is_closed = False

    def acquire(self, address: str, *, fresh: bool = False) -> NodeConnection:
        """An idle connection to the node, or a new one, not yet connected."""
        with self._lock:
            idle = self._idle.get(address)
            if idle and not fresh:
                connection = idle.pop()
                connection.is_reused = True
                return connection
        return NodeConnection(address)

    def release(self, connection: NodeConnection) -> None:
        """Keep the connection for the next request if its last answer was read to the end, else close it."""
        with self._lock:
            is_kept = connection.can_be_reused and not self._is_closed
            if is_kept:
                self._idle.setdefault(connection.address, []).append(connection)
        if not is_kept:
            connection.close()

    def forget(self, address: str) -> None:
        """Close the idle connections to a node: one of them turned out to be dead."""
        with self._lock:
            idle = self._idle.pop(address, [])
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close what is idle, and what comes back from now on. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in idle:
            connection.close()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port".

    Raises:
        ValueError: Not such an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address!r} is not an address: write host:port or [ipv6]:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Let blocking calls fail with BlockingIOError after so long, while the socket stays a blocking one."""
    whole = max(seconds, 1e-3)
    timeval = struct.pack("@ll", int(whole), int(whole % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _seconds(header: str | None) -> float | None:
    """The delay of a Retry-After header in its numeric form."""
    return float(header) if header is not None and header.isdecimal() else None
