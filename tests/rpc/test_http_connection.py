"""Connections and their pool, against a server that does what the test says."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable

import pytest

from gpu_cache.rpc.client.connection import DeadlineSocket, NodeConnection, split_address
from tests.support.areal_fixtures import ask, asked_once, full_listener
from tests.support.fault_server import FaultServer, Step, hanging_up, reply, silent, whole

TEXT = bytes(range(256)) * 4000


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


@pytest.mark.parametrize(
    "address",
    ["", "node-7", "node-7:", ":80", "node-7:http", "node-7:65536", "[::1]", "a:-1", "a..b:80", "é" * 70 + ":80"],
)
def test_anything_else_is_refused_by_name(address: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address: write host:port or \[ipv6\]:port") as caught:
        NodeConnection(address)
    assert repr(address) in str(caught.value)


def test_one_connection_serves_many_requests(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(reply(TEXT)), whole(reply()), whole(reply(b"abc")))
    connection = NodeConnection(server.address)
    bodies = [ask(connection).read_rest(1 << 30) for _ in range(3)]
    assert bodies == [TEXT, b"", b"abc"]
    assert server.num_connections == 1
    assert server.asked[0].headers["host"] == server.address
    connection.close()


def test_a_request_is_one_write(serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch) -> None:
    sent, real = list[bytes](), DeadlineSocket.sendall
    monkeypatch.setattr(DeadlineSocket, "sendall", lambda sock, data: (sent.append(bytes(data)), real(sock, data)))
    connection = NodeConnection(serve(whole(reply(TEXT))).address)
    assert ask(connection).read(len(TEXT)) == TEXT
    assert len(sent) == 1
    assert b"\r\nHost: 127.0.0.1:" in sent[0]
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


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize("address", ["::1", "[::1]", "[::1%1]"])
def test_a_server_is_asked_under_a_name_that_it_can_read(serve: Callable[..., FaultServer], address: str) -> None:
    server = serve(whole(reply()), host="::1")
    asked_once(f"{address}:{server.port}").close()
    assert server.asked[0].headers["host"] == server.address


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


def test_a_silent_address_leaves_time_for_the_next(
    serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(whole(reply(b"abc")))
    with full_listener() as (_, dead):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (dead, server.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        connection = NodeConnection("node-7:80")
        assert ask(connection, patience_s=1.5, deadline_s=1.5).read_rest(10) == b"abc"
        connection.close()


@pytest.mark.parametrize(
    "step",
    [silent, lambda exchange: (exchange.send(reply(TEXT)[:200]), exchange.wait())],
    ids=["of all", "of the body"],
)
def test_a_silence_ends_a_request(serve: Callable[..., FaultServer], step: Step) -> None:
    connection = NodeConnection(serve(step).address)
    with pytest.raises((TimeoutError, ConnectionError)):
        ask(connection, patience_s=0.05).read_rest(1 << 30)
    connection.close()


@pytest.mark.parametrize("num_sent", [0, 10, 1000], ids=["no answer", "in its headers", "in its body"])
def test_cancelling_ends_calls_under_way(serve: Callable[..., FaultServer], num_sent: int) -> None:
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


def test_a_cancelled_connection_does_not_begin(serve: Callable[..., FaultServer]) -> None:
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
    connection = NodeConnection(server.address)
    answer = ask(connection)
    connection.cancel()
    with pytest.raises(ConnectionError):
        answer.read_rest(100)
    connection.close()


def test_a_silent_address_ends_by_its_patience() -> None:
    with full_listener() as (host, port):
        connection = NodeConnection(f"{host}:{port}")
        with pytest.raises(TimeoutError):
            ask(connection, patience_s=0.05)
        connection.close()
