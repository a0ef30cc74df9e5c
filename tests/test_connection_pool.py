"""Idle connections: kept, handed out, found dead, closed."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from areal.infra.rpc.backends import connection_pool
from areal.infra.rpc.backends.connection_pool import ConnectionPool
from areal.infra.rpc.backends.http_connection import NodeConnection
from tests.support.areal_fixtures import ask, asked_once, nothing_forgotten
from tests.support.fault_server import FaultServer, reply, whole


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(whole(reply(b"abc"))) as server:
        yield server


@pytest.fixture
def pool() -> Iterator[ConnectionPool]:
    with nothing_forgotten():
        pool = ConnectionPool()
        yield pool
        pool.close()


def is_closed(connection: NodeConnection) -> bool:
    return connection._sock is not None and connection._sock.fileno() == -1


def wait_for_input(connection: NodeConnection) -> None:
    assert connection._sock is not None
    assert select.select([connection._sock], [], [], 30)[0]


def test_a_connection_is_handed_out_again(server: FaultServer, pool: ConnectionPool) -> None:
    first, second = asked_once(server.address), asked_once(server.address)
    pool.release(first)
    pool.release(second)
    assert pool.acquire("127.0.0.1:1")._sock is None
    assert pool.acquire(server.address) is second
    assert pool.acquire(server.address) is first
    assert pool.acquire(server.address)._sock is None
    for connection in (first, second):
        assert ask(connection).read_rest(10) == b"abc"
        connection.close()


def test_one_with_an_unread_answer_is_closed(server: FaultServer, pool: ConnectionPool) -> None:
    connection = NodeConnection(server.address)
    ask(connection)
    pool.release(connection)
    assert is_closed(connection)
    assert pool.acquire(server.address)._sock is None


def test_one_that_the_server_closed_is_not_handed_out(server: FaultServer, pool: ConnectionPool) -> None:
    stale = [asked_once(server.address) for _ in range(3)]
    for connection in stale:
        pool.release(connection)
    server.hang_up()
    for connection in stale:
        wait_for_input(connection)
    assert pool.acquire(server.address)._sock is None
    assert all(map(is_closed, stale))


def test_one_that_has_something_to_say_is_not_handed_out(pool: ConnectionPool) -> None:
    with FaultServer(whole(reply(b"abc") + b"HTTP/1.1 200 OK\r\n" * 1000)) as server:
        connection = asked_once(server.address)
        wait_for_input(connection)
        pool.release(connection)
        assert pool.acquire(server.address) is not connection
        assert is_closed(connection)


def test_a_node_is_forgotten(server: FaultServer, pool: ConnectionPool) -> None:
    with FaultServer(whole(reply())) as other:
        connections = [asked_once(server.address), asked_once(other.address), asked_once(server.address)]
        for connection in connections:
            pool.release(connection)
        pool.forget(server.address)
        assert list(map(is_closed, connections)) == [True, False, True]
        assert pool.acquire(other.address) is connections[1]
        connections[1].close()


def test_the_longest_idle_makes_room(
    server: FaultServer, pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_pool, "_MAX_IDLE", 2)
    connections = [asked_once(server.address) for _ in range(3)]
    for connection in connections:
        pool.release(connection)
    assert list(map(is_closed, connections)) == [True, False, False]


def test_a_closed_pool_keeps_nothing(server: FaultServer, pool: ConnectionPool) -> None:
    before, after = asked_once(server.address), asked_once(server.address)
    pool.release(before)
    pool.close()
    pool.close()
    assert is_closed(before)
    pool.release(after)
    assert is_closed(after)
