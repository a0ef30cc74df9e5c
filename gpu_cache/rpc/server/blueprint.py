"""The `/data` routes as the Flask blueprint that AReaL's servers mount.

With the switch on it stands in the place of AReaL's `areal.infra.rpc.guard.data_blueprint`, under werkzeug and under
FastAPI's `WSGIMiddleware`. It has the token, the limits, the headers and the answers of our own server; a slow client
has so long for each MiB.

The JSON form calls `rtensor.fetch` for each id, and `serialize_value` of this module: AReaL's tests patch both.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import socket
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import torch
from flask import Blueprint, Response, request
from werkzeug.exceptions import ClientDisconnected, HTTPException
from werkzeug.routing import BaseConverter

from gpu_cache.config import says_yes
from gpu_cache.hosts import HostRule
from gpu_cache.rpc import rtensor, runtime
from gpu_cache.rpc.segments import is_wanted
from gpu_cache.rpc.server import requests, same_host
from gpu_cache.rpc.server.answers import Answer, json_answer
from gpu_cache.rpc.server.connections import use_reno
from gpu_cache.rpc.server.expiry import ShardExpiry, parse_seconds
from gpu_cache.rpc.server.requests import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_RESPONSES, RefusedError, Sending
from gpu_cache.rpc.server.turns import Place
from gpu_cache.rpc.shard import CLIENT_HEADER, INCARNATION_HEADER, REMOVALS_HEADER
from gpu_cache.rpc.tokens import find_token
from gpu_cache.rpc.wire.frame import CONTENT_TYPE
from gpu_cache.rpc.wire.records import MAX_IDS_BYTES

__all__ = ["data_bp", "serialize_value"]

# One chunk of an answer for the server. Each is a copy: werkzeug takes nothing but `bytes`.
# Source: our measurement over loopback; from 256 KiB to 2 MiB the rate is the same.
_PIECE_BYTES = 1 << 20
# The longest time for one such piece, or for one of a request's body, in seconds.
_STALLED_S = 30.0
_READ_BYTES = 1 << 20
_MAX_BODY_BYTES = DEFAULT_MAX_BODY_BYTES
_ENGINE_ROUTE = "/create_engine"  # of AReaL's own blueprint
_MAX_NAME = 64  # characters; our clients' names have 16

logger = logging.getLogger(__name__)


def serialize_value(value: torch.Tensor | Sequence[tuple[str, torch.Tensor]]) -> Answer:
    """The JSON form of one tensor, or of a list of ids with their tensors, made in parts while it is sent.

    Raises:
        TypeError: One does not travel.
    """
    return json_answer(value) if isinstance(value, torch.Tensor) else requests.all_as_json(value)


TTL_VARIABLE = "GPU_CACHE_SHARD_TTL"
FREEZE_VARIABLE = "GPU_CACHE_FREEZE_HEAP"
_has_engine = False
_expiry: ShardExpiry | None
_sending: Sending
_incarnation: str
_same_host: same_host.Offer
_rules = functools.lru_cache(8)(HostRule)


def _begin() -> None:
    """Be a server of its own: a forked child's store numbers its shards from one, as its parent's and siblings' do."""
    global _sending, _incarnation, _same_host, _expiry
    _sending, _incarnation = Sending(DEFAULT_MAX_RESPONSES), uuid.uuid4().hex
    _same_host, _expiry = same_host.Offer(_incarnation), None


_begin()
os.register_at_fork(after_in_child=_begin)


def _put(shard_id: str) -> Response:
    requests.put(runtime.current(), shard_id, _body(_MAX_BODY_BYTES), request.mimetype)
    return _json({"status": "ok", "shard_id": shard_id})


def _get(shard_id: str) -> Response:
    def answer() -> Answer:
        try:
            tensor = rtensor.fetch(shard_id)
        except KeyError:
            raise RefusedError(404, f"Shard {shard_id} not found") from None
        return serialize_value(tensor)

    return _send(answer)


def _get_batch() -> Response:
    shard_ids = requests.ids_to_read(requests.listed_ids(_body(MAX_IDS_BYTES)))
    if CONTENT_TYPE in request.headers.get("Accept", ""):
        return _send(lambda: requests.batch_answer(runtime.current(), shard_ids, is_binary=True))
    return _send(lambda: _array(shard_ids))


def _array(shard_ids: Sequence[str]) -> Answer:
    found, missing = [], []
    for shard_id in shard_ids:
        try:
            found.append((shard_id, rtensor.fetch(shard_id)))
        except KeyError:
            missing.append(shard_id)
    return requests.missing_answer(missing) if missing else serialize_value(found)


