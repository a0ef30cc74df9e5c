"""HTTP answers under any damage, read over a socket: refused by name, or the shards that they say; never for long."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st

from gpu_cache.rpc.client import connection as http_connection
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.shard import ShardFetchError
from gpu_cache.rpc.wire.serialization import tensor_to_json
from tests.support.areal_fixtures import delete, with_settings
from tests.support.fault_server import Exchange, FaultServer, Flood, Step, by, cut, frames_of, reply, whole
from tests.support.fuzz_corpus import contents, corpus
from tests.support.fuzz_damage import (
    as_text,
    counted_allocations,
    damaged,
    exchanged,
    fuzz,
    repeating,
)
from tests.support.reading import drained, reader_of
from tests.support.wire_tensors import patterned, same_bits

PAIR = {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([1, 2, 3], dtype=torch.uint8)}
OCTETS = "application/octet-stream"
QUICK_S = 5.0
NUM_OF_REQUESTS = [pytest.param(150, id="short"), pytest.param(10_000, id="long", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(whole(frames_of(PAIR))) as started:
        yield started


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nodes that are busy, and do not say for how many seconds."""
    monkeypatch.setattr(http_connection, "_RETRY_AFTER_DATE_S", 0.0)


def sent(answer: bytes) -> Step:
    """The answer, and then the end of the connection: the client does not wait for more."""

    def step(exchange: Exchange) -> None:
        exchange.send(answer)
        exchange.hang_up()

    return step


def check_answer(server: FaultServer, answer: bytes) -> str:
    """Read an answer about "a" and "b", in time and without room for what is not there.

    Returns:
        "read", "in part" or "refused".
    """
    server.script, began = [sent(answer)], time.monotonic()
    reader = reader_of(server.address, ["a", "b"], timeout_s=QUICK_S)
    with counted_allocations() as sizes:
        try:
            tensors = drained(reader)
        except ShardFetchError as error:
            refusal = str(error)
            tensors = None
        finally:
            assert sum(sizes) < 1 << 20  # an answer has some hundred bytes
            assert time.monotonic() - began < QUICK_S
    if tensors is None:
        assert server.address in refusal
        return "refused"
    assert tensors.keys() | reader.failures.keys() == PAIR.keys()
    assert all(isinstance(error, ShardFetchError) for error in reader.failures.values())
    return "in part" if reader.failures else "read"


@corpus("answers/valid")
def test_a_valid_answer_of_the_corpus_is_read(server: FaultServer, content: bytes) -> None:
    server.script = [sent(content)]
    tensors = drained(reader_of(server.address, ["a", "b"]))
    assert all(same_bits(tensors[key], PAIR[key]) for key in PAIR)


@corpus("answers/partial")
def test_an_answer_of_the_corpus_that_is_good_in_part_brings_that(server: FaultServer, content: bytes) -> None:
    server.script = [sent(content)]
    reader = reader_of(server.address, ["a", "b"])
    assert same_bits(drained(reader)["a"], PAIR["a"])
    assert list(reader.failures) == ["b"]


@corpus("answers/broken")
def test_a_broken_answer_of_the_corpus_is_refused_and_the_next_one_read(server: FaultServer, content: bytes) -> None:
    assert check_answer(server, content) == "refused"
    server.script = [whole(frames_of(PAIR))]
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["b"], PAIR["b"])


@functools.cache
def refusals() -> list[bytes]:
    """Bodies of error answers, as texts."""
    documents = [
        {"status": "error", "message": "One or more", "missing_shard_ids": ["a"]},
        {"status": "error", "missing_shard_ids": ["b", "a", "b"]},
    ]
    return [json.dumps(document).encode() for document in documents]


