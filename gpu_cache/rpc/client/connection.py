"""Kept-alive HTTP connections whose bodies are received straight into the caller's buffers.

`http.client` reads headers; a request is one write, as each wakes the server up. Few, large calls on a blocking socket
receive the bodies: beside a busy Python thread each call costs up to 5 ms, the time to get the interpreter back.
Source: our measurement over loopback, 0.6 to 1.7 GB/s this way beside such a thread, 0.01 with one call a shard.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import ipaddress
import os
import re
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gpu_cache.process import forget_sockets, leave_to_parent
from gpu_cache.rpc.shard import INCARNATION_HEADER, MAX_INCARNATION, REMOVALS_HEADER, RETRY_AFTER_MS_HEADER
from gpu_cache.rpc.wire.records import MEMORY_HEADER

_BYTES_RECEIVED = struct.Struct("@128xQ")  # in Linux's `struct tcp_info`
ResultT = TypeVar("ResultT")

_SHORTEST_S = 1e-3  # the shortest time-out: to the kernel, zero means none
_LATE = 1 / 32  # by this part of the time that is left a call may end too late, so that few calls set a time-out
_LONGEST_S = 1e6  # a longer time is no limit, and the kernel's numbers end somewhere


class DeadlineSocket(socket.socket):
    """A blocking socket that never blocks for long.

    The time-outs are the kernel's: one of Python's would make the socket non-blocking, and `MSG_WAITALL` useless.
    `http.client` reads through it like through any other.

    Attributes:
        deadline: The end of all calls together, as by `time.monotonic()`.
        patience_s: The longest wait of one call, in seconds.
    Raises:
        TimeoutError: Either passed. By any call.
        ConnectionAbortedError: It was cut off. By any call that begins then; one under way may find the end instead.
    Thread-safety: one thread; `cut` and `close` from any.
    """

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.deadline = self.patience_s = self._timeout_s = 0.0
        self._is_cut = False
        # Guards the descriptor: once it is closed, its number may be another file's. Nothing under it blocks.
        self._lock = threading.Lock()
        leave_to_parent(self)

    def disown(self) -> object:
        """Close it in a forked child, where the lock may be held for good; the parent's connection goes on."""
        forget_sockets([self.fileno()])
        return self

    def cut(self) -> None:
        """Make the call under way fail at once, and every later one. Idempotent."""
        self._is_cut = True
        with self._lock, contextlib.suppress(OSError):  # closed before, or not connected yet
            self._set_timeout(0)  # for a call that has looked at _is_cut and not yet begun
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As of any socket."""
        with self._lock:
            super().close()

    @property
    def num_received(self) -> int | None:
        """Bytes that came so far, as the kernel counts them, also while a call blocks; None where it does not say."""
        with self._lock, contextlib.suppress(OSError, struct.error):  # closed; an older kernel
            return int(_BYTES_RECEIVED.unpack_from(self.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))[0])
        return None

    def connect(self, address: Any, /) -> None:
        """As of any socket, in time."""
        self._in_time(super().connect if self.family == socket.AF_UNIX else self._connect, address)

    def _connect(self, address: Any) -> None:
        """Begin to connect, and wait: a signal would end the kernel's time-out of one blocking call.

        Raises:
            BlockingIOError: Not connected in time.
        """
        self.setblocking(False)
        code = self.connect_ex(address)
        if code == errno.EINPROGRESS:
            if self._is_cut:  # looked at after the begin: from here on a cut wakes the wait
                raise ConnectionAbortedError("cut off by another thread")
            waiting = select.poll()
            waiting.register(self, select.POLLOUT)
            left_s = min(self.deadline - time.monotonic(), self.patience_s, _LONGEST_S)
            if not waiting.poll(max(left_s, _SHORTEST_S) * 1000):
                raise BlockingIOError
            code = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self.setblocking(True)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """As of any socket, in time."""
        left = memoryview(data)
        while left:
            left = left[self._in_time(super().send, left, flags) :]

    def wait(self) -> None:
        """Wait for the next byte, or the end, without taking it; in time."""
        self._in_time(super().recv, 1, socket.MSG_PEEK)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As of any socket, in time."""
        return self._in_time(super().recv_into, buffer, nbytes, flags)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> tuple[int, list[Any], int, Any]:
        """As of any socket, in time."""
        return self._in_time(super().recvmsg_into, buffers, ancbufsize, flags)

    def _in_time(self, call: Callable[..., ResultT], *args: Any) -> ResultT:
        left_s = min(self.deadline - time.monotonic(), self.patience_s)
        if left_s <= 0:
            raise TimeoutError("no time is left")
        if not left_s <= self._timeout_s <= left_s * (1 + _LATE):
            self._set_timeout(left_s)
        if self._is_cut:
            raise ConnectionAbortedError("cut off by another thread")
        try:
            return call(*args)
        except BlockingIOError:
            raise TimeoutError(f"nothing happened within {left_s:.3g} s") from None

    def _set_timeout(self, seconds: float) -> None:
        whole = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        timeval = struct.pack("@ll", int(whole), int(whole % 1 * 1e6))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        self._timeout_s = seconds