def _serials() -> Response:
    return _json(requests.serials(runtime.current(), requests.listed_ids(_body(MAX_IDS_BYTES))))


def _clear() -> Response:
    return _json(requests.clear(runtime.current(), requests.listed_ids(_body(MAX_IDS_BYTES))))


def _reclaim() -> Response:
    return _json({"status": "ok", "trimmed": runtime.current().trim()})


def _check() -> None:
    """Refuse whom our own server would refuse; before each of the routes."""
    rule = _rules(request.environ.get("SERVER_NAME", ""))
    if refusal := rule.refusal(request.headers.getlist("Host"), request.headers.getlist("Origin")):
        raise RefusedError(403, refusal)
    if (token := find_token()) is not None:
        requests.check_token(request.headers.get("Authorization", ""), token)


def _name(response: Response) -> Response:
    response.headers.update({INCARNATION_HEADER: _incarnation, **same_host.headers(_same_host.server())})
    response.headers[REMOVALS_HEADER] = str(runtime.current().store.num_removals)
    return response


def _refused(error: RefusedError) -> Response:
    response = _json({"status": "error", "message": str(error)}, error.status)
    response.headers.update(error.headers)
    return response


def _failed(error: Exception) -> Response:
    if isinstance(error, HTTPException):  # Flask's own, such as of a body that broke off
        return _json({"status": "error", "message": str(error.description)}, error.code or 500)
    logger.exception("%s %s failed", request.method, request.path)
    return _json({"status": "error", "message": str(error)}, 500)


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(document), status, mimetype="application/json")


def _body(limit: int) -> bytearray:
    """The whole body; one that is too long is refused by its announced length, else as soon as it is too long."""
    limit = min(limit, _MAX_BODY_BYTES)
    requests.check_length(request.content_length or 0, limit)
    body = bytearray()
    with _patience(_connection()):
        while chunk := _read(request.stream, len(body)):
            body += chunk
            requests.check_length(len(body), limit)
    return body


def _read(stream: Any, num_read: int) -> bytes:
    try:
        chunk: bytes = stream.read(_READ_BYTES)
    except (TimeoutError, ClientDisconnected):  # werkzeug makes the latter of the former
        message = f"{num_read:,} bytes of the body came, and then none for {_STALLED_S:g} s, or the connection broke"
        raise RefusedError(408, message) from None
    except OSError as error:  # a chunk without a length; or the client is gone
        raise RefusedError(400, f"the body broke off after {num_read:,} bytes: {error}") from None
    return chunk


def _send(make: Callable[[], Answer]) -> Response:
    """Answer with what `make` makes, once there is a place for it."""
    place = _sending.begin(request.headers.get(CLIENT_HEADER, "")[:_MAX_NAME])
    try:
        answer = make()
    except BaseException:
        _sending.end(place, None, 0)
        raise
    pieces = _Pieces(answer, place, _connection())
    if request.method == "HEAD":  # a server iterates no body then, and Starlette's middleware closes none
        pieces.close()
    response = Response(pieces, answer.status, content_type=answer.content_type, direct_passthrough=True)
    response.content_length = answer.nbytes
    return response


class _Pieces:
    """An answer's bytes for a WSGI server. It has a place among those under way until it is sent, or given up.

    Args:
        answer: The answer to send.
        place: Its place.
        connection: Where it goes; None if the server does not tell.
    """

    def __init__(self, answer: Answer, place: Place, connection: socket.socket | None) -> None:
        self._answer, self._place, self._connection = answer, place, connection
        self._num_sent = self._num_asked = 0
        self._is_open = True
        self._pieces = self._made()

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> bytes:
        self._num_sent = self._num_asked  # the server asks for the next once it has sent the last
        piece = next(self._pieces, None)
        if piece is None:
            self.close()  # Starlette's middleware does not
            raise StopIteration
        self._num_asked += len(piece)
        return piece

    def _made(self) -> Generator[bytes, None, None]:
        with _patience(self._connection):
            if self._connection is not None:
                _hasten(self._connection)
            for group in self._answer.groups:
                part = group[0] if len(group) == 1 else b"".join(group)
                if isinstance(part, bytes) and len(part) <= _PIECE_BYTES:
                    yield part
                else:
                    yield from map(bytes, _cut(memoryview(part)))

    def close(self) -> None:
        """Give the place back. A half-sent body must end in a broken connection, else something may complete it."""
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # the connection is closed
            self._pieces.close()
        _sending.end(self._place, self._answer, self._num_sent)
        if self._num_asked > 0 and self._num_sent < self._answer.nbytes and self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    __del__ = close


