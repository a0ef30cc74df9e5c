"""The `/data` routes: shards over HTTP, in upstream's JSON form and in the binary one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import struct
import termios
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from gpu_cache.hosts import HostRule
from gpu_cache.rpc.server import requests, same_host
from gpu_cache.rpc.server.answers import Answer, json_answer
from gpu_cache.rpc.server.connections import UNREAD_BYTES, Connections, Stage
from gpu_cache.rpc.server.expiry import ShardExpiry
from gpu_cache.rpc.server.requests import (
    DEFAULT_MAX_BODY_BYTES,
    DEFAULT_MAX_RESPONSES,
    DataOwner,
    RefusedError,
    check_length,
    check_token,
    listed_ids,
)
from gpu_cache.rpc.server.same_host import SameHostServer
from gpu_cache.rpc.server.turns import Place, Turns
from gpu_cache.rpc.shard import INCARNATION_HEADER, REMOVALS_HEADER
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import CONTENT_TYPE
from gpu_cache.rpc.wire.records import MAX_IDS_BYTES

if TYPE_CHECKING:  # the names differ between releases of aiohttp
    from aiohttp.typedefs import Handler, Middleware

# How often the places are looked at: each whose client takes nothing is freed within ten of these, if others wait.
_WATCH_S = 1.0
# So much of a body has to come in each `body_timeout_s`.
_BODY_PROGRESS_BYTES = 64 << 10
# Longer lists of ids are parsed by a thread, one at a time, and answers about more shards are laid out by one. For less
# work a thread would hold the GIL to its end too, and add two switches.
_PARSED_AT_ONCE_BYTES = 256 << 10
_LAID_OUT_AT_ONCE = 4096
# Larger writes only move the same bytes through the loop's buffer in one go; smaller ones cost more system calls.
_WRITE_BYTES = 1 << 20
# Bytes that may wait in the transport (large parts by reference): the loop sends them without a turn for each write.
_AHEAD_BYTES = 8 << 20

logger = logging.getLogger(__name__)


def make_app(
    owner: DataOwner,
    *,
    token: str | None,
    rule: HostRule,
    connections: Connections,
    body_timeout_s: float,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_responses: int = DEFAULT_MAX_RESPONSES,
    expiry: ShardExpiry | None = None,
    incarnation: str | None = None,
    memory: SameHostServer | None = None,
) -> web.Application:
    """Build the application. It names its incarnation, a random id, in `/health` and in a header of every answer.

    Args:
        owner: The owner of the served shards. Its methods are called on threads of the loop's executor.
        token: Every route but `/health` asks for it as `Authorization: Bearer`; None asks for nothing.
        rule: Under which names it may be asked, and from which web pages.
        connections: Learns what each connection is doing.
        body_timeout_s: The longest time in which 64 KiB of a request's body may come, or the rest of it.
        max_body_bytes: The longest request body; a longer one is answered 413.
        max_responses: Answers with tensors under way at once; clients beyond get 503 with Retry-After.
        expiry: Drops old shards while the application runs; None: they stay until they are cleared.
        incarnation: Its incarnation; None: makes one up.
        memory: Serves the same shards to processes of this host, and is announced to them.
    """
    middlewares: list[Middleware] = [_noting(connections), _errors_as_json, _asked_under(rule)]
    if token is not None:
        middlewares.append(_bearer_auth(token))
    app = web.Application(middlewares=middlewares)
    if expiry is not None:
        app.cleanup_ctx.append(expiry.sweeping)
    incarnation = incarnation or uuid.uuid4().hex
    app.on_response_prepare.append(_naming(incarnation, owner.store, memory))
    bodies = _Bodies(connections, body_timeout_s, max_body_bytes)
    routes = _DataRoutes(owner, bodies, Turns(max_responses), incarnation, expiry, memory)
    app.cleanup_ctx.append(routes.watching)
    app.add_routes(
        [
            web.get("/health", routes.health),
            web.post("/data/batch", routes.get_batch),
            web.post("/data/serials", routes.serials),
            web.delete("/data/clear", routes.clear),
            web.post("/data/reclaim", routes.reclaim),
            web.put("/data/{shard_id:(?s:.+)}", routes.put),  # line ends too
            web.get("/data/{shard_id:(?s:.+)}", routes.get, allow_head=False),
        ]
    )
    return app


class _Bodies:
    """Reads the bodies of requests, none of which may be too long or too slow.

    Args:
        connections: Learns which connection a body comes from.
        timeout_s: The longest time for each 64 KiB, or the rest.
        max_nbytes: The longest body.
    """

    def __init__(self, connections: Connections, timeout_s: float, max_nbytes: int) -> None:
        self._connections, self._timeout_s, self._max_nbytes = connections, timeout_s, max_nbytes
        self._parsing = asyncio.Lock()

    async def shard_ids(self, request: web.Request) -> list[Any] | None:
        """The list `shard_ids` of a JSON object, or None where there is no such thing."""
        body = await self.read(request, MAX_IDS_BYTES)
        if len(body) <= _PARSED_AT_ONCE_BYTES:
            return listed_ids(body)
        async with self._parsing:
            return await asyncio.to_thread(listed_ids, body)

    async def read(self, request: web.Request, max_nbytes: int | None = None) -> bytearray:
        """The whole body; refused by its announced length before any of it is read, else as soon as it is too long."""
        limit = self._max_nbytes if max_nbytes is None else min(max_nbytes, self._max_nbytes)
        check_length(request.content_length or 0, limit)
        body = bytearray()
        try:
            if request.content.is_eof():  # it came with the header, if there is one
                body += request.content.read_nowait(-1)
                check_length(len(body), limit)
            else:
                self._connections.enter(request.protocol, Stage.RECEIVING)
                await self._receive(request, body, limit)
                self._connections.enter(request.protocol, Stage.ANSWERING)
        except web.RequestPayloadError as error:
            raise web.HTTPBadRequest(text=f"the body broke off after {len(body):,} bytes") from error
        except RuntimeError:  # aiohttp's, of a connection that closed before the wait for its next bytes
            if request.transport is not None:
                raise
            raise ConnectionResetError(f"the client is gone after {len(body):,} bytes of the body") from None
        return body

    async def _receive(self, request: web.Request, body: bytearray, limit: int) -> None:
        num_seen = 0
        try:
            async with asyncio.timeout(self._timeout_s) as patience:
                while chunk := await request.content.readany():
                    body += chunk
                    check_length(len(body), limit)
                    if len(body) - num_seen >= _BODY_PROGRESS_BYTES:
                        num_seen = len(body)
                        patience.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
                        self._connections.enter(request.protocol, Stage.RECEIVING)
        except TimeoutError:
            message = f"{len(body):,} bytes of the body came, and less than 64 KiB in the last {self._timeout_s:g} s"
            raise web.HTTPRequestTimeout(text=message) from None


class _DataRoutes:
    """The handlers. Encoding, decoding and the owner's methods may take long: they run on threads of the executor."""

    def __init__(
        self,
        owner: DataOwner,
        bodies: _Bodies,
        turns: Turns,
        incarnation: str,
        expiry: ShardExpiry | None,
        memory: SameHostServer | None,
    ) -> None:
        self._owner, self._incarnation, self._expiry, self._memory = owner, incarnation, expiry, memory
        self._bodies = bodies
        # Only the event loop's thread touches what follows.
        self._turns = turns
        # Counts complete answers.
        self._sent_payload_bytes = 0
        self._sent_body_bytes = 0

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "incarnation": self._incarnation,
                "num_responses": self._turns.num_taken,
                "num_busy_refusals": self._turns.num_refusals,
                **self._owner.store.stats(),
                "sent_payload_bytes": self._sent_payload_bytes,
                "sent_body_bytes": self._sent_body_bytes,
                "expired_shards": self._expiry.num_shards if self._expiry else 0,
                "expired_bytes": self._expiry.nbytes if self._expiry else 0,
                **same_host.figures(self._owner.store, self._memory),
            }
        )

    async def put(self, request: web.Request) -> web.Response:
        shard_id = request.match_info["shard_id"]
        body = await self._bodies.read(request)
        await asyncio.to_thread(requests.put, self._owner, shard_id, body, request.content_type)
        return web.json_response({"status": "ok", "shard_id": shard_id})

    async def get(self, request: web.Request) -> web.StreamResponse:
        shard_id = request.match_info["shard_id"]
        with self._turn(request) as place:
            tensor = self._owner.store.get(shard_id)
            if tensor is None:
                return _error(404, f"Shard {shard_id} not found")
            return await self._send(request, json_answer(tensor), place)

    async def get_batch(self, request: web.Request) -> web.StreamResponse:
        shard_ids = requests.ids_to_read(await self._bodies.shard_ids(request))
        is_binary = CONTENT_TYPE in request.headers.get("Accept", "")
        with self._turn(request) as place:
            if is_binary and len(shard_ids) <= _LAID_OUT_AT_ONCE:
                answer = requests.batch_answer(self._owner, shard_ids, is_binary)
            else:
                answer = await asyncio.to_thread(requests.batch_answer, self._owner, shard_ids, is_binary)
            return await self._send(request, answer, place)

    def _turn(self, request: web.Request) -> Place:
        """A turn to answer: for a client whose request is here, until it has taken the answer."""
        place = self._turns.take(id(request.transport))  # a client that is told to come back keeps its connection
        if place is None:
            raise requests.busy(self._turns.num_taken)
        return place

    async def clear(self, request: web.Request) -> web.Response:
        shard_ids = await self._bodies.shard_ids(request)
        return web.json_response(await asyncio.to_thread(requests.clear, self._owner, shard_ids))

    async def serials(self, request: web.Request) -> web.Response:
        shard_ids = await self._bodies.shard_ids(request)
        return web.json_response(await asyncio.to_thread(requests.serials, self._owner, shard_ids))

    async def reclaim(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "trimmed": await asyncio.to_thread(self._owner.trim)})

    async def watching(self, app: object = None) -> AsyncIterator[None]:
        """Free places whose clients take nothing, for as long as an application runs."""
        task = asyncio.create_task(self._watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            for place, seconds in self._turns.stalled():
                logger.warning("gave up an answer whose client took next to nothing for %.1f s", seconds)
                place.abort()

    async def _send(self, request: web.Request, answer: Answer, place: Place) -> web.StreamResponse:
        """Send an answer; returns when the kernel has taken all of it. The place is kept until the client has."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        response = _Whole(status=answer.status, headers={"Content-Type": answer.content_type})
        response.content_length = answer.nbytes
        transport.set_write_buffer_limits(high=_AHEAD_BYTES)
        await response.prepare(request)
        writer = request.writer
        place.send(lambda: writer.output_size, lambda: _left_bytes(transport), transport.abort)
        try:
            await _write(request, transport, response, answer)
            await _drain(request, transport)
        except BaseException:
            # A half-sent body must end in a broken connection: a second answer would be taken for the rest of it.
            transport.abort()
            raise
        self._sent_payload_bytes += answer.payload_nbytes
        self._sent_body_bytes += answer.nbytes if answer.status == 200 else 0
        return response


class _Whole(web.StreamResponse):
    """An answer whose headers go with its first bytes: one system call, which wakes the client once."""

    _send_headers_immediately = False  # aiohttp's, which has no public name for it


async def _write(
    request: web.Request, transport: asyncio.WriteTransport, response: web.StreamResponse, answer: Answer
) -> None:
    groups, num_left, writer = iter(answer.groups), answer.nbytes, request.writer
    while num_left:  # known, so that nothing is done after the last byte: the client may go on by then
        group = await asyncio.to_thread(next, groups) if answer.is_made_in_parts else next(groups)
        num_left -= (nbytes := sum(map(len, group)))
        if len(group) > 1:
            if transport.is_closing():
                raise ConnectionResetError("the client is gone")
            transport.writelines(group)  # aiohttp has no call for that
            writer.output_size += nbytes
            await writer.drain()
            continue
        view = memoryview(group[0])
        for start in range(0, len(view), _WRITE_BYTES):
            await response.write(view[start : start + _WRITE_BYTES])
    await response.write_eof()


async def _drain(request: web.Request, transport: asyncio.WriteTransport) -> None:
    """Wait until next to nothing is left in the transport; raises `ConnectionError` if the client stops taking it."""
    if not transport.is_closing():
        transport.set_write_buffer_limits(high=UNREAD_BYTES)
        await request.writer.drain()
    if transport.is_closing():
        raise ConnectionResetError("the client did not take the answer")


def _left_bytes(transport: asyncio.WriteTransport) -> int:
    """Bytes that the client's host has not confirmed: in the transport, and where the system tells, in the kernel."""
    if transport.is_closing():
        return 0
    in_kernel = bytes(4)
    with contextlib.suppress(OSError, ValueError):  # closed, or not told here
        in_kernel = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
    return transport.get_write_buffer_size() + int(struct.unpack("i", in_kernel)[0])


def _error(status: int, message: str, **more: object) -> web.Response:
    return web.json_response({"status": "error", "message": message, **more}, status=status)


def _naming(
    incarnation: str, store: ShardStore, memory: SameHostServer | None
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    headers = {INCARNATION_HEADER: incarnation, **same_host.headers(memory)}

    async def name(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)
        response.headers[REMOVALS_HEADER] = str(store.num_removals)

    return name


def _noting(connections: Connections) -> Middleware:
    @web.middleware
    async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
        connections.enter(request.protocol, Stage.ANSWERING)
        try:
            return await handler(request)
        finally:
            connections.enter(request.protocol, Stage.IDLE)

    return note


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal and every fault is answered in the one form that clients parse."""
    try:
        return await handler(request)
    except RefusedError as error:
        refused = _error(error.status, str(error))
        refused.headers.update(error.headers)
        return refused
    except web.HTTPException as error:
        error.text, error.content_type = json.dumps({"status": "error", "message": error.text}), "application/json"
        raise
    except ConnectionError as error:
        # The client went away and reads no answer; raised further, aiohttp would log a fault of ours. It keeps
        # the error in a cycle with the request: without the traceback, our frames and their tensors are not in it.
        error.__traceback__ = None
        return _error(499, "client closed the connection")
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return _error(500, str(error))


def _asked_under(rule: HostRule) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = rule.refusal(request.headers.getall("Host", []), request.headers.getall("Origin", []))
        if refusal is not None:
            raise web.HTTPForbidden(text=f"{refusal}; allow_hosts= or --allow-host lets more names in")
        return await handler(request)

    return check


def _bearer_auth(token: str) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != "/health":
            check_token(request.headers.get("Authorization", ""), token)
        return await handler(request)

    return check
