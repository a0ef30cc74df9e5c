"""Requests to the /data routes by a plain HTTP client, and what is said of their answers."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.wire.frame import CONTENT_TYPE

BINARY = {"Accept": CONTENT_TYPE}


@dataclass
class Reply:
    status: int
    content_type: str
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: ServerHandle, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> Reply:
    """One request on a connection of its own; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(server.address, timeout=30)
    try:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, headers or {})
        response = connection.getresponse()
        reply = Reply(response.status, response.headers["Content-Type"], response.headers, response.read())
        assert int(response.headers["Content-Length"]) == len(reply.body)
        return reply
    finally:
        connection.close()


def batch(server: ServerHandle, *shard_ids: object, headers: dict[str, str] | None = None) -> Reply:
    return ask(server, "POST", "/data/batch", {"shard_ids": list(shard_ids)}, headers)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def assert_refused(reply: Reply, status: int, message: str) -> None:
    assert reply.status == status
    assert reply.content_type.startswith("application/json")
    assert reply.json == {"status": "error", "message": message}