def _hasten(connection: socket.socket) -> None:
    """Let no header wait until the client confirms the one before it, and no client of this host for a pace."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if connection.getpeername()[0] == connection.getsockname()[0]:
        use_reno(connection)


def _cut(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + _PIECE_BYTES] for start in range(0, len(view), _PIECE_BYTES))


def _connection() -> socket.socket | None:
    """The client's connection, where the server is werkzeug's."""
    found = request.environ.get("werkzeug.socket")
    return found if isinstance(found, socket.socket) else None


@contextlib.contextmanager
def _patience(connection: socket.socket | None) -> Iterator[None]:
    """Let no read and no write of a connection take longer than a client may be silent."""
    if connection is None:
        yield
        return
    before = connection.gettimeout()
    connection.settimeout(_STALLED_S)
    try:
        yield
    finally:
        connection.settimeout(before)


def _figures() -> dict[str, Any]:
    """The figures that our own server reports in `/health`."""
    store = runtime.current().store
    told = same_host.figures(store, _same_host.server())
    expired = {"expired_shards": _expiry.num_shards, "expired_bytes": _expiry.nbytes} if _expiry else {}
    return {"incarnation": _incarnation, **store.stats(), **_sending.figures(), **told, **expired}


def _expire() -> None:
    """Drop shards that are older than GPU_CACHE_SHARD_TTL says, if it does."""
    global _expiry
    if (text := os.environ.get(TTL_VARIABLE)) and _expiry is None:
        owner = runtime.current()
        try:
            ttl_s = parse_seconds(text)
        except ValueError as error:
            raise ValueError(f"{TTL_VARIABLE}={text!r}: {error}") from None
        _expiry = ShardExpiry(owner.store, ttl_s, owner.evict)
        _expiry.sweep_in_thread()


def _note_engine(response: Response) -> Response:
    """Once AReaL has made an engine, leave all that this process has loaded out of Python's cyclic collections.

    Reference counts free these objects as before. A cycle of objects that were loaded by then stays when it dies.
    Source: our measurement; half a million objects of AReaL's take 0.6 s to look at, and every other read of 3,072
    shards set that off. vLLM freezes its heap after start-up, too.
    """
    global _has_engine
    is_first = not _has_engine and request.path == _ENGINE_ROUTE and response.status_code == HTTPStatus.OK
    if is_first and _freezes_heap():
        gc.collect()
        gc.freeze()
        logger.info(
            "cyclic collections skip %d objects from now on (%s=0: none)", gc.get_freeze_count(), FREEZE_VARIABLE
        )
    _has_engine = _has_engine or is_first
    return response


def _freezes_heap() -> bool:
    return says_yes(FREEZE_VARIABLE, default=True)


class _ShardId(BaseConverter):  # type: ignore[misc]
    """Any text: werkzeug's own converters take no line end, and no slash in front."""

    regex = "(?s:.+)"
    part_isolating = False


def _add_converter(state: Any) -> None:
    state.app.url_map.converters["shard_id"] = _ShardId


def _join_guard(state: Any) -> None:
    """Add our figures to `/health` of AReaL's guard, and take from it what this process is.

    Raises:
        ValueError: A variable says neither yes nor no, or no time. No request is to find that out.
    """
    _freezes_heap()
    is_wanted()
    guard = state.app.config.get("guard_state")
    register = getattr(guard, "register_health_hook", None)
    if register is not None:
        register(_figures)
    if role := getattr(guard, "role", None):
        runtime.current().name_process(str(role), max(0, getattr(guard, "worker_index", 0)))
    _expire()


data_bp = Blueprint("data", __name__)
data_bp.before_request(_check)
data_bp.after_request(_name)
data_bp.register_error_handler(RefusedError, _refused)
data_bp.register_error_handler(Exception, _failed)
data_bp.after_app_request(_note_engine)
data_bp.record_once(_join_guard)
data_bp.record(_add_converter)  # before the rules that name it
data_bp.add_url_rule("/data/batch", "get_batch", _get_batch, methods=["POST"])
data_bp.add_url_rule("/data/serials", "serials", _serials, methods=["POST"])
data_bp.add_url_rule("/data/clear", "clear", _clear, methods=["DELETE"])
data_bp.add_url_rule("/data/reclaim", "reclaim", _reclaim, methods=["POST"])
# If slashes merged, a client would be sent to another shard.
data_bp.add_url_rule("/data/<shard_id:shard_id>", "put", _put, methods=["PUT"], merge_slashes=False)
data_bp.add_url_rule("/data/<shard_id:shard_id>", "get", _get, methods=["GET"], merge_slashes=False)
