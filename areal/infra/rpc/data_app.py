"""The `/data` routes: shards over HTTP, in upstream's JSON form and in the binary one."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any, Protocol

import torch
from aiohttp import web

from areal.infra.rpc.answers import Answer, array_answer, frame_answer, json_answer
from areal.infra.rpc.expiry import ShardExpiry
from areal.infra.rpc.serialization import tensor_from_json
from areal.infra.rpc.shard import INCARNATION_HEADER, RETRY_AFTER_MS_HEADER, WireError
from areal.infra.rpc.store import ShardStore
from areal.infra.rpc.turns import RETRY_AFTER_S, Turns
from areal.infra.rpc.wire import CONTENT_TYPE, decode_frame
from gpu_cache.hosts import HostRule

if TYPE_CHECKING:  # the names differ between releases of aiohttp
    from aiohttp.typedefs import Handler, Middleware

DEFAULT_MAX_BODY_BYTES = 1 << 30
# Answers with tensors under way at once. Each may keep some MB in the transport; with more of them none is faster.
DEFAULT_MAX_RESPONSES = 32
# What a client that comes beyond that is told. Seconds are whole in the standard's header; ours says it exactly.
_COME_BACK = {"Retry-After": "1", RETRY_AFTER_MS_HEADER: str(round(1000 * RETRY_AFTER_S))}
# A client that takes nothing for so long is as good as gone, and must not keep its turn.
_STALLED_S = 120.0
# Larger writes only move the same bytes through the loop's buffer in one go; smaller ones cost more system calls.
_WRITE_BYTES = 1 << 20
# What may wait in the transport (large parts by reference): it is sent without a turn of the loop for each write.
_AHEAD_BYTES = 8 << 20

logger = logging.getLogger(__name__)


class DataOwner(Protocol):
    """The process whose shards are served."""

    @property
    def store(self) -> ShardStore:
        """What the routes serve."""

    def evict(self, shard_ids: Sequence[str]) -> int:
        """Drop shards from this process's own cache; returns how many were there."""

    def trim(self) -> bool:
        """Give unused memory back; returns whether any was."""


def make_app(
    owner: DataOwner,
    *,
    token: str | None,
    rule: HostRule,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    max_responses: int = DEFAULT_MAX_RESPONSES,
    expiry: ShardExpiry | None = None,
) -> web.Application:
    """Build the application. It names its incarnation, a random id, in `/health` and in a header of every answer.

    Args:
        owner: Whose shards to serve. Its methods are called on threads of the loop's executor.
        token: What every route but `/health` asks for as `Authorization: Bearer`; None asks for nothing.
        rule: Under which names it may be asked, and from which web pages.
        max_body_bytes: The longest request body; a longer one is answered 413.
        max_responses: Answers with tensors under way at once; who comes beyond that is answered 503 with Retry-After.
        expiry: Drops old shards while the application runs; None: they stay until they are cleared.
    """
    middlewares: list[Middleware] = [_errors_as_json, _asked_under(rule)]
    if token is not None:
        middlewares.append(_bearer_auth(token))
    app = web.Application(client_max_size=max_body_bytes, middlewares=middlewares)
    if expiry is not None:
        app.cleanup_ctx.append(expiry.sweeping)
    incarnation = uuid.uuid4().hex
    app.on_response_prepare.append(_naming(incarnation))
    routes = _DataRoutes(owner, max_body_bytes, max_responses, incarnation, expiry)
    app.add_routes(
        [
            web.get("/health", routes.health),
            web.post("/data/batch", routes.get_batch),
            web.delete("/data/clear", routes.clear),
            web.post("/data/reclaim", routes.reclaim),
            web.put("/data/{shard_id:.+}", routes.put),
            web.get("/data/{shard_id:.+}", routes.get, allow_head=False),
        ]
    )
    return app


