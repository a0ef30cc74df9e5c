"""Answers that are no use: each fails for itself, by name, and the next request works."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from gpu_cache.rpc.client.pool import ConnectionPool
from gpu_cache.rpc.wire.serialization import tensor_to_json
from tests.support.bad_frames import BAD_FRAMES, PAIR, A, B
from tests.support.fault_server import FaultServer, frames_of, json_of, reply, whole
from tests.support.reading import drained, failure, reader_of
from tests.support.wire_tensors import same_bits

OCTETS = "application/octet-stream"


@pytest.mark.parametrize("body", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_frame_that_breaks_the_format_is_no_use(serve: Callable[..., FaultServer], body: bytes) -> None:
    server, pool = serve(whole(reply(body)), whole(frames_of(PAIR))), ConnectionPool()
    failure(server, pool=pool)
    assert len(server.asked) == 1, "what is broken is not asked for again"
    tensors = drained(reader_of(server.address, ["a", "b"], pool=pool))
    assert same_bits(tensors["a"], A)
    pool.close()


BAD_ARRAYS: dict[str, tuple[bytes, str]] = {
    "too few": (json.dumps([tensor_to_json(A)]).encode(), "returned 1 shards for 2 requested"),
    "too many": (json.dumps([tensor_to_json(A)] * 3).encode(), "returned 3 shards for 2 requested"),
    "no list": (json.dumps(tensor_to_json(A)).encode(), "not a list but"),
    "a number": (b"7", "not a list but 7"),
    "junk": (b"[nonsense", "Expecting value"),
    "deep": (b"[" * 100_000, "100,000 brackets and commas in JSON; 2 tensors have 512 at most"),
    "no text": (b'["\xff"]', "decode"),
    "nothing": (b"", "0 bytes of JSON"),
}


@pytest.mark.parametrize(("body", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_an_array_that_is_none_is_no_use(serve: Callable[..., FaultServer], body: bytes, message: str) -> None:
    server = serve(whole(reply(body, content_type=OCTETS)), whole(json_of(PAIR)))
    text = failure(server)
    assert message in text
    assert text.startswith(("Failed to fetch shard batch from", f"Batch fetch from http://{server.address}/data/batch"))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "bad",
    [
        7,
        {"type": "tensor", "data": None, "shape": [1], "dtype": "torch.float32"},
        tensor_to_json(A) | {"shape": [-1]},
        tensor_to_json(A) | {"shape": [1 << 62, 1 << 62]},
        tensor_to_json(A) | {"dtype": "torch.float31"},
        tensor_to_json(A) | {"data": "!" * 32},
    ],
)
def test_a_bad_element_fails_alone(serve: Callable[..., FaultServer], bad: object) -> None:
    server = serve(whole(reply(json.dumps([bad, tensor_to_json(B)]).encode(), content_type=OCTETS)))
    reader = reader_of(server.address, ["a", "b"])
    assert same_bits(drained(reader)["b"], B)
    assert list(reader.failures) == ["a"]
    assert str(reader.failures["a"]).endswith("(shards 'a')")
    assert server.address in str(reader.failures["a"])
