"""Connections that were idle, and that something between forgot: asked for a short time only, and never a fault."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_cache.rpc import runtime
from gpu_cache.rpc.client import requester as http_requester
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.client.pool import ConnectionPool
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.rpc.shard import ShardTimeoutError
from tests.support.areal_fixtures import (
    ask,
    asked_once,
    delete,
    remote,
    with_settings,
)
from tests.support.fault_server import (
    Exchange,
    FaultServer,
    Step,
    frames_of,
    hanging_up,
    reply,
    silent,
    whole,
)
from tests.support.reading import drained, reader_of
from tests.support.wire_tensors import patterned, same_bits

SHARDS = {name: patterned(torch.int16, 50, seed=seed) for seed, name in enumerate("abcdef")}
GOOD = whole(frames_of(SHARDS))
NEVER_S = 1e6  # a pause after a fault that no deadline leaves time for: a fetch that counts one fails
LATER = whole(reply(b"later", "503 Busy", Retry_After="0"))


@pytest.fixture
def pool() -> Iterator[ConnectionPool]:
    pool = ConnectionPool()
    yield pool
    pool.close()


def slow(seconds: float) -> Step:
    """Answers in the end."""

    def step(exchange: Exchange) -> None:
        exchange.wait(seconds)
        GOOD(exchange)

    return step


def fetch(server: FaultServer, pool: ConnectionPool, name: str, **settings: Any) -> bool:
    chosen = {"doubt_after_s": 0.0, "doubted_patience_s": 0.05, "retry_pause_s": NEVER_S, **settings}
    return same_bits(drained(reader_of(server.address, [name], pool=pool, **chosen))[name], SHARDS[name])


def test_the_kernel_asks_after_idle_peers(serve: Callable[..., FaultServer]) -> None:
    connection = asked_once(serve(GOOD).address)
    assert connection._sock is not None
    assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle, interval, count, unacknowledged = (
        connection._sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    )
    assert 0 < idle < 60
    assert 0 < idle + interval * count < 90
    assert 0 < unacknowledged <= 60_000
    connection.close()


@pytest.mark.parametrize("dead", [silent, hanging_up, lambda exchange: exchange.reset()], ids=["hole", "end", "reset"])
def test_an_idle_connection_that_is_dead_costs_a_short_wait_and_no_fault(
    serve: Callable[..., FaultServer], pool: ConnectionPool, dead: Step
) -> None:
    server = serve(GOOD, dead, GOOD)
    assert fetch(server, pool, "a")
    assert fetch(server, pool, "b")
    assert fetch(server, pool, "c", doubt_after_s=60.0)
    assert server.wanted == [["a"], ["b"], ["b"], ["c"]]
    assert server.num_connections == 2, "the fresh one is kept"


def test_all_idle_connections_to_its_node_are_given_up_with_it(
    serve: Callable[..., FaultServer], pool: ConnectionPool
) -> None:
    server = serve(GOOD, GOOD, GOOD, silent, GOOD)
    readers = [reader_of(server.address, [name], pool=pool) for name in "abc"]
    for reader in readers:
        assert reader.next_specs() is not None
        reader.read_into([memoryview(bytearray(100))])
    for reader in readers:
        reader.close()
    assert fetch(server, pool, "d")
    assert server.num_connections == 4


def test_an_owner_that_is_slow_is_waited_for_on_the_fresh_connection(
    serve: Callable[..., FaultServer], pool: ConnectionPool
) -> None:
    server = serve(GOOD, slow(0.3))
    assert fetch(server, pool, "a")
    assert fetch(server, pool, "b")
    assert server.wanted == [["a"], ["b"], ["b"]], "one request more, and no third"


def test_an_answer_that_has_begun_may_take_its_time(serve: Callable[..., FaultServer], pool: ConnectionPool) -> None:
    def halting(exchange: Exchange) -> None:
        answer = frames_of(SHARDS)(exchange.asked)
        exchange.send(answer[:3])
        exchange.wait(1.2)
        exchange.send(answer[3:])

    server = serve(GOOD, halting)
    assert fetch(server, pool, "a")
    assert fetch(server, pool, "b", doubted_patience_s=1.0)
    assert server.wanted == [["a"], ["b"]]


def test_a_connection_of_late_is_not_doubted(serve: Callable[..., FaultServer], pool: ConnectionPool) -> None:
    server = serve(GOOD, slow(0.2), LATER, slow(0.2))
    assert fetch(server, pool, "a")
    assert fetch(server, pool, "b", doubt_after_s=60.0)
    assert fetch(server, pool, "c", doubt_after_s=60.0)
    assert server.num_connections == 1


def test_the_deadline_stays_the_deadline(serve: Callable[..., FaultServer], pool: ConnectionPool) -> None:
    server = serve(GOOD, silent)
    assert fetch(server, pool, "a")
    with pytest.raises(ShardTimeoutError):
        drained(reader_of(server.address, ["b"], pool=pool, timeout_s=0.2, doubt_after_s=0.0, doubted_patience_s=9.0))


def test_cancelling_ends_the_short_wait(serve: Callable[..., FaultServer], pool: ConnectionPool) -> None:
    server = serve(GOOD, silent)
    assert fetch(server, pool, "a")
    connection = pool.acquire(server.address)
    assert connection.idle_since is not None
    connection.cancel()
    with pytest.raises(OSError, match="cut off"):
        ask(connection)
    connection.close()


def test_a_localize_and_a_clear_get_past_a_forgotten_connection(
    serve: Callable[..., FaultServer],
) -> None:
    runtime.configure(device="cpu")
    cleared = whole(reply(b'{"status": "ok"}', content_type="application/json"))
    server = serve(GOOD, silent, GOOD, silent, cleared)
    backend = with_settings(HttpRTensorBackend(), doubt_after_s=0.0, doubted_patience_s=0.05, retry_pause_s=NEVER_S)
    runtime.current().set_backend(backend)
    for name in "ab":
        assert same_bits(RTensor.localize(remote(server.address, name, SHARDS[name])), SHARDS[name])
    assert delete(backend, server.address, "a") == {"status": "ok"}
    assert len(server.asked) == 5
    settings = http_requester.HttpSettings({})
    assert settings.doubted_patience_s <= 5 < settings.doubt_after_s <= 30, "by default"
    backend.close()
