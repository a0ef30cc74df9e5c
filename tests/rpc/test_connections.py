"""Connections that say little, slowly or nothing: they deny no other client, and each of their waits has an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader

from gpu_cache.rpc.server import app as data_app
from gpu_cache.rpc.server import connections as connections_module
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.connections import Connections, Stage
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.wire.frame import decode_frame
from gpu_cache.rpc.wire.serialization import serialize_value
from tests.support.data_routes import BINARY, ask, batch, eventually
from tests.support.fake_owner import FakeOwner

ASKING = b"POST /data/batch HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
PUTTING = b"PUT /data/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
PARTS = {
    "nothing": b"",
    "part of a header": b"GET /health HTTP/1.1\r\nHo",
    "no body": ASKING,
    "part of it": PUTTING + b"x",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_PERIOD_S", 0.02)
    monkeypatch.setattr(rpc_server, "_GRACE_S", 0.2)


@pytest.fixture
def owner() -> FakeOwner:
    owner = FakeOwner()
    owner.store["a"] = torch.ones(3)
    return owner


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    """Connects to an address and sends some bytes."""
    with contextlib.ExitStack() as stack:

        def connect(address: str, sent: bytes = b"") -> socket.socket:
            host, port = address.split(":")
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            sock.sendall(sent)
            return sock

        yield connect


def is_closed(sock: socket.socket) -> bool:
    """Whether the server has closed it, now."""
    sock.settimeout(0)
    try:
        return sock.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        sock.settimeout(30)


def received(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    with contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))
    return b""


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_three_hundred_slow_connections_deny_no_client(
    owner: FakeOwner, connect: Callable[..., socket.socket], part: bytes
) -> None:
    with rpc_server.start(owner=owner, max_concurrent_responses=4) as server:
        slow = [connect(server.address, part) for _ in range(300)]
        assert decode_frame(batch(server, "a", headers=BINARY).body)["a"].tolist() == [1, 1, 1]
        assert batch(server, "a").status == 200
        assert ask(server, "PUT", "/data/b", serialize_value(torch.ones(1))).status == 200
        health = ask(server, "GET", "/health").json
        assert (health["num_responses"], health["num_busy_refusals"]) == (0, 0)
        assert not any(map(is_closed, slow)), "they have half a minute"


@pytest.mark.parametrize("first", [b"", HEALTH], ids=["at first", "after a request"])
@pytest.mark.parametrize("part", [b"GET /health HTTP/1.1\r\nHo", b"G"])
def test_a_header_that_takes_too_long_ends_its_connection(
    owner: FakeOwner,
    connect: Callable[..., socket.socket],
    first: bytes,
    part: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with rpc_server.start(owner=owner, header_timeout_s=0.4) as server:
        sock = connect(server.address, first)
        if first:
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        sock.sendall(part)
        assert received(sock) == b""
        assert eventually(lambda: "closed 1 connections that were silent or slow" in caplog.text)
        assert ask(server, "GET", "/health").status == 200


def test_bytes_of_a_header_give_it_no_more_time(owner: FakeOwner, connect: Callable[..., socket.socket]) -> None:
    with rpc_server.start(owner=owner, header_timeout_s=0.3) as server:
        sock = connect(server.address, b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            while not is_closed(sock):
                sock.sendall(b"x")
                time.sleep(0.02)
        assert ask(server, "GET", "/health").status == 200


def test_an_idle_connection_ends_after_its_time_and_not_before(
    owner: FakeOwner, connect: Callable[..., socket.socket]
) -> None:
    with rpc_server.start(owner=owner, header_timeout_s=0.3, idle_timeout_s=0.8) as server:
        began = time.monotonic()
        assert received(connect(server.address, HEALTH)).startswith(b"HTTP/1.1 200 OK")
        assert time.monotonic() - began >= 0.8, "a header has less time than an idle connection"


@pytest.mark.parametrize("request_bytes", [PUTTING, ASKING], ids=["put", "batch"])
def test_a_body_that_stops_coming_is_answered_and_its_connection_ends(
    owner: FakeOwner, connect: Callable[..., socket.socket], request_bytes: bytes
) -> None:
    with rpc_server.start(owner=owner, body_timeout_s=0.2) as server:
        sock = connect(server.address, request_bytes + b"x" * 7)
        head, _, body = sock.recv(1 << 16).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        said = "7 bytes of the body came, and less than 64 KiB in the last 0.2 s"
        assert json.loads(body) == {"status": "error", "message": said}
        assert list(owner.store) == ["a"]


def test_a_client_that_goes_before_the_server_waits_for_its_body_is_no_fault_of_the_server() -> None:
    async def read() -> None:
        content = StreamReader(BaseProtocol(asyncio.get_running_loop()), 1 << 16)  # of a connection that is closed
        request: Any = SimpleNamespace(
            content=content, content_length=4, body_exists=True, protocol=object(), transport=None
        )
        await data_app._Bodies(Connections(4, 30.0, 30.0), 30.0, 100).read(request)

    with pytest.raises(ConnectionResetError, match="the client is gone after 0 bytes of the body"):
        asyncio.run(read())


def test_a_slow_body_that_goes_on_is_read(
    owner: FakeOwner, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_app, "_BODY_PROGRESS_BYTES", 10)
    body = json.dumps(serialize_value(torch.ones(2))).encode()
    with rpc_server.start(owner=owner, body_timeout_s=0.8) as server:
        head = f"PUT /data/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        sock = connect(server.address, head.encode())
        for start in range(0, len(body), 15):
            sock.sendall(body[start : start + 15])
            time.sleep(0.2)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        assert owner.store["slow"].tolist() == [1, 1]


def test_no_limit_is_a_limit(owner: FakeOwner) -> None:
    inf = float("inf")
    with rpc_server.start(owner=owner, header_timeout_s=inf, body_timeout_s=inf, idle_timeout_s=inf) as server:
        assert batch(server, "a").status == 200
        assert ask(server, "PUT", "/data/b", serialize_value(torch.ones(1))).status == 200


@pytest.mark.parametrize("name", ["header_timeout_s", "body_timeout_s", "idle_timeout_s", "max_connections"])
def test_a_limit_of_nothing_is_a_mistake(owner: FakeOwner, name: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"{name}={value}: must be .*at least"):
            rpc_server.start(owner=owner, **{name: value})


def test_beyond_the_limit_the_connections_that_wait_for_longest_make_room(
    owner: FakeOwner, connect: Callable[..., socket.socket]
) -> None:
    with rpc_server.start(owner=owner, max_connections=20) as server:
        slow = [connect(server.address) for _ in range(50)]
        assert ask(server, "GET", "/health").status == 200
        assert eventually(lambda: sum(map(is_closed, slow)) >= 30)


def test_bodies_on_their_way_make_room_too(owner: FakeOwner, connect: Callable[..., socket.socket]) -> None:
    with rpc_server.start(owner=owner, max_connections=10) as server:
        slow = [connect(server.address, PUTTING + b"x") for _ in range(30)]
        assert eventually(lambda: sum(map(is_closed, slow)) >= 20)
        assert ask(server, "GET", "/health").status == 200


class FakeConnection:
    """A connection of which only the end is seen."""

    def __init__(self) -> None:
        self.is_aborted = False
        self.transport = SimpleNamespace(abort=self._abort)

    def _abort(self) -> None:
        self.is_aborted = True


def test_room_is_made_by_silent_ones_then_idle_ones_and_never_by_answers() -> None:
    time_s = [0.0]
    kept = Connections(6, 30.0, 30.0, lambda: time_s[0])
    stages = {"answer": Stage.ANSWERING, "body": Stage.RECEIVING, "idle": Stage.IDLE, "silent": Stage.HEADER}
    later = {"body just now": Stage.RECEIVING, "came just now": Stage.HEADER}
    made: dict[str, Any] = {name: FakeConnection() for name in [*stages, *later]}
    for name, stage in [*stages.items(), *later.items()]:
        time_s[0] = 2.0 if name in later else 0.0
        kept.admit(made[name], 5)
        kept.enter(made[name], stage)
    assert repr(kept) == "Connections(2 header, 1 idle, 2 receiving, 1 answering)"
    for gone in ("silent", "body", "idle", "body just now", "came just now"):
        newcomer: Any = FakeConnection()
        kept.admit(newcomer, 5)
        kept.enter(newcomer, Stage.ANSWERING)
        assert made.pop(gone).is_aborted
        assert not any(one.is_aborted for one in made.values())
    last: Any = FakeConnection()
    kept.admit(last, 5)
    assert last.is_aborted, "all others are being answered"


def test_descriptors_that_run_out_close_connections_and_refuse_no_client(connect: Callable[..., socket.socket]) -> None:
    command = f"ulimit -n 100; exec {sys.executable} -m gpu_cache.rpc.server"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()
        server: Any = SimpleNamespace(address=address)
        slow = []
        for number in range(200):
            slow.append(connect(address))
            if number % 10 == 0:  # the server has seen these
                assert ask(server, "GET", "/health").status == 200
        assert ask(server, "PUT", "/data/a", serialize_value(torch.ones(2))).status == 200
        assert decode_frame(batch(server, "a", headers=BINARY).body)["a"].tolist() == [1, 1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_bytes_that_are_no_request_are_refused_without_repeating_them(
    owner: FakeOwner, connect: Callable[..., socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with rpc_server.start(owner=owner) as server:
        sock = connect(server.address, b"GET / HTTP/1.1\r\nAuthorization: Bearer s3c\x01ret\r\n\r\n")
        answer = received(sock)
    assert b" 400 Bad Request\r\n" in answer
    assert b"not a request in HTTP/1.1" in answer
    assert b"s3c" not in answer
    assert "s3c" not in caplog.text
    assert "Traceback" not in caplog.text


def stop_in_time(server: ServerHandle) -> None:
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    stopper.join(timeout=20)
    assert not stopper.is_alive()


@pytest.mark.parametrize("part", [*PARTS.values(), HEALTH], ids=[*PARTS, "idle"])
def test_stop_waits_for_no_client_that_says_nothing(
    owner: FakeOwner, connect: Callable[..., socket.socket], part: bytes
) -> None:
    server = rpc_server.start(owner=owner)
    sock = connect(server.address, part)
    ask(server, "GET", "/health")
    stop_in_time(server)
    received(sock)