def refusing(texts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Answers of status 400 or 500 with these bodies."""
    statuses = st.sampled_from(["400 Bad Request", "400 Bad Request", "500 Oops"])
    return st.builds(lambda text, status: reply(text, status, "application/json"), texts, statuses)


ARRAY = [tensor_to_json(tensor) for tensor in PAIR.values()]
DAMAGES = {
    "bytes": damaged(st.sampled_from(contents("answers/valid")), max_edits=2),
    "json": exchanged(st.just(ARRAY)).map(lambda value: reply(as_text(value), content_type=OCTETS)),
    "missing ids": refusing(exchanged(st.sampled_from(refusals()).map(json.loads)).map(as_text)),
    "refusals": refusing(damaged(st.sampled_from(refusals())) | repeating(st.sampled_from(refusals()))),
}


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
@pytest.mark.parametrize("answers", DAMAGES.values(), ids=DAMAGES)
def test_an_answer_with_any_damage_is_refused_or_read(
    server: FaultServer, answers: st.SearchStrategy[bytes], num_examples: int
) -> None:
    outcomes = fuzz(lambda answer: check_answer(server, answer), answers, num_examples)
    assert outcomes["refused"] > outcomes.total() / 20
    server.script = [whole(frames_of(PAIR))]
    assert same_bits(drained(reader_of(server.address, ["a", "b"]))["b"], PAIR["b"])


def check_statistics(server: FaultServer, answer: bytes) -> bool:
    """Of a clear: refused by name, or an object."""
    server.script = [sent(answer)]
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0, delete_timeout_s=QUICK_S)
    try:
        return isinstance(delete(backend, server.address, "a"), dict)
    except ShardFetchError as error:
        return server.address not in str(error)
    finally:
        backend.close()


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_an_answer_to_a_clear_with_any_damage_is_refused_or_an_object(server: FaultServer, num_examples: int) -> None:
    texts = st.just(b'{"status":"ok","cleared_count":1,"num_tensors":0,"total_bytes":0}')
    bodies = damaged(texts) | exchanged(texts.map(json.loads)).map(as_text) | repeating(texts)
    outcomes = fuzz(lambda body: check_statistics(server, reply(body)), bodies, num_examples)
    assert outcomes.keys() == {True, False}


@pytest.mark.parametrize("length", [b"-1", b"-5", b"7fffffffffffffff"])
def test_a_chunk_that_does_not_end_is_not_read_to_its_end(server: FaultServer, length: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {OCTETS}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    flood = Flood(head + length + b"\r\n")
    server.script = [flood]
    reader = reader_of(server.address, ["a", "b"], timeout_s=QUICK_S, max_unknown_bytes=100_000)
    assert drained(reader) == {}
    assert all("bytes of JSON; expected 1 to 154,096" in str(error) for error in reader.failures.values())
    assert flood.num_sent < 96 << 20, "what is beyond the limit stays in the sockets, of which there were three"


LONGER = {
    name: patterned(dtype, 7, seed=n) for n, (name, dtype) in enumerate([("w", torch.float64), ("h", torch.int16)])
}


def check_cuts(server: FaultServer, cuts: list[tuple[int, bool]]) -> bool:
    """An answer that breaks off again and again is put together without a wrong byte, or refused."""
    server.script = [
        *(cut(by("A", frames_of(LONGER)), num_bytes, by_reset=by_reset) for num_bytes, by_reset in cuts),
        whole(by("A", frames_of(LONGER))),
    ]
    server.asked.clear()
    try:
        tensors = drained(reader_of(server.address, list(LONGER), timeout_s=QUICK_S), buffer_bytes=9)
    except ShardFetchError:
        return False
    assert all(same_bits(tensors[key], LONGER[key]) for key in LONGER)
    return True


@pytest.mark.parametrize("num_examples", NUM_OF_REQUESTS)
def test_an_answer_that_breaks_off_anywhere_and_often_is_put_together_or_refused(
    server: FaultServer, num_examples: int
) -> None:
    cuts = st.lists(st.tuples(st.integers(0, 350), st.booleans()), max_size=8)
    outcomes = fuzz(lambda drawn: check_cuts(server, drawn), cuts, num_examples)
    assert outcomes[True] > outcomes.total() / 4
    assert outcomes[False] > outcomes.total() / 50
