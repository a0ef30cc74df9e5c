"""A socket whose calls end: by a deadline, after a silence, or when another thread cuts it off."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from gpu_cache.process import forget_sockets, leave_to_parent

_BYTES_RECEIVED = struct.Struct("@128xQ")  # of Linux's `struct tcp_info`
ResultT = TypeVar("ResultT")

_SHORTEST_S = 1e-3  # of a time-out: to the kernel, zero means none
_LONGEST_S = 1e6  # what is longer is no limit, and the kernel's numbers end somewhere


class DeadlineSocket(socket.socket):
    """A blocking socket that never blocks for long.

    The time-outs are the kernel's: one of Python's would make the socket non-blocking, and `MSG_WAITALL` useless.
    `http.client` reads through it like through any other.

    Attributes:
        deadline: Of all calls together, as by `time.monotonic()`.
        patience_s: The longest wait of one call, in seconds.
    Raises:
        TimeoutError: Either passed. By any call.
        ConnectionAbortedError: It was cut off. By any call that begins then; one under way may find the end instead.
    Thread-safety: one thread; `cut` and `close` from any.
    """

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.deadline = self.patience_s = 0.0
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
        self._in_time(super().connect, address)

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
