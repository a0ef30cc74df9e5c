"""A port of the loopback that was free a moment ago, for servers that cannot tell which one they took."""

from __future__ import annotations

import contextlib
import random
import socket

# Linux gives clients those from 32,768 on. So no connection takes one of these while a server restarts.
_PORTS = range(10_000, 32_000)


def free_port() -> int:
    """Return a port."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):  # else it is taken
            return port
    raise OSError("no port is free of 100 that were tried")