class _DataRoutes:
    """The handlers. What may take long (encoding, decoding, the owner's methods) runs on a thread of the executor."""

    def __init__(
        self,
        owner: DataOwner,
        max_body_bytes: int,
        max_responses: int,
        incarnation: str,
        expiry: ShardExpiry | None,
    ) -> None:
        self._owner, self._incarnation, self._expiry = owner, incarnation, expiry
        self._max_body_bytes = max_body_bytes
        # Only the event loop's thread touches what follows.
        self._turns = Turns(max_responses)
        # Of complete answers.
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
            }
        )

    async def put(self, request: web.Request) -> web.Response:
        shard_id = request.match_info["shard_id"]
        body = await self._body(request)
        decode = _tensor_of_frame if request.content_type == CONTENT_TYPE else _tensor_of_json
        try:
            tensor = await asyncio.to_thread(decode, body, shard_id)
        except (ValueError, TypeError, RecursionError) as error:
            return _error(400, str(error))
        self._owner.store[shard_id] = tensor
        return web.json_response({"status": "ok", "shard_id": shard_id})

    async def get(self, request: web.Request) -> web.StreamResponse:
        with self._responding(request):
            shard_id = request.match_info["shard_id"]
            tensor = self._owner.store.get(shard_id)
            if tensor is None:
                return _error(404, f"Shard {shard_id} not found")
            return await self._send(request, await asyncio.to_thread(json_answer, tensor))

    async def get_batch(self, request: web.Request) -> web.StreamResponse:
        with self._responding(request):
            return await self._get_batch(request)

    @contextlib.contextmanager
    def _responding(self, request: web.Request) -> Iterator[None]:
        """An answer with tensors is under way; refused, before any of its request's body is read, if too many are."""
        if not self._turns.take(id(request.transport)):  # a client that is told to come back keeps its connection
            busy = f"busy: {self._turns.num_taken} answers are under way, others were here before"
            raise web.HTTPServiceUnavailable(text=busy, headers=_COME_BACK)
        try:
            yield
        finally:
            self._turns.leave()

    async def _get_batch(self, request: web.Request) -> web.StreamResponse:
        shard_ids = _listed_ids(await self._body(request))
        if shard_ids is None or not all(isinstance(shard_id, str) for shard_id in shard_ids):
            return _error(400, "Expected JSON body with string list field 'shard_ids'")
        is_binary = CONTENT_TYPE in request.headers.get("Accept", "")
        found, missing = self._owner.store.get_many(dict.fromkeys(shard_ids) if is_binary else shard_ids)
        if missing:
            return _error(400, "One or more requested shards were not found", missing_shard_ids=missing)
        try:
            answer = await asyncio.to_thread(frame_answer if is_binary else array_answer, found)
        except WireError as error:  # more than fits a frame
            return _error(400, str(error))
        return await self._send(request, answer)

    async def clear(self, request: web.Request) -> web.Response:
        shard_ids = _listed_ids(await self._body(request))
        if shard_ids is None:
            return _error(400, "'shard_ids' must be a list")
        cleared = await asyncio.to_thread(self._clear, [item for item in shard_ids if isinstance(item, str)])
        return web.json_response({"status": "ok", "cleared_count": cleared, **self._owner.store.stats()})

    def _clear(self, shard_ids: list[str]) -> int:
        # The store first: evicted earlier, a shard could be fetched again from the store and stay in the cache.
        cleared = self._owner.store.remove(shard_ids)
        self._owner.evict(shard_ids)
        return cleared

    async def reclaim(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "trimmed": await asyncio.to_thread(self._owner.trim)})

    async def _body(self, request: web.Request) -> bytes:
        """The whole body; refused by its announced length before any of it is read, else as soon as it is too long."""
        announced = request.content_length or 0
        if announced > self._max_body_bytes:
            message = f"a body of {announced:,} bytes, the limit is {self._max_body_bytes:,}"
            raise web.HTTPRequestEntityTooLarge(self._max_body_bytes, announced, text=message)
        return await request.read()

    async def _send(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": answer.content_type})
        response.content_length = answer.nbytes
        if request.transport is not None:
            _use_reno_within_host(request.transport)
            request.transport.set_write_buffer_limits(high=_AHEAD_BYTES)
        await response.prepare(request)
        try:
            await _write(response, answer.parts)
        except BaseException:
            # A half-sent body must end in a broken connection: a second answer would be taken for the rest of it.
            if request.transport is not None:
                request.transport.abort()
            raise
        self._sent_payload_bytes += answer.payload_nbytes
        self._sent_body_bytes += answer.nbytes
        return response


async def _write(response: web.StreamResponse, parts: Iterable[bytes | memoryview]) -> None:
    """Send a body; raises `ConnectionError` if the client stops taking it."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_STALLED_S) as patience:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _WRITE_BYTES):
                    patience.reschedule(loop.time() + _STALLED_S)
                    await response.write(view[start : start + _WRITE_BYTES])
            await response.write_eof()
    except TimeoutError:
        raise ConnectionAbortedError(f"the client took nothing for {_STALLED_S:.0f} s") from None


def _listed_ids(body: bytes) -> list[Any] | None:
    """The list `shard_ids` of a JSON object, or None where there is no such thing."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    shard_ids = document.get("shard_ids") if isinstance(document, dict) else None
    return shard_ids if isinstance(shard_ids, list) else None


def _tensor_of_json(body: bytes, shard_id: str) -> torch.Tensor:
    tensor = tensor_from_json(json.loads(body))
    if tensor.is_meta:
        raise ValueError(f"shard {shard_id} has no data to store")
    return tensor


def _tensor_of_frame(body: bytes, shard_id: str) -> torch.Tensor:
    tensors = decode_frame(body)
    if tensors.keys() != {shard_id}:
        raise ValueError(f"expected one tensor with the id {shard_id}, got {short_repr(list(tensors))}")
    return tensors[shard_id]


def _use_reno_within_host(transport: asyncio.BaseTransport) -> None:
    """Between two processes of one host there is no network to model, and bbr's pacing only costs.

    Source: our measurement over loopback, 5.5 GB/s with reno and 2.3 with bbr, the default on some machines.
    """
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if peer and own and peer[0] == own[0]:
        with contextlib.suppress(OSError):  # not offered by this kernel, or not to this user
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _error(status: int, message: str, **more: object) -> web.Response:
    return web.json_response({"status": "error", "message": message, **more}, status=status)


def _naming(incarnation: str) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    async def name(request: web.Request, response: web.StreamResponse) -> None:
        response.headers[INCARNATION_HEADER] = incarnation

    return name


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal and every fault is answered in the one form that clients parse."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        error.text, error.content_type = json.dumps({"status": "error", "message": error.text}), "application/json"
        raise
    except ConnectionError as error:
        # The client went away. Nobody reads this answer; raised further, aiohttp would log a fault of ours. It keeps
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
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        # surrogateescape: aiohttp decodes headers so, and a comparison of bytes takes the same time for any of them.
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path != "/health" and not hmac.compare_digest(given, expected):
            raise web.HTTPUnauthorized(text="a bearer token is required", headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return check
