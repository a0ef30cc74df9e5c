"""Parts of a reader: how much is asked for at once, refusals, both forms, and answers that are no use."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch

from gpu_cache.rpc.client import requester as http_requester
from gpu_cache.rpc.client.pool import ConnectionPool
from gpu_cache.rpc.shard import ShardFetchError, ShardMissingError, ShardRefusedError
from tests.support.fault_server import (
    Asked,
    FaultServer,
    cut,
    frame,
    frames_of,
    hanging_up,
    json_of,
    refusal,
    reply,
    whole,
)
from tests.support.reading import drained, failure, reader_of
from tests.support.wire_tensors import patterned, same_bits

A, B = patterned(torch.float32, 3, 2, seed=1), patterned(torch.int16, 5, seed=2)
PAIR = {"a": A, "b": B}
MANY = {f"s{number}": torch.tensor([number]) for number in range(200)}
OCTETS = "application/octet-stream"


def test_first_few_are_asked_for_then_many(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of(MANY)))
    reader = reader_of(server.address, list(MANY), promised=MANY, max_json_shards=5, max_binary_shards=150)
    tensors = drained(reader)
    assert list(map(len, server.wanted)) == [5, 150, 45]
    assert list(itertools.chain(*server.wanted)) == list(MANY)
    assert all(torch.equal(tensors[key], MANY[key]) for key in MANY)
    assert server.num_connections == 1
    assert server.asked[0].headers["accept"] == "application/vnd.safetensors"


def test_a_request_is_bounded_by_the_bytes_that_are_known(serve: Callable[..., FaultServer]) -> None:
    tensors = {f"s{index}": torch.zeros(5, dtype=torch.int64) for index in range(8)} | {"s2": torch.zeros(250)}
    server = serve(whole(frames_of(tensors)))
    promised = {name: tensors[name] for name in list(tensors)[:6]}
    drained(reader_of(server.address, list(tensors), promised=promised, max_binary_bytes=100, max_json_shards=10))
    # 10 bytes are reckoned with where nothing is known.
    assert server.wanted == [["s0", "s1"], ["s2"], ["s3", "s4"], ["s5", "s6", "s7"]]


def test_a_server_that_speaks_json_only_is_asked_for_few_at_once(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(json_of(MANY)))
    tensors = drained(reader_of(server.address, list(MANY), max_json_shards=32, max_binary_shards=150))
    assert list(map(len, server.wanted)) == [32] * 6 + [8]
    assert all(torch.equal(tensors[key], MANY[key]) for key in MANY)


def test_a_server_may_change_its_form(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(json_of(MANY)), whole(frames_of(MANY)))
    tensors = drained(reader_of(server.address, list(MANY), promised=MANY))
    assert list(map(len, server.wanted)) == [32, 32, 136]
    assert all(torch.equal(tensors[key], MANY[key]) for key in MANY)


def test_missing_shards_fail_alone_and_the_rest_is_asked_for_at_once(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of(PAIR)))
    reader = reader_of(server.address, ["x", "a", "y", "b"])
    tensors = drained(reader)
    assert server.wanted == [["x", "a", "y", "b"], ["a", "b"]]
    assert same_bits(tensors["a"], A)
    assert same_bits(tensors["b"], B)
    assert sorted(reader.failures) == ["x", "y"]
    assert isinstance(reader.failures["x"], ShardMissingError)
    text = f"Failed to fetch shard x from {server.address}: the owner does not have it"
    assert str(reader.failures["x"]) == text


def test_where_all_are_missing_nothing_comes(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(frames_of({})))
    reader = reader_of(server.address, ["x", "y"])
    assert drained(reader) == {}
    assert sorted(reader.failures) == ["x", "y"]
    assert server.wanted == [["x", "y"]]


REFUSALS = {
    "302": refusal(302, "elsewhere", Location="http://127.0.0.1:1/"),
    "400": refusal(400, "not so"),
    "400, of others": refusal(400, '{"missing_shard_ids": ["z", 7, null]}'),
    "400, no list": refusal(400, '{"missing_shard_ids": "a"}'),
    "400, deep": refusal(400, "[" * 100_000),
    "401": refusal(401, "who are you?"),
    "404": refusal(404, '{"missing_shard_ids": ["a"]}'),
    "500": refusal(500, "oops"),
    "503": refusal(503, "busy, and does not say for how long"),
    "204": reply(status="204 Nothing"),
}


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_an_answer(serve: Callable[..., FaultServer], answer: bytes) -> None:
    server = serve(whole(answer), whole(frames_of(PAIR)))
    status, body = answer[9:12].decode(), answer.partition(b"\r\n\r\n")[2].decode()[:200]
    expected = f"Failed to fetch shard batch from http://{server.address}/data/batch: {status} body={body}"
    assert failure(server).startswith(expected)
    assert len(server.asked) == 1


def test_too_long_a_request_is_asked_in_halves(serve: Callable[..., FaultServer]) -> None:
    def answer(asked: Asked) -> bytes:
        too_long = refusal(413, "too long")
        return too_long if len(asked.shard_ids) > 1 or asked.shard_ids == ["b"] else frames_of(PAIR)(asked)

    server = serve(whole(answer))
    reader = reader_of(server.address, ["a", "b"])
    with pytest.raises(ShardRefusedError, match="413 body=too long"):
        drained(reader)
    assert server.wanted == [["a", "b"], ["a"], ["b"]]
    assert server.num_connections == 1


def test_a_long_refusal_is_quoted_in_part(serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requester, "_TEXT_SLACK_BYTES", 10_000)
    server = serve(whole(refusal(500, "x" * 9_000)), whole(refusal(500, "y" * 1_000_000)))
    assert len(failure(server)) < 3000
    assert len(failure(server)) < 3000


def test_a_refusal_that_breaks_off_is_asked_for_again(serve: Callable[..., FaultServer]) -> None:
    server = serve(cut(refusal(500, "oops"), 2), whole(frames_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["a"], A)


def test_a_busy_node_is_asked_again(serve: Callable[..., FaultServer]) -> None:
    busy = whole(refusal(503, "later", Retry_After="0"))
    server = serve(busy, busy, whole(frames_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["a"], A)
    server = serve(busy, busy, busy, whole(refusal(503, "later", Retry_After="60")))
    assert failure(server, timeout_s=10.0).startswith(
        f"Failed to fetch shards from http://{server.address}/data/batch after 4 attempts. "
        "Last error: NodeBusyError('503 body=later')"
    )
    assert len(server.asked) == 4


def test_a_busy_answer_is_no_fault(serve: Callable[..., FaultServer]) -> None:
    busy = whole(refusal(503, "later", Retry_After="0"))
    server = serve(*[busy] * 7, hanging_up, busy, hanging_up, *[busy] * 4, whole(frames_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["a"], A)
    assert (len(server.asked), server.num_connections) == (15, 3), "a busy node's connection is kept"


@pytest.mark.parametrize(
    ("headers", "told_s"), [({"Retry_After": "2"}, 2.0), ({"Retry_After": "1", "Retry_After_Ms": "50"}, 0.05)]
)
def test_a_busy_node_is_waited_for_as_it_says_and_a_little_longer(
    serve: Callable[..., FaultServer], monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], told_s: float
) -> None:
    busy, pauses = whole(refusal(503, "later", **headers)), list[float]()
    server = serve(busy, busy, busy, whole(frames_of(PAIR)))
    reader = reader_of(server.address, ["a", "b"])
    monkeypatch.setattr(reader._requester._cancelled, "wait", lambda pause_s: pauses.append(pause_s))
    drained(reader)
    assert len(pauses) == 3
    assert all(told_s <= pause_s <= 1.5 * told_s for pause_s in pauses)
    assert len(set(pauses)) == 3, "so that those it refused do not all come back at once"


def test_a_node_that_is_busy_beyond_the_deadline_is_not_waited_for(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(refusal(503, "later", Retry_After="3600")))
    assert "after 1 attempts" in failure(server)


def test_cancelling_ends_the_wait_for_a_busy_node(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(refusal(503, "later", Retry_After="50")))
    reader = reader_of(server.address, ["a"])
    errors: list[str] = []

    def read() -> None:
        try:
            drained(reader)
        except ShardFetchError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    assert server.has_been_asked.wait(30)
    reader.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "after 1 attempts" in errors[0]


def test_faults_before_the_answer_are_mended(serve: Callable[..., FaultServer]) -> None:
    server = serve(hanging_up, cut(reply(bytes(100)), 5, by_reset=True), whole(frames_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["b"], B)
    server = serve(whole(b"junk\r\n\r\n"))
    assert "after 3 attempts. Last error: BadStatusLine" in failure(server)


def test_each_request_counts_its_own_faults(serve: Callable[..., FaultServer]) -> None:
    last = lambda exchange: (exchange.send(reply(frame({"a": A}), Connection="close")), exchange.hang_up())  # noqa: E731
    server = serve(hanging_up, hanging_up, last, hanging_up, hanging_up, whole(frames_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"], max_json_shards=1))["b"], B)
    assert server.wanted == [["a"]] * 3 + [["b"]] * 3


def test_after_a_fault_no_idle_connection_is_trusted(serve: Callable[..., FaultServer]) -> None:
    good = whole(frames_of(PAIR))
    server, pool = serve(good, good, good, hanging_up, good), ConnectionPool()
    readers = [reader_of(server.address, ["a", "b"], pool=pool) for _ in range(3)]
    for reader in readers:
        assert reader.next_specs() is not None
        reader.read_into([memoryview(bytearray(A.nbytes + B.nbytes))])
    for reader in readers:
        reader.close()
    drained(reader_of(server.address, ["a"], pool=pool))
    assert server.num_connections == 4
    pool.close()


def test_an_address_that_is_none_is_named(serve: Callable[..., FaultServer]) -> None:
    with pytest.raises(ShardFetchError, match=r"'node-7' is not an address: .* \(shards 'a'\)"):
        drained(reader_of("node-7", ["a"]))


def test_an_id_that_json_cannot_express_is_named() -> None:
    with pytest.raises(ShardFetchError, match=r"not JSON serializable \(shards b'a'\)"):
        drained(reader_of("127.0.0.1:1", [b"a"]))


@pytest.mark.parametrize("num_body_bytes", [0, 1, 100])
def test_an_array_that_breaks_off_is_asked_for_again(serve: Callable[..., FaultServer], num_body_bytes: int) -> None:
    server = serve(cut(json_of(PAIR), num_body_bytes), whole(json_of(PAIR)))
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["b"], B)
    assert server.wanted == [["a", "b"]] * 2