# The most buffers of one call: IOV_MAX of Linux is 1,024.
_MAX_BUFFERS = 1000
# A text is read in pieces of so many bytes: a length that was only announced must not cost memory.
_PIECE_BYTES = 1 << 20
_RETRY_AFTER_DATE_S = 1.0
# The kernel asks after an idle peer: a NAT in between remembers the connection, and a dead one is known after a minute.
# The kernel also gives up a request that was not even acknowledged.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


_ADDRESS = re.compile(r"(?:\[([^\[\]/\s]+)\]|([^\[\]/@?#\s]+)):([0-9]{1,5})")


class AddressError(ValueError):
    """Not an address."""


class BrokenOffError(http.client.HTTPException):
    """Headers that broke off, or an answer that does not say where it ends; the two cannot be told apart."""


class HttpAnswer:
    """The answer to one request: status, headers, and a body that is read exactly once.

    Attributes:
        incarnation: Which server answered; "" where it does not say.
        memory: Where processes of its host ask for shared memory, as it announces that.
        removals: How often its owner has removed shards, as it says; "" where it does not.
        unread_bytes: Bytes of the body still to read; -1 where it comes in chunks.
        ends_connection: Whether the server closes the connection behind it.
    Raises:
        BrokenOffError: Nothing says where the body ends.
    """

    def __init__(self, response: http.client.HTTPResponse, sock: DeadlineSocket) -> None:
        self.status = response.status
        self.content_type = response.headers.get_content_type()
        self.incarnation = response.headers.get(INCARNATION_HEADER, "")[:MAX_INCARNATION]
        self.memory = response.headers.get(MEMORY_HEADER, "")
        self.removals = response.headers.get(REMOVALS_HEADER, "")[:MAX_INCARNATION]
        self.unread_bytes = -1 if response.length is None else response.length
        self.ends_connection = response.will_close
        self._response, self._sock = response, sock
        if response.length is None and not response.chunked:
            raise BrokenOffError("an answer that does not say where it ends")
        self._is_ahead = True  # http.client may have read more than the headers

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks to wait; None where it does not. A date is too coarse to be computed with."""
        headers = self._response.headers
        exactly, told = headers.get(RETRY_AFTER_MS_HEADER, ""), headers.get("Retry-After")
        if exactly.isdecimal():
            return float(exactly) / 1000
        if told is None:
            return None
        return float(told) if told.isdecimal() else _RETRY_AFTER_DATE_S

    def read(self, nbytes: int) -> bytearray:
        """The next `nbytes` of a body of known length. Raises as `fill` does."""
        body = bytearray(nbytes)
        self.fill([memoryview(body)] if nbytes else [])
        return body

    def read_rest(self, limit: int) -> bytearray:
        """The rest of the body, `limit` bytes of it at most. Raises as `fill` does, or `http.client.HTTPException`."""
        body = bytearray()
        while self.unread_bytes and len(body) < limit:
            wanted = min(limit - len(body), _PIECE_BYTES)
            if self.unread_bytes > 0:
                body += self.read(min(wanted, self.unread_bytes))
            elif piece := self._response.read1(wanted):  # `read` takes a chunk of -1 bytes to mean: to the end
                body += piece
            else:
                self.unread_bytes = 0
        return body

    def fill(self, left: list[memoryview]) -> None:
        """Receive the next bytes of the body into buffers until all are full.

        Args:
            left: The buffers, each with room for a byte or more, the next one last. Full buffers are taken away: after
                a failure, this is what is still to come.
        Raises:
            ConnectionError: The body ended early.
            TimeoutError: No more of it came in time.
            ValueError: The body has not so many bytes left.
        """
        wanted = sum(map(len, left))
        if wanted > self.unread_bytes:
            raise ValueError(f"{wanted:,} bytes wanted of a body that has {self.unread_bytes:,} left")
        if left and self._is_ahead:
            self._take_read_ahead(left, wanted)
        while left:
            self._receive(left)

    def _take_read_ahead(self, left: list[memoryview], wanted: int) -> None:
        """Copy what came along with the headers."""
        num_ahead = len(self._response.fp.peek())
        taken = memoryview(self._response.fp.read(min(num_ahead, wanted)))
        self._is_ahead = len(taken) < num_ahead
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
        """Account for `count` bytes that the first buffers have got."""
        self.unread_bytes -= count
        while count:
            buffer = left.pop()
            if count < len(buffer):
                left.append(buffer[count:])
            count -= min(count, len(buffer))


class NodeConnection:
    """One connection to one node.

    Attributes:
        idle_since: When its pool got it back, as by `time.monotonic()`; None while it is in use.
    Raises:
        AddressError: Not an address.
    Thread-safety: one thread; `cancel` from any.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.idle_since: float | None = None
        self._host, self._port = split_address(address)
        self._authority = f"{_as_in_url(self._host)}:{self._port}"
        self._sock: DeadlineSocket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._answer: HttpAnswer | None = None
        self._is_cancelled = False

    def request(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        deadline: float,
        patience_s: float,
        first_patience_s: float | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> HttpAnswer:
        """Send a request and read the answer's headers, connecting first if need be.

        Args:
            method: Such as "POST".
            path: Where to.
            body: The bytes to send.
            headers: Further ones.
            deadline: As by `time.monotonic()`, for the body of the answer too.
            patience_s: The longest silence, in seconds.
            first_patience_s: The longest wait for the first byte of the answer; None: as long as any.
            meanwhile: Work of the caller that may be done while the server prepares its answer.
        Raises:
            OSError: Not connected, cut off, or too late (TimeoutError).
            http.client.HTTPException: Not an HTTP answer.
        """
        if self._response is not None:
            self._response.close()
        self._answer = self.idle_since = None  # so that the connection is not kept if this request fails
        sock = self._sock or self._connect(deadline, patience_s)
        sock.deadline, sock.patience_s = deadline, patience_s if first_patience_s is None else first_patience_s
        named = {"Host": self._authority, "Accept-Encoding": "identity", "Content-Length": str(len(body)), **headers}
        head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
        sock.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        meanwhile()
        if first_patience_s is not None:
            sock.wait()
            sock.patience_s = patience_s
        self._response = http.client.HTTPResponse(sock, method=method)
        self._response.begin()
        self._answer = HttpAnswer(self._response, sock)
        return self._answer

    @property
    def can_be_reused(self) -> bool:
        """Whether the last answer was read to its end."""
        answer = self._answer
        return answer is not None and answer.unread_bytes == 0 and not answer.ends_connection

    @property
    def is_stale(self) -> bool:
        """Whether the server has closed an idle connection, or sent bytes that the client did not ask for."""
        assert self._sock is not None
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    @property
    def num_received(self) -> int | None:
        """Bytes that came over it so far; any thread."""
        return None if (sock := self._sock) is None else sock.num_received

    def cancel(self) -> None:
        """Cut the connection, so that a blocked call of another thread fails at once. Idempotent."""
        self._is_cancelled = True
        if (sock := self._sock) is not None:
            sock.cut()

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._response is not None:
            self._response.close()
        if self._sock is not None:
            self._sock.close()

    def _connect(self, deadline: float, patience_s: float) -> DeadlineSocket:
        """Connect; that there was no descriptor is told from that the node was not there."""
        try:
            return self._connect_anywhere(deadline, patience_s)
        except socket.gaierror as error:
            if _has_descriptor():
                raise
            raise out_of_descriptors(str(error)) from error
        except OSError as error:
            if is_out_of_descriptors(error):
                raise out_of_descriptors(str(error.strerror)) from error
            raise

    def _connect_anywhere(self, deadline: float, patience_s: float) -> DeadlineSocket:
        """Try the addresses of the host in turn, each for its share of the time."""
        *others, last = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        share_s = patience_s / (len(others) + 1)
        for family, _, _, _, location in others:
            with contextlib.suppress(OSError):
                return self._connect_to(family, location, deadline, share_s)
        return self._connect_to(last[0], last[4], deadline, share_s)

    def _connect_to(self, family: int, location: object, deadline: float, patience_s: float) -> DeadlineSocket:
        sock = self._sock = DeadlineSocket(family)
        sock.deadline, sock.patience_s = deadline, patience_s
        try:
            if self._is_cancelled:  # when there was no socket to cut
                raise ConnectionAbortedError("cut off by another thread")
            sock.connect(location)
        except BaseException:
            sock.close()
            raise
        for option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *_KEEPALIVE):
            sock.setsockopt(*option)
        return sock


