"""The raw limit: bytes from one buffer to another through one tuned socket, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

# As large as the server's writes: larger ones gain nothing.
_WRITE_BYTES = 1 << 20
_READ_BYTES = 16 << 20
_REQUEST = struct.Struct("<Q")  # how many bytes to send


class RawSender:
    """Sends the first bytes of a buffer to whoever asks, on a thread of its own. A context manager.

    Args:
        source: What is sent.
    Attributes:
        location: Host and port.
    """

    def __init__(self, source: memoryview) -> None:
        self._source = source
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.location: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._serve, name="raw-sender", daemon=True)
        self._thread.start()

    def __enter__(self) -> RawSender:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        """One connection; ends when the receiver closes it."""
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            with connection:
                tune(connection)
                while request := connection.recv(_REQUEST.size, socket.MSG_WAITALL):
                    (wanted,) = _REQUEST.unpack(request)
                    for start in range(0, wanted, _WRITE_BYTES):
                        connection.sendall(self._source[start : min(start + _WRITE_BYTES, wanted)])


class RawReceiver:
    """The other end.

    Args:
        location: Of the sender.
    """

    def __init__(self, location: tuple[str, int]) -> None:
        self._socket = socket.create_connection(location)
        tune(self._socket)

    def receive(self, target: memoryview) -> None:
        """Fill `target`.

        Raises:
            ConnectionError: The sender is gone.
        """
        self._socket.sendall(_REQUEST.pack(len(target)))
        at = 0
        while at < len(target):
            count = self._socket.recv_into(target[at : at + _READ_BYTES])
            if not count:
                raise ConnectionError(f"the raw sender closed the connection at {at:,} of {len(target):,} bytes")
            at += count

    def close(self) -> None:
        """Close the connection, which ends the sender's thread too."""
        self._socket.close()


def tune(connection: socket.socket) -> None:
    """No delay, and reno: bbr, the default on some machines, paces what needs no pacing within one host."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not offered by this kernel, or not to this user
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
