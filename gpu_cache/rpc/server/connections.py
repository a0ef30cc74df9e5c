"""The connections of one server: bounded in number, and none of them may wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Any, cast

from aiohttp import web

# One check of the clock serves all connections.
_PERIOD_S = 1.0
_LOG_PERIOD_S = 60.0
# A client that means it sends something within this, and is not closed for the sake of others.
_PROMPT_S = 1.0
# The part of the process's descriptors that connections leave to others.
_RESERVED_SHARE = 8
# More descriptors than any server keeps connections.
_MAX_DESCRIPTORS = 1 << 16
# So much of a response may wait in the transport; the handler of a longer one waits for the client.
UNREAD_BYTES = 16 << 10
# A peer that is gone is found within about a minute, and a NAT between sees that the connection is in use.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}

logger = logging.getLogger(__name__)


class Stage(enum.Enum):
    """The states of a connection."""

    HEADER = enum.auto()  # it has sent no request yet, or a part of a header
    IDLE = enum.auto()  # between two requests
    RECEIVING = enum.auto()  # a body is on its way
    ANSWERING = enum.auto()


class Connections:
    """Which connections there are, what they are doing, and since when.

    Args:
        max_connections: Beyond these the connection that has done nothing for longest makes room.
        header_timeout_s: The longest time from the start, or from a request's first byte, to the end of its header.
        idle_timeout_s: The longest time between two requests.
        now: Seconds, monotonic.
    Thread-safety: one thread, the event loop's.
    """

    def __init__(
        self,
        max_connections: int,
        header_timeout_s: float,
        idle_timeout_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.idle_timeout_s = idle_timeout_s
        self._max_connections, self._now = max_connections, now
        self._patience_s = {Stage.HEADER: header_timeout_s, Stage.IDLE: idle_timeout_s}
        self._num_fitting = max_connections  # as the descriptors allow, when that was last seen
        self._stage: dict[web.RequestHandler, Stage] = {}
        self._since: dict[Stage, dict[web.RequestHandler, float]] = {stage: {} for stage in Stage}  # longest ago first
        self._num_unsaid, self._says_at = 0, float("-inf")

    def __len__(self) -> int:
        return len(self._stage)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(found):,} {stage.name.lower()}" for stage, found in self._since.items())
        return f"Connections({counts})"

    def admit(self, connection: web.RequestHandler, descriptor: int) -> None:
        """Enter a new connection, and close others, or it, if there are too many."""
        self._stage[connection] = Stage.HEADER
        self._since[Stage.HEADER][connection] = self._now()
        if descriptor >= _usable_descriptors():  # the system gives the lowest free one: as many are in use
            self._num_fitting = len(self) - 1
        num_over = len(self) - min(self._max_connections, self._num_fitting)
        for victim in list(islice(self._spare(), max(num_over, 0))):
            self._abort(victim)

    def enter(self, connection: web.RequestHandler, stage: Stage) -> None:
        """Note what a connection does from now on; does nothing for one that is gone."""
        if (previous := self._stage.get(connection)) is not None:
            del self._since[previous][connection]
            self._stage[connection] = stage
            self._since[stage][connection] = self._now()

    def hear(self, connection: web.RequestHandler) -> None:
        """Bytes came: of an idle connection these begin a header."""
        if self._stage.get(connection) is Stage.IDLE:
            self.enter(connection, Stage.HEADER)

    def forget(self, connection: web.RequestHandler) -> None:
        """A connection is gone. Idempotent."""
        if (stage := self._stage.pop(connection, None)) is not None:
            del self._since[stage][connection]

    def close_overdue(self) -> None:
        """Close connections whose header, or whose next request, takes too long."""
        now = self._now()
        self._num_fitting += self._num_fitting < self._max_connections
        for stage, patience_s in self._patience_s.items():
            overdue = [one for one, since in self._since[stage].items() if since + patience_s < now]
            for connection in overdue:
                self._abort(connection)
        self._say(now)

    async def watch(self) -> None:
        """Close what is overdue, for as long as the server runs."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.close_overdue()

    async def settle(self, grace_s: float) -> None:
        """Close every connection: idle and slow ones now, those that are served after it or when the time is up."""
        until, prompt_since = self._now() + grace_s, self._now() - _PROMPT_S
        for connection, stage in list(self._stage.items()):
            if stage in (Stage.HEADER, Stage.IDLE):
                connection.force_close()
            elif stage is Stage.RECEIVING and self._since[stage][connection] < prompt_since:
                self._abort(connection, is_said=False)
            else:
                connection.close()
        while self._stage and self._now() < until:
            await asyncio.sleep(0.01)
        for connection in list(self._stage):
            self._abort(connection, is_said=False)

    def _spare(self) -> Iterator[web.RequestHandler]:
        """Connections that can make room, in that order: silent, idle, then those that came just now."""
        prompt_since = self._now() - _PROMPT_S
        hurried = [self._since[Stage.HEADER], self._since[Stage.RECEIVING]]
        for waiting in hurried:
            yield from (one for one, _ in takewhile(lambda item: item[1] < prompt_since, waiting.items()))
        yield from self._since[Stage.IDLE]
        for waiting in reversed(hurried):
            yield from (one for one, since in waiting.items() if since >= prompt_since)

    def _abort(self, connection: web.RequestHandler, *, is_said: bool = True) -> None:
        self._num_unsaid += is_said
        self.forget(connection)
        if connection.transport is not None:
            connection.transport.abort()

    def _say(self, now: float) -> None:
        if self._num_unsaid and now >= self._says_at:
            logger.warning(
                "closed %d connections that were silent or slow, or had to make room; now %r", self._num_unsaid, self
            )
            self._num_unsaid, self._says_at = 0, now + _LOG_PERIOD_S


class Connection(web.RequestHandler):
    """One connection, which says what it is doing.

    Args:
        connections: Those of its server.
        server: aiohttp's.
        options: As of `web.RequestHandler`.
    """

    __slots__ = ("_connections",)

    def __init__(self, connections: Connections, server: web.Server, **options: Any) -> None:
        super().__init__(server, keepalive_timeout=connections.idle_timeout_s, **options)
        self._connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=UNREAD_BYTES)  # uvloop's is no subclass
        use_reno_within_host(transport)
        self._connections.admit(self, transport.get_extra_info("socket").fileno())

    def data_received(self, data: bytes) -> None:
        if data:
            self._connections.hear(self)
        super().data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        self._connections.forget(self)
        super().connection_lost(error)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request, without its words: aiohttp would log headers, and one of them may be a token."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        logger.debug("no request in HTTP/1.1 from %s: %s", request.remote, type(exc).__name__)
        response = web.json_response({"status": "error", "message": "not a request in HTTP/1.1"}, status=status)
        response.force_close()
        return response


def find_dead_peers(listener: socket.socket) -> None:
    """Let the kernel find peers that are gone, on the connections that a listener accepts: they inherit its options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        with contextlib.suppress(OSError, AttributeError):  # not on this platform
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def use_reno_within_host(transport: asyncio.BaseTransport) -> None:
    """Use reno for a connection whose two ends are on one host."""
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if peer and own and peer[0] == own[0]:
        use_reno(transport.get_extra_info("socket"))


def use_reno(connection: socket.socket) -> None:
    """Between two processes of one host there is no network to model, and bbr's pacing only costs.

    Source: our measurement over loopback, 5.5 GB/s with reno and 2.3 with bbr, the default on some machines.
    """
    with contextlib.suppress(OSError):  # not offered by this kernel, or not to this user
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may, 65,536 at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # not to this process; then there are fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _usable_descriptors() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit - limit // _RESERVED_SHARE
