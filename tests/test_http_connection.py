"""Connections and their pool, against a server that does what the test says."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from areal.infra.rpc.backends.http_connection import HttpAnswer, NodeConnection, split_address
from tests.support.fault_server import FaultServer, Step, cut, dripping, hanging_up, reply, silent, whole
from tests.test_deadline_socket import full_listener

LONG_S = 60.0
TEXT = bytes(range(256)) * 4000
HELLO = json.dumps({"shard_ids": []}).encode()


@pytest.fixture(autouse=True)
def no_socket_is_forgotten() -> Iterator[None]:
    """An unclosed socket warns when it is collected, and a warning is an error."""
    yield
    gc.collect()


def ask(connection: NodeConnection, patience_s: float = LONG_S, deadline_s: float = LONG_S) -> HttpAnswer:
    deadline = time.monotonic() + deadline_s
    return connection.request("POST", "/data/batch", HELLO, {}, deadline=deadline, patience_s=patience_s)


def asked_once(address: str, *, read: bool = True) -> NodeConnection:
    connection = NodeConnection(address)
    answer = ask(connection)
    if read:
        answer.read_rest(1 << 30)
    return connection


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultServer]]:
    servers: list[FaultServer] = []

    def start(*script: Step, **where: str) -> FaultServer:
        servers.append(FaultServer(*script, **where))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("address", "location"),
    [
        ("node-7:80", ("node-7", 80)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:8080", ("::1", 8080)),
        ("fe80::1%eth0:8080", ("fe80::1%eth0", 8080)),
    ],
)
def test_an_address_is_a_host_and_a_port(address: str, location: tuple[str, int]) -> None:
    assert split_address(address) == location


@pytest.mark.parametrize("address", ["", "node-7", "node-7:", ":80", "node-7:http", "node-7:65536", "[::1]", "a:-1"])
def test_anything_else_is_refused_by_name(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address: write host:port or \[ipv6\]:port") as caught:
        NodeConnection(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("nbytes", [0, 1, 100, 8100, 8192, 8193, 100_000, len(TEXT)])
@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_a_body_fills_buffers_of_any_lengths(serve: Callable[..., FaultServer], nbytes: int, piece: int) -> None:
    server = serve(whole(reply(TEXT[:nbytes])))
    connection = NodeConnection(server.address)
    answer = ask(connection)
    body = bytearray(nbytes)
    view = memoryview(body)
    lengths = [1 + position % 700 for position in range(3000)]  # more buffers than one call takes
    position = 0
    while position < nbytes:
        buffers = []
        for length in lengths:
            if position < nbytes and sum(map(len, buffers)) < piece:
                buffers.append(view[position : position + length])
                position += len(buffers[-1])
        answer.fill(buffers[::-1])
    assert body == TEXT[:nbytes]
    assert (answer.unread_bytes, connection.can_be_reused) == (0, True)
    connection.close()


def test_a_body_is_read_in_pieces_and_to_its_end(serve: Callable[..., FaultServer]) -> None:
    connection = NodeConnection(serve(whole(reply(TEXT))).address)
    answer = ask(connection)
    assert answer.read(0) == b""
    assert answer.read(10) + answer.read(20_000) == TEXT[:20_010]
    assert not connection.can_be_reused
    assert answer.read_rest(1 << 30) == TEXT[20_010:]
    assert connection.can_be_reused
    connection.close()


def test_a_body_that_ends_early_leaves_what_is_missing(serve: Callable[..., FaultServer]) -> None:
    connection = NodeConnection(serve(cut(reply(TEXT), 50_000)).address)
    answer = ask(connection)
    body = bytearray(len(TEXT))
    left = [memoryview(body)[60_000:], memoryview(body)[40_000:60_000], memoryview(body)[:40_000]]
    with pytest.raises(ConnectionError, match=f"the connection ended {len(TEXT) - 50_000:,} bytes before the body did"):
        answer.fill(left)
    assert body[:50_000] == TEXT[:50_000]
    assert [len(buffer) for buffer in left] == [len(TEXT) - 60_000, 10_000]
    assert answer.unread_bytes == len(TEXT) - 50_000
    connection.close()


def test_no_more_is_read_than_the_body_has(serve: Callable[..., FaultServer]) -> None:
    connection = NodeConnection(serve(whole(reply(TEXT[:10]))).address)
    answer = ask(connection)
    with pytest.raises(ValueError, match="11 bytes wanted of a body that has 10 left"):
        answer.read(11)
    connection.close()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello world"


def test_a_body_in_chunks_is_read_to_its_end(serve: Callable[..., FaultServer]) -> None:
    connection = NodeConnection(serve(whole(CHUNKED)).address)
    for _ in range(2):
        answer = ask(connection)
        assert answer.unread_bytes == -1
        assert not connection.can_be_reused
        assert answer.read_rest(100) == b"hello world"
        assert connection.can_be_reused
    connection.close()


def test_a_body_without_a_length_ends_with_its_connection(serve: Callable[..., FaultServer]) -> None:
    server = serve(lambda exchange: (exchange.send(UNTIL_CLOSE), exchange.hang_up()))
    connection = asked_once(server.address, read=False)
    assert connection._answer is not None
    assert connection._answer.read_rest(100) == b"hello world"
    assert not connection.can_be_reused
    connection.close()


@pytest.mark.parametrize("answer", [CHUNKED, reply(b"hello world"), UNTIL_CLOSE], ids=["chunks", "length", "neither"])
def test_a_limit_bounds_what_is_read(serve: Callable[..., FaultServer], answer: bytes) -> None:
    server = serve(lambda exchange: (exchange.send(answer), exchange.hang_up()))
    connection = asked_once(server.address, read=False)
    assert connection._answer is not None
    assert connection._answer.read_rest(7) == b"hello w"
    assert not connection.can_be_reused
    connection.close()


def test_chunks_that_break_off_are_a_fault(serve: Callable[..., FaultServer]) -> None:
    server = serve(lambda exchange: (exchange.send(CHUNKED[:-12]), exchange.hang_up()))
    connection = asked_once(server.address, read=False)
    assert connection._answer is not None
    with pytest.raises(http.client.IncompleteRead):
        connection._answer.read_rest(100)
    connection.close()


@pytest.mark.parametrize(
    ("headers", "seconds"), [({}, None), ({"Retry_After": "7"}, 7.0), ({"Retry_After": "Wed, 21 Oct 2015"}, 1.0)]
)
def test_an_answer_says_when_to_come_back(
    serve: Callable[..., FaultServer], headers: dict[str, str], seconds: float | None
) -> None:
    connection = NodeConnection(serve(whole(reply(status="503 Busy", **headers))).address)
    answer = ask(connection)
    assert (answer.status, answer.retry_after_s) == (503, seconds)
    connection.close()


def test_one_connection_serves_many_requests(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(reply(TEXT)), whole(reply()), whole(reply(b"abc")))
    connection = NodeConnection(server.address)
    bodies = [ask(connection).read_rest(1 << 30) for _ in range(3)]
    assert bodies == [TEXT, b"", b"abc"]
    assert server.num_connections == 1
    assert server.asked[0].headers["host"] == server.address
    connection.close()


def test_a_request_that_failed_spoils_the_connection(serve: Callable[..., FaultServer]) -> None:
    connection = asked_once(serve(whole(reply()), hanging_up).address)
    assert connection.can_be_reused
    with pytest.raises(http.client.RemoteDisconnected):
        ask(connection)
    assert not connection.can_be_reused
    connection.close()


def test_the_server_may_announce_that_it_closes(serve: Callable[..., FaultServer]) -> None:
    server = serve(lambda exchange: (exchange.send(reply(TEXT, Connection="close")), exchange.hang_up()))
    connection = asked_once(server.address)
    sock = connection._sock
    assert sock is not None
    assert not connection.can_be_reused
    connection.close()
    assert sock.fileno() == -1


def test_ipv6(serve: Callable[..., FaultServer]) -> None:
    try:
        server = serve(whole(reply(b"abc")), host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    connection = NodeConnection(server.address)
    assert ask(connection).read_rest(10) == b"abc"
    assert server.asked[0].headers["host"] == server.address
    connection.close()


def test_a_host_with_several_addresses_is_tried_at_each(
    serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(whole(reply(b"abc")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (dead, server.port)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    connection = NodeConnection("node-7:80")
    assert ask(connection).read_rest(10) == b"abc"
    connection.close()
    found.reverse()
    server.close()
    connection = NodeConnection("node-7:80")
    with pytest.raises(ConnectionRefusedError):
        ask(connection)
    connection.close()


DRIPS = {
    "headers": dripping(reply(TEXT), 10),
    "body": dripping(reply(TEXT), 1000),
    "chunk": dripping(CHUNKED[:47] + b"ffff\r\n" + TEXT, 60),
    "until close": dripping(UNTIL_CLOSE + TEXT, 40),
}


@pytest.mark.parametrize("step", DRIPS.values(), ids=DRIPS.keys())
def test_a_drip_ends_at_the_deadline(serve: Callable[..., FaultServer], step: Step) -> None:
    connection = NodeConnection(serve(step).address)
    with pytest.raises(TimeoutError):
        ask(connection, deadline_s=0.15).read_rest(1 << 30)
    connection.close()


@pytest.mark.parametrize("step", [silent, cut(reply(TEXT), 0), lambda e: (e.send(reply(TEXT)[:200]), e.wait())])
def test_a_silence_ends_a_request(serve: Callable[..., FaultServer], step: Step) -> None:
    connection = NodeConnection(serve(step).address)
    with pytest.raises((TimeoutError, ConnectionError)):
        ask(connection, patience_s=0.05).read_rest(1 << 30)
    connection.close()


@pytest.mark.parametrize("num_sent", [0, 10, 1000], ids=["no answer", "in its headers", "in its body"])
def test_cancelling_ends_what_is_under_way(serve: Callable[..., FaultServer], num_sent: int) -> None:
    server = serve(lambda exchange: (exchange.send(reply(TEXT)[:num_sent]), exchange.wait()))
    connection = NodeConnection(server.address)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            ask(connection).read_rest(1 << 30)
        except (OSError, http.client.HTTPException) as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert server.has_been_asked.wait(30)
    connection.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    connection.close()


def test_what_is_cancelled_does_not_begin(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(reply()))
    connection = NodeConnection(server.address)
    connection.cancel()
    with pytest.raises(ConnectionAbortedError):
        ask(connection)
    assert server.asked == []
    connection.close()


def test_cancelling_reaches_a_connection_that_the_server_closes_after_its_answer(
    serve: Callable[..., FaultServer],
) -> None:
    server = serve(lambda exchange: (exchange.send(reply(b"abc", length=100, Connection="close")), exchange.wait()))
    connection = asked_once(server.address, read=False)
    assert connection._answer is not None
    connection.cancel()
    with pytest.raises(ConnectionError):
        connection._answer.read_rest(100)
    connection.close()


def test_an_address_where_nobody_answers_ends_by_its_patience() -> None:
    with full_listener() as (host, port):
        connection = NodeConnection(f"{host}:{port}")
        with pytest.raises(TimeoutError):
            ask(connection, patience_s=0.05)
        connection.close()