def max_descriptors() -> int:
    """How many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def is_out_of_descriptors(error: BaseException) -> bool:
    """Whether this process, or this machine, had none left; no node has to do with that."""
    return isinstance(error, OSError) and error.errno in _OUT_OF_DESCRIPTORS


def out_of_descriptors(why: str) -> OSError:
    """An error that says so."""
    limit = f"this process may have {max_descriptors():,} file descriptors, raise that (RLIMIT_NOFILE, ulimit -n)"
    return OSError(errno.EMFILE, f"{why}; {limit}")


def _has_descriptor() -> bool:
    """Whether one is left. The resolver does not tell: it says that the host is unknown."""
    try:
        socket.socket().close()
    except OSError as error:
        return not is_out_of_descriptors(error)
    return True


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port".

    Raises:
        AddressError: Not such an address.
    """
    found = _ADDRESS.fullmatch(address)
    host, port = (found[1] or found[2], int(found[3])) if found else ("", 0)
    if not (0 < port <= 0xFFFF and _is_name(host)):
        raise AddressError(f"{address!r} is not an address: write host:port or [ipv6]:port")
    return host, port


def _as_in_url(host: str) -> str:
    """A host as `Host` has it: IPv6 in brackets and without its zone, a name in ASCII."""
    return f"[{host.partition('%')[0]}]" if ":" in host else host.encode("idna").decode()


def _is_name(host: str) -> bool:
    """Whether a resolver takes it: no part between its dots is empty, or has more than 63 letters."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


@functools.lru_cache(1024)  # of each read; there are few nodes
def is_numeric(address: str) -> bool:
    """Whether an owner's address has an IP address for its host. A name needs a resolver, which nothing ends."""
    try:
        ipaddress.ip_address(split_address(address)[0])
    except (ValueError, TypeError):  # the connection says what is wrong with it
        return False
    return True
