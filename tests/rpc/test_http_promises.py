"""An owner sends what the handles promise, or is not read: nothing longer, nothing else, in either form."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, TensorShardInfo
from gpu_cache.rpc.shard import ShardAnswerError, ShardMissingError, ShardRefusedError
from gpu_cache.rpc.wire.serialization import tensor_to_json
from tests.support.areal_fixtures import delete, remote, with_settings
from tests.support.fault_server import (
    Answer,
    FaultServer,
    Flood,
    by,
    frames_of,
    json_of,
    raw_frame,
    refusal,
    reply,
    whole,
)
from tests.support.reading import drained, failure, reader_of
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

OCTETS = "application/octet-stream"
CHUNKED = f"HTTP/1.1 200 OK\r\nContent-Type: {OCTETS}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
IN_SOCKETS = 32 << 20  # what the kernel may take of a flood before the client hangs up
SHARD = patterned(torch.float32, 1024, seed=1)  # 4 kB
OTHERS = {name: patterned(torch.int16, 7, seed=seed) for seed, name in enumerate("abcdefg")}


def of_bytes(length: int) -> torch.Tensor:
    return torch.empty(length, dtype=torch.uint8, device="meta")


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def frame_of_gigabytes(num_bytes: int) -> bytes:
    """An answer about "s" as far as its bytes."""
    head = raw_frame({"__metadata__": {"ids": '["s"]'}, "0": entry(0, num_bytes)})
    return reply(head, length=len(head) + num_bytes)


FLOODS = {
    "a frame": frame_of_gigabytes(6 << 30),
    "a frame, small at first": raw_frame({"__metadata__": {"ids": '["s"]'}, "0": entry(0, 4096)}),
    "JSON": reply(b'[{"type":"tensor","data":"', length=5 << 30, content_type=OCTETS),
    "JSON in chunks": CHUNKED + b"ffffffff\r\n[" + b'{"type":"tensor","data":"',
    "JSON in small chunks": CHUNKED,
}
FLOODS["a frame, small at first"] = reply(FLOODS["a frame, small at first"], length=6 << 30)


@pytest.mark.parametrize("beginning", FLOODS.values(), ids=FLOODS)
def test_an_owner_cannot_send_gigabytes_for_a_small_handle(serve: Callable[..., FaultServer], beginning: bytes) -> None:
    flood = Flood(beginning, b"400\r\n" + b"A" * 1024 + b"\r\n" if beginning == CHUNKED else b"A" * (1 << 18))
    server = serve(flood)
    runtime.configure(device="cpu")
    with pytest.raises(FetchError) as caught:
        RTensor.localize(remote(server.address, "s", SHARD))
    assert isinstance(caught.value.failures["s"], ShardAnswerError)
    assert server.address in str(caught.value)
    assert flood.num_sent < IN_SOCKETS
    assert len(server.asked) == 1


@pytest.mark.parametrize("form", [frames_of, json_of])
@pytest.mark.parametrize(
    "found",
    [
        patterned(torch.float32, 1023),
        patterned(torch.float32, 1025),
        patterned(torch.int32, 1024),
        patterned(torch.float32, 32, 32),
        patterned(torch.float64, 512),
        torch.empty(0),
        torch.zeros(()),
    ],
    ids=lambda found: f"{found.dtype} {tuple(found.shape)}",
)
def test_a_shard_that_is_not_as_promised_fails_alone(
    serve: Callable[..., FaultServer], form: Callable[..., Answer], found: torch.Tensor
) -> None:
    server = serve(whole(form({**OTHERS, "s": found})))
    runtime.configure(device="cpu")
    promised = {**OTHERS, "s": SHARD}
    handles = {name: remote(server.address, name, tensor) for name, tensor in promised.items()}
    with pytest.raises(FetchError) as caught:
        RTensor.localize(handles)
    (error,) = caught.value.failures.values()
    assert isinstance(error, ShardAnswerError)
    assert f"shard s from {server.address}: torch.float32 of shape [1024] is promised, {found.dtype} of shape " in str(
        error
    )
    assert str(error).endswith(f"{list(found.shape)} was found")
    del handles["s"], caught, error
    localized = RTensor.localize(handles)
    assert all(same_bits(localized[name], OTHERS[name]) for name in OTHERS)
    assert ["s"] not in server.wanted
    assert len(server.wanted) == (2 if form is frames_of else 1), "the others came with what was refused, or at once"


def test_one_that_makes_an_array_too_long_is_found_by_halves(serve: Callable[..., FaultServer]) -> None:
    server = serve(whole(json_of({**OTHERS, "s": patterned(torch.uint8, 1 << 20)})))
    runtime.configure(device="cpu")
    handles = {name: remote(server.address, name, tensor) for name, tensor in {**OTHERS, "s": SHARD}.items()}
    got = RTensor.localize(handles, on_error="none")
    assert got["s"] is None
    assert all(same_bits(got[name], OTHERS[name]) for name in OTHERS)
    assert len(server.wanted) < 2 * len(handles)


KINDS = st.tuples(st.sampled_from(WIRE_DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple))


@pytest.mark.parametrize("form", [frames_of, json_of])
def test_no_reader_gets_a_shard_that_was_not_promised(form: Callable[..., Answer]) -> None:
    @settings(deadline=None, max_examples=100, database=None)
    @given(pairs=st.lists(st.tuples(KINDS, KINDS) | KINDS.map(lambda kind: (kind, kind)), min_size=1, max_size=5))
    def check(pairs: list[tuple[tuple[torch.dtype, tuple[int, ...]], tuple[torch.dtype, tuple[int, ...]]]]) -> None:
        had = {f"s{index}": patterned(kind[0], *kind[1], seed=index) for index, (kind, _) in enumerate(pairs)}
        server.script = [whole(form(had))]
        promised = {
            f"s{index}": torch.empty(shape, dtype=dtype, device="meta")
            for index, (_, (dtype, shape)) in enumerate(pairs)
        }
        reader = reader_of(server.address, list(had), promised=promised)
        got = drained(reader)
        kept = {
            name for name in had if (had[name].dtype, had[name].shape) == (promised[name].dtype, promised[name].shape)
        }
        assert got.keys() == kept
        assert reader.failures.keys() == had.keys() - kept
        assert all(same_bits(got[name], had[name]) for name in kept)

    with FaultServer(whole(b"")) as server:
        check()


def test_a_shard_may_be_as_long_as_its_handle_promises(serve: Callable[..., FaultServer]) -> None:
    num_bytes = 9 << 30
    server = serve(Flood(frame_of_gigabytes(num_bytes), b"A" * 4096, most=1 << 20))
    reader = reader_of(server.address, ["s"], promised={"s": of_bytes(num_bytes)})
    specs = reader.next_specs()
    assert specs is not None
    assert [(spec.key, spec.nbytes) for spec in specs] == [("s", num_bytes)]
    room = bytearray(100_000)
    reader.read_into([memoryview(room)])
    assert room == b"A" * 100_000
    reader.cancel()
    reader.close()


def test_without_a_promise_there_is_a_limit(serve: Callable[..., FaultServer]) -> None:
    with pytest.raises(ValueError, match="max_unknown_bytes=0: must be at least 1, and a whole number"):
        HttpRTensorBackend(max_unknown_bytes=0)
    backend = with_settings(HttpRTensorBackend(max_unknown_bytes=4096), retry_pause_s=0.0)
    for form in (frames_of, json_of):
        server = serve(whole(form({"s": SHARD, "t": patterned(torch.uint8, 20_000)})))
        assert same_bits(backend.fetch([TensorShardInfo("s", server.address)])[0], SHARD)
        with pytest.raises(ShardAnswerError, match=r"has 20,000 bytes, no .* 4,096 |JSON; expected 1 to 10,240"):
            backend.fetch([TensorShardInfo(name, server.address) for name in "st"])
    backend.close()


PROMISED = {"s": of_bytes(3 << 20)}
BOMBS = {
    "nested": b"[" * (1 << 20),
    "empty lists": b"[" + b"[]," * (1 << 20) + b"[]]",
    "empty objects": b"[" + b"{}," * (1 << 20) + b"{}]",
    "numbers": b"[" + b"1," * (1 << 20) + b"1]",
    "a long number": b"[" + b"9" * (1 << 20) + b"]",
    "a long string": b'["' + b"A" * (1 << 20) + b'"]',
    "a long dtype": json.dumps([tensor_to_json(SHARD) | {"dtype": "torch." + "x" * (1 << 20)}]).encode(),
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_json_that_is_no_tensor_costs_no_more_than_its_length(serve: Callable[..., FaultServer], body: bytes) -> None:
    reader = reader_of(serve(whole(reply(body, content_type=OCTETS))).address, ["s"], promised=PROMISED)
    try:
        drained(reader)
    except ShardAnswerError as error:
        reader.failures["s"] = error
    assert len(str(reader.failures["s"])) < 500
    if body.count(b"[") + body.count(b"{") + body.count(b",") > 1000:
        assert "brackets and commas in JSON; 1 tensors have 256 at most" in str(reader.failures["s"])


def test_a_header_is_as_long_as_its_shards_make_it(serve: Callable[..., FaultServer]) -> None:
    head = raw_frame('{"__metadata__":{"ids":"[\\"s\\"]"},"0":' + "[" + "[]," * 1_000_000)
    flood = Flood(reply(head[: 1 << 16], length=6 << 30))
    reader = reader_of(serve(flood).address, ["s"], promised=PROMISED)
    assert drained(reader) == {}
    assert "bytes; one about 1 shards has 4,618 at most" in str(reader.failures["s"])
    assert flood.num_sent < IN_SOCKETS
    long_id, rank = "\u00e4\U0001f642" * 2000, patterned(torch.complex32, *[1] * 64)
    many = {f"{long_id}{n}": rank for n in range(50)}
    assert drained(reader_of(serve(whole(frames_of(many))).address, list(many))).keys() == many.keys()


def test_a_refusal_is_read_as_far_as_the_ids_need(serve: Callable[..., FaultServer]) -> None:
    flood = Flood(reply(b"", "400 Bad Request", "application/json", length=1 << 40))
    server = serve(flood)
    text = failure(server, "s", promised=PROMISED)
    assert len(text) < 3000
    assert flood.num_sent < IN_SOCKETS
    ids = [f"\u00e4{'x' * 90}{number}" for number in range(4096)]
    server = serve(whole(frames_of({})))
    reader = reader_of(server.address, ids, promised=dict.fromkeys(ids, SHARD), max_json_shards=4096)
    assert drained(reader) == {}
    assert all(isinstance(reader.failures[name], ShardMissingError) for name in ids)


def test_an_owner_cannot_send_gigabytes_after_a_clear(serve: Callable[..., FaultServer]) -> None:
    backend = with_settings(HttpRTensorBackend(), retry_pause_s=0.0)
    for beginning in (reply(b"{", length=1 << 40), CHUNKED + b"ffffffff\r\n{"):
        flood = Flood(beginning)
        server = serve(flood)
        with pytest.raises(FetchError, match=f"Failed to clear shards at http://{server.address}/data/clear: "):
            delete(backend, server.address, "s")
        assert flood.num_sent < IN_SOCKETS
    backend.close()


@pytest.mark.parametrize("told", ["9" * 5000, "9" * 400, "1e999", "-1", "nan", "\u00b2"])
def test_an_owner_that_is_busy_for_ever_is_not_waited_for(serve: Callable[..., FaultServer], told: str) -> None:
    busy = reply(b"later", "503 Busy", Retry_After="3600").replace(b"3600", told.encode("latin-1"))
    text = failure(serve(whole(busy)), "s", timeout_s=0.3)
    assert "503 body=later" in text
    assert len(text) < 500


def test_a_strangers_answer_is_quoted_in_part(serve: Callable[..., FaultServer]) -> None:
    assert len(failure(serve(whole(b"x" * 60_000 + b"\r\n\r\n")), "s")) < 3000
    answer = by("y" * 60_000, lambda asked: refusal(401, "who are you?"))
    server = serve(whole(by("x", frames_of({"s": SHARD}))), whole(answer))
    reader = reader_of(server.address, ["s"])
    drained(reader)
    again = reader_of(server.address, ["s"], node=reader._node_state)
    with pytest.raises(ShardRefusedError):
        drained(again)
    assert reader._node_state.restart is not None
    assert len(reader._node_state.restart.now) == 64
