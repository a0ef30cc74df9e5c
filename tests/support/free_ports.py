"""Ports of the loopback that were free a moment ago, for servers that cannot tell which one they took."""

from __future__ import annotations

import contextlib
import random
import socket

# Linux gives clients those from 32,768 on. So no connection takes one of these while a server restarts.
_PORTS = range(10_000, 32_000)


def free_ports(number: int) -> list[int]:
    """Return distinct ports."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(_PORTS, 100):
            with contextlib.suppress(OSError):  # taken
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == number:
                return found
    raise OSError(f"no {number} ports are free of 100 that were tried")
