"""A body that breaks off: what has not come is asked for again, what has come is not taken twice."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from gpu_cache.rpc.client.connection import NodeConnection
from gpu_cache.rpc.client.pool import ConnectionPool
from gpu_cache.rpc.shard import ShardFetchError, ShardMissingError
from tests.support.fault_server import (
    FaultServer,
    Step,
    by,
    cut,
    dripping,
    frame,
    frames_of,
    hanging_up,
    reply,
    silent,
    whole,
)
from tests.support.reading import drained, reader_of
from tests.support.wire_tensors import patterned, same_bits

SHARDS = {
    "b": patterned(torch.uint8, 5, seed=1),
    "w": patterned(torch.float64, 3, seed=2),
    "none": torch.empty(0, 4),
    "h": patterned(torch.bfloat16, 2, 3, seed=3),
    "w2": patterned(torch.int64, 2, seed=4),
    "b2": patterned(torch.uint8, 3, seed=5),
}
IN_DATA_ORDER = ["w2", "w", "none", "h", "b", "b2"]
BODY = frame(SHARDS)
NUM_DATA_BYTES = sum(tensor.nbytes for tensor in SHARDS.values())
HEADER_BYTES = len(BODY) - NUM_DATA_BYTES
SERVING = by("one", frames_of(SHARDS))


SERVING_BYTES = reply(BODY, X_Shard_Incarnation="one")


def is_all(tensors: dict[object, torch.Tensor]) -> bool:
    return tensors.keys() == SHARDS.keys() and all(same_bits(tensors[key], SHARDS[key]) for key in SHARDS)


def test_an_answer_may_break_off_anywhere_and_nothing_shows(serve: Callable[..., FaultServer]) -> None:
    for num_sent in range(len(SERVING_BYTES)):
        server = serve(
            lambda exchange, n=num_sent: (exchange.send(SERVING_BYTES[:n]), exchange.hang_up()), whole(SERVING)
        )
        assert is_all(drained(reader_of(server.address, list(SHARDS)), buffer_bytes=4)), num_sent
        assert len(server.asked) == 2
        server.close()


def test_only_shards_that_are_not_complete_are_asked_for_again(serve: Callable[..., FaultServer]) -> None:
    known = 0
    for position, key in enumerate(IN_DATA_ORDER):
        for num_data in range(known, known + SHARDS[key].nbytes):
            server = serve(cut(SERVING, HEADER_BYTES + num_data), whole(SERVING))
            assert is_all(drained(reader_of(server.address, list(SHARDS))))
            assert server.wanted == [list(SHARDS), [key for key in IN_DATA_ORDER[position:] if SHARDS[key].nbytes]]
            server.close()
        known += SHARDS[key].nbytes


@pytest.mark.parametrize("num_body_bytes", [0, HEADER_BYTES, HEADER_BYTES + 30])
def test_a_reset_is_mended_too(serve: Callable[..., FaultServer], num_body_bytes: int) -> None:
    server = serve(cut(SERVING, num_body_bytes, by_reset=True), whole(SERVING))
    assert is_all(drained(reader_of(server.address, list(SHARDS))))


ONE = {"one": patterned(torch.uint8, 200)}
ONE_HEADER_BYTES = len(frame(ONE)) - 200


@pytest.mark.parametrize("num_body_bytes", [0, 7, 8, 50, *(ONE_HEADER_BYTES + known for known in (0, 1, 199))])
@pytest.mark.parametrize("by_reset", [False, True])
def test_three_answers_that_break_off_at_one_place_are_a_failure(
    serve: Callable[..., FaultServer], num_body_bytes: int, by_reset: bool
) -> None:
    server = serve(cut(by("one", frames_of(ONE)), num_body_bytes, by_reset=by_reset))
    with pytest.raises(ShardFetchError) as caught:
        drained(reader_of(server.address, ["one"]))
    text = f"Failed to fetch shards from http://{server.address}/data/batch after 3 attempts. Last error: Connection"
    assert str(caught.value).startswith(text)
    assert str(caught.value).endswith("(shards 'one')")
    assert server.wanted == [["one"]] * 3


def test_faults_with_progress_between_them_are_no_failure(serve: Callable[..., FaultServer]) -> None:
    large = {"large": patterned(torch.uint8, 3 << 20)}
    header = len(frame(large)) - (3 << 20)
    ends = [100, 5000, 300_000, 1 << 20, 1_100_000, 2 << 20, (3 << 20) - 1]
    serving = by("one", frames_of(large))
    server = serve(*(cut(serving, header + end) for end in ends), whole(serving))
    tensors = drained(reader_of(server.address, ["large"]), buffer_bytes=1 << 19)
    assert same_bits(tensors["large"], large["large"])
    assert server.wanted == [["large"]] * 8


def test_two_faults_without_progress_are_forgiven_each_time(serve: Callable[..., FaultServer]) -> None:
    large = {"large": patterned(torch.uint8, 1000)}
    serving = by("one", frames_of(large))
    at = [cut(serving, len(frame(large)) - 1000 + num_data) for num_data in (0, 500, 900)]
    server = serve(at[0], hanging_up, at[1], at[0], at[2], at[1], whole(serving))
    assert same_bits(drained(reader_of(server.address, ["large"]))["large"], large["large"])
    assert len(server.asked) == 7


def test_refused_connections_count_as_faults(serve: Callable[..., FaultServer]) -> None:
    server = serve(cut(SERVING, HEADER_BYTES + 30))
    reader = reader_of(server.address, list(SHARDS))
    assert reader.next_specs() is not None
    server.close()
    with pytest.raises(ShardFetchError, match=r"after 3 attempts\. Last error: ConnectionRefusedError"):
        reader.read_into([memoryview(bytearray(NUM_DATA_BYTES))])
    reader.close()


def test_a_drip_ends_at_the_deadline_however_much_progress_it_makes(serve: Callable[..., FaultServer]) -> None:
    server = serve(dripping(SERVING, 500))
    with pytest.raises(ShardFetchError, match=r"after 1 attempts\. Last error: TimeoutError"):
        drained(reader_of(server.address, list(SHARDS), timeout_s=0.15))


def test_a_connection_that_went_dead_without_a_word_leaves_time_for_another(serve: Callable[..., FaultServer]) -> None:
    half = lambda exchange: (exchange.send(SERVING_BYTES[:-30]), exchange.wait())  # noqa: E731
    server = serve(silent, half, whole(SERVING))
    assert is_all(drained(reader_of(server.address, list(SHARDS), timeout_s=3)))
    assert len(server.asked) == 3


CHANGED: dict[str, tuple[Step, str]] = {
    "junk": (whole(reply(b"junk" * 10)), "announce a header of"),
    "number": (whole(reply(frame({"b": SHARDS["b"]}))), "returned 1 shards for 3 requested"),
    "refusal": (whole(reply(b"go away", "403 Forbidden")), "403 body=go away"),
}


@pytest.mark.parametrize(("step", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_an_owner_that_answers_something_else_is_not_asked_a_third_time(
    serve: Callable[..., FaultServer], step: Step, message: str
) -> None:
    server = serve(cut(SERVING, HEADER_BYTES + NUM_DATA_BYTES - 10), step)  # within "h"
    with pytest.raises(ShardFetchError, match=message) as caught:
        drained(reader_of(server.address, list(SHARDS)))
    assert server.address in str(caught.value)
    assert "(shards 'h', 'b', 'b2')" in str(caught.value)
    assert server.wanted[1:] == [["h", "b", "b2"]]


def test_an_owner_that_lost_a_shard_meanwhile_is_quoted(serve: Callable[..., FaultServer]) -> None:
    left = {key: SHARDS[key] for key in SHARDS if key != "b"}
    server = serve(cut(SERVING, HEADER_BYTES + NUM_DATA_BYTES - 10), whole(frames_of(left)))
    reader = reader_of(server.address, list(SHARDS))
    with pytest.raises(ShardMissingError, match=f"shard b from {server.address}: the owner does not have it"):
        drained(reader)
    assert list(reader.failures) == ["b"]


def test_cancelling_ends_a_read_for_good(serve: Callable[..., FaultServer]) -> None:
    server = serve(lambda exchange: (exchange.send(SERVING_BYTES[:-30]), exchange.wait()))
    reader = reader_of(server.address, list(SHARDS))
    errors: list[BaseException] = []

    def read() -> None:
        try:
            drained(reader)
        except ShardFetchError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert server.has_been_asked.wait(30)
    reader.cancel()
    reader.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == len(server.asked) == 1


def test_a_fetch_cancelled_before_it_begins_asks_nothing(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(SERVING))
    reader = reader_of(server.address, list(SHARDS))
    reader.cancel()
    with pytest.raises(ShardFetchError, match="the fetch was given up"):
        drained(reader)
    assert server.asked == []


def test_a_connection_that_is_cut_too_late_is_not_kept_either(
    serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, pool = serve(whole(SERVING)), ConnectionPool()
    reader = reader_of(server.address, ["b"], pool=pool)
    assert reader.next_specs() is not None
    reader.read_into([memoryview(bytearray(5))])
    monkeypatch.setattr(NodeConnection, "cancel", lambda connection: reader.close())  # before it is cut
    reader.cancel()
    assert pool.acquire(server.address)._sock is None


def test_a_connection_that_was_cut_is_not_kept(serve: Callable[..., FaultServer]) -> None:
    server, pool = serve(whole(SERVING)), ConnectionPool()
    reader = reader_of(server.address, list(SHARDS), pool=pool)
    assert reader.next_specs() is not None
    reader.read_into([memoryview(bytearray(NUM_DATA_BYTES))])
    reader.cancel()
    reader.close()
    assert pool.acquire(server.address)._sock is None


def test_the_connection_after_a_mended_read_is_kept(serve: Callable[..., FaultServer]) -> None:
    server, pool = serve(cut(SERVING, HEADER_BYTES + 30), whole(SERVING)), ConnectionPool()
    for _ in range(3):
        assert is_all(drained(reader_of(server.address, list(SHARDS), pool=pool)))
    assert server.num_connections == 2
    pool.close()
