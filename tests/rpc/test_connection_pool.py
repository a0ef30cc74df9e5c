"""Idle connections: kept, handed out, found dead, closed."""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Iterator

import pytest

from gpu_cache.rpc.client.connection import NodeConnection
from gpu_cache.rpc.client.pool import ConnectionPool, Place
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
    monkeypatch.setattr("gpu_cache.rpc.client.pool._MAX_IDLE", 2)
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


def in_time() -> float:
    return time.monotonic() + 30


def places(pool: ConnectionPool, number: int) -> list[Place]:
    taken = [Place() for _ in range(number)]
    for place in taken:
        pool.enter(place, in_time())
    return taken


@pytest.fixture
def small() -> Iterator[ConnectionPool]:
    """Of a process that may have eight descriptors: four places, two idle connections."""
    with nothing_forgotten():
        pool = ConnectionPool(lambda: 8)
        yield pool
        pool.close()


def test_there_are_places_for_half_of_the_descriptors(small: ConnectionPool) -> None:
    taken = places(small, 4)
    late = Place()
    with pytest.raises(OSError, match=r"4 connections are in use; this process may have [\d,]+ file descr") as caught:
        small.enter(late, time.monotonic())
    assert (caught.value.errno, late.is_taken) == (errno.EMFILE, False)
    small.leave(taken[0])
    small.leave(taken[0])
    small.enter(late, time.monotonic())
    small.leave(late)
    for place in taken:
        small.leave(place)


def test_places_go_in_the_order_in_which_they_were_asked_for(small: ConnectionPool) -> None:
    taken, order = places(small, 4), list[int]()
    waiting = [Place() for _ in range(6)]

    def wait(index: int) -> None:
        small.enter(waiting[index], in_time())
        order.append(index)
        small.leave(waiting[index])

    threads = []
    for index in range(6):
        threads.append(threading.Thread(target=wait, args=(index,)))
        threads[-1].start()
        while len(small._queue) <= index:
            time.sleep(0.001)
        small.wake()  # they look, and wait again
    small.leave(taken[0])
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert order == [0, 1, 2, 3, 4, 5]
    assert (small._num_places, len(small._queue)) == (3, 0)


def test_a_request_that_gives_up_waiting_leaves_the_queue(small: ConnectionPool) -> None:
    places(small, 4)
    place, errors = Place(), list[OSError]()

    def wait() -> None:
        try:
            small.enter(place, in_time())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not small._queue:
        time.sleep(0.001)
    small.wake()
    place.is_given_up = True
    small.wake()
    thread.join(30)
    assert not thread.is_alive()
    assert isinstance(errors[0], ConnectionAbortedError)
    assert not small._queue


def test_idle_connections_are_kept_below_a_share_of_the_descriptors(server: FaultServer, small: ConnectionPool) -> None:
    connections = [asked_once(server.address) for _ in range(3)]
    for connection in connections:
        small.release(connection)
    assert list(map(is_closed, connections)) == [True, False, False]
    places(small, 3)
    small.acquire("127.0.0.1:1")
    assert list(map(is_closed, connections)) == [True, True, False]
    assert small.acquire(server.address) is connections[2]
    connections[2].close()


def test_idle_connections_are_given_up_when_descriptors_run_out(server: FaultServer, small: ConnectionPool) -> None:
    connection = asked_once(server.address)
    small.release(connection)
    (place,) = places(small, 1)
    assert small.make_room(place)
    assert is_closed(connection)
    assert place.is_taken
    assert not small.make_room(place), "there is nothing to wait for"


def test_where_descriptors_run_out_fewer_have_a_place_until_all_have_left(small: ConnectionPool) -> None:
    first, second, third, _ = taken = places(small, 4)
    assert small.make_room(first)
    assert small.make_room(second)
    assert [place.is_taken for place in taken] == [False, False, True, True]
    for place in (first, Place()):
        with pytest.raises(OSError, match="2 connections are in use"):
            small.enter(place, time.monotonic())
    small.leave(third)
    small.enter(first, in_time())
    for place in taken:
        small.leave(place)
    places(small, 4)
