"""Bodies: received into buffers, in pieces, in every form that a server may send them."""

from __future__ import annotations

import http.client
from collections.abc import Callable

import pytest

from gpu_cache.rpc.client.connection import NodeConnection
from tests.support.areal_fixtures import ask
from tests.support.fault_server import FaultServer, Step, cut, dripping, reply, whole

TEXT = bytes(range(256)) * 4000


def in_buffers(view: memoryview) -> list[memoryview]:
    """Of 1 to 500 bytes: for the longest body, more than one call takes."""
    buffers = []
    while view:
        length = 1 + len(buffers) % 500
        buffers.append(view[:length])
        view = view[length:]
    return buffers


@pytest.mark.parametrize("nbytes", [0, 1, 100, 8100, 8192, 8193, 100_000, len(TEXT)])
@pytest.mark.parametrize("at_once", [3000, 1 << 30])
def test_a_body_fills_buffers_of_any_lengths(serve: Callable[..., FaultServer], nbytes: int, at_once: int) -> None:
    server = serve(whole(reply(TEXT[:nbytes])))
    connection = NodeConnection(server.address)
    answer = ask(connection)
    body = bytearray(nbytes)
    for begin in range(0, nbytes, at_once):
        part = memoryview(body)[begin : begin + at_once]
        answer.fill(in_buffers(part)[::-1])
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


def test_a_body_that_ends_early_leaves_the_missing_shards(serve: Callable[..., FaultServer]) -> None:
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
NO_END = b"HTTP/1.1 200 OK\r\n\r\nhello world"


def test_a_body_in_chunks_is_read_to_its_end(serve: Callable[..., FaultServer]) -> None:
    connection = NodeConnection(serve(whole(CHUNKED)).address)
    for _ in range(2):
        answer = ask(connection)
        assert answer.unread_bytes == -1
        assert not connection.can_be_reused
        assert answer.read_rest(100) == b"hello world"
        assert connection.can_be_reused
    connection.close()


@pytest.mark.parametrize("num_sent", [*range(len(CHUNKED) - 12), len(NO_END)])
def test_headers_or_a_body_without_an_end_are_a_fault(serve: Callable[..., FaultServer], num_sent: int) -> None:
    answer = NO_END if num_sent == len(NO_END) else CHUNKED
    server = serve(lambda exchange: (exchange.send(answer[:num_sent]), exchange.hang_up()))
    connection = NodeConnection(server.address)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(connection).read_rest(100)
    connection.close()


@pytest.mark.parametrize("answer", [CHUNKED, reply(b"hello world")], ids=["chunks", "length"])
def test_a_limit_bounds_the_bytes_read(serve: Callable[..., FaultServer], answer: bytes) -> None:
    connection = NodeConnection(serve(whole(answer)).address)
    assert ask(connection).read_rest(7) == b"hello w"
    assert not connection.can_be_reused
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


DRIPS = {
    "headers": dripping(reply(TEXT), 10),
    "body": dripping(reply(TEXT), 1000),
    "chunk": dripping(CHUNKED[:47] + b"ffff\r\n" + TEXT, 60),
}


@pytest.mark.parametrize("step", DRIPS.values(), ids=DRIPS.keys())
def test_a_drip_ends_at_the_deadline(serve: Callable[..., FaultServer], step: Step) -> None:
    connection = NodeConnection(serve(step).address)
    with pytest.raises(TimeoutError):
        ask(connection, deadline_s=0.15).read_rest(1 << 30)
    connection.close()
