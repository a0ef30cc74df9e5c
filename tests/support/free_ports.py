"""Ports of the loopback that were free a moment ago, for servers that cannot tell which one they took."""

from __future__ import annotations

import contextlib
import socket


def free_ports(number: int) -> list[int]:
    """Return distinct ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]
