"""The /data routes, asked by a plain HTTP client over loopback."""

from __future__ import annotations

from urllib.parse import quote

import pytest
import torch

from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.wire import frame
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, Frame, decode_frame
from gpu_cache.rpc.wire.serialization import deserialize_value, serialize_value, tensor_from_json
from tests.support.data_routes import BINARY, ask, assert_refused, batch
from tests.support.fake_owner import FakeOwner
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

BATCH_MESSAGE = "Expected JSON body with string list field 'shard_ids'"
LIST_MESSAGE = "'shard_ids' must be a list"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128], ids=str)
def test_a_shard_put_as_json_is_stored_bit_for_bit(server: ServerHandle, owner: FakeOwner, dtype: torch.dtype) -> None:
    tensor = patterned(dtype, 3, 4)
    reply = ask(server, "PUT", "/data/abc", serialize_value(tensor))
    assert (reply.status, reply.json) == (200, {"status": "ok", "shard_id": "abc"})
    assert same_bits(owner.store["abc"], tensor)


def test_a_shard_put_as_a_frame_is_stored_bit_for_bit(server: ServerHandle, owner: FakeOwner) -> None:
    tensor = patterned(torch.complex32, 3, 4)
    frame = b"".join(Frame([("abc", tensor)]))
    reply = ask(server, "PUT", "/data/abc", frame, {"Content-Type": CONTENT_TYPE})
    assert (reply.status, reply.json) == (200, {"status": "ok", "shard_id": "abc"})
    assert same_bits(owner.store["abc"], tensor)
    assert owner.store["abc"].untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting"),
        (b"", "Expecting"),
        (b"\xff\xfe\x00", ""),
        (b"[" * 60_000, "recursion"),
        (b"[" * 100_000, "100,000 bytes of JSON, and at most 65,536 may stand beside its data"),
        ([1, 2], "not a tensor: [1, 2]"),
        ({"type": "ndarray", "data": "", "shape": [0], "dtype": "<f4"}, "not a tensor"),
        ({"type": "dataclass", "class_path": "os.system", "data": {}}, "not a tensor"),
        ({"type": "tensor", "data": "AAAA", "shape": [4], "dtype": "torch.uint8"}, "4 bytes need 8 characters"),
        ({"type": "tensor", "data": None, "shape": [4], "dtype": "torch.uint8"}, "has no data to store"),
    ],
)
def test_a_body_that_is_no_tensor_is_refused_and_not_stored(
    server: ServerHandle, owner: FakeOwner, body: object, message: str
) -> None:
    reply = ask(server, "PUT", "/data/abc", body)
    assert (reply.status, reply.json["status"]) == (400, "error")
    assert message in reply.json["message"]
    assert len(owner.store) == 0


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"junk that is no frame", "announce a header"),
        (b"".join(Frame([("other", torch.ones(1))])), "expected one tensor with the id abc, got ['other']"),
        (
            b"".join(Frame([("abc", torch.ones(1)), ("d", torch.ones(1))])),
            "expected one tensor with the id abc, got ['abc', 'd']",
        ),
        (b"".join(Frame([("abc", torch.ones(1))])) + b"x", "describes 4 bytes of data, 5 are announced"),
    ],
    ids=["junk", "other id", "two", "trailing"],
)
def test_a_wrong_frame_is_refused_and_not_stored(
    server: ServerHandle, owner: FakeOwner, frame: bytes, message: str
) -> None:
    reply = ask(server, "PUT", "/data/abc", frame, {"Content-Type": CONTENT_TYPE})
    assert (reply.status, reply.json["status"]) == (400, "error")
    assert message in reply.json["message"]
    assert len(owner.store) == 0


def test_a_second_put_replaces_the_first(server: ServerHandle, owner: FakeOwner) -> None:
    ask(server, "PUT", "/data/a", serialize_value(torch.ones(4)))
    ask(server, "PUT", "/data/a", serialize_value(torch.zeros(1)))
    assert owner.store["a"].tolist() == [0.0]
    assert owner.store.stats() == {"num_tensors": 1, "total_bytes": 4}


@pytest.mark.parametrize("headers", [{}, BINARY], ids=["any", "asking for binary"])
def test_one_shard_is_answered_as_json_text(server: ServerHandle, owner: FakeOwner, headers: dict[str, str]) -> None:
    owner.store["abc"] = patterned(torch.bfloat16, 2, 3)
    reply = ask(server, "GET", "/data/abc", headers=headers)
    assert (reply.status, reply.content_type) == (200, "application/octet-stream")
    assert same_bits(tensor_from_json(reply.json), owner.store["abc"])


def test_an_unknown_shard_is_not_found(server: ServerHandle) -> None:
    assert_refused(ask(server, "GET", "/data/abc"), 404, "Shard abc not found")


@pytest.mark.parametrize(
    "shard_id", ["a/b", "a%2Fb", "späß 🙂", "a b?c#d&e=f", "batch", "clear", "reclaim", "x+y", "a\nb"]
)
def test_ids_are_taken_as_they_are(server: ServerHandle, owner: FakeOwner, shard_id: str) -> None:
    path = f"/data/{quote(shard_id, safe='')}"
    reply = ask(server, "PUT", path, serialize_value(torch.ones(2)))
    assert (reply.status, reply.json["shard_id"]) == (200, shard_id)
    assert list(owner.store) == [shard_id]
    assert ask(server, "GET", path).status == 200


def test_a_json_batch_is_answered_in_order_with_repeats(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update({"a": torch.tensor([1]), "b": patterned(torch.float16, 2, 2)})
    reply = batch(server, "b", "a", "b")
    assert (reply.status, reply.content_type) == (200, "application/octet-stream")
    tensors = deserialize_value(reply.json)
    assert len(tensors) == 3
    assert same_bits(tensors[0], owner.store["b"])
    assert same_bits(tensors[1], owner.store["a"])
    assert same_bits(tensors[2], owner.store["b"])


def test_a_binary_batch_has_each_distinct_shard_once(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update({"a": torch.tensor([1]), "b": patterned(torch.float16, 2, 2)})
    reply = batch(server, "b", "a", "b", headers=BINARY)
    assert (reply.status, reply.content_type) == (200, CONTENT_TYPE)
    assert reply.body == b"".join(Frame(owner.store.get_many(["b", "a"])[0]))


def test_a_binary_batch_of_all_dtypes_and_lengths_arrives_bit_for_bit(server: ServerHandle, owner: FakeOwner) -> None:
    for dtype in WIRE_DTYPES:
        owner.store[f"small {dtype}"] = patterned(dtype, 3, 7)
        owner.store[f"large {dtype}"] = patterned(dtype, 150_001)
    owner.store["larger"] = patterned(torch.float32, 1_000_003)
    owner.store["empty"] = torch.empty(0, 5)
    arrived = decode_frame(batch(server, *owner.store, headers=BINARY).body)
    assert arrived.keys() == set(owner.store)
    assert [shard_id for shard_id in owner.store if not same_bits(arrived[shard_id], owner.store[shard_id])] == []


def test_an_empty_batch_is_an_answer(server: ServerHandle) -> None:
    assert batch(server).json == []
    assert decode_frame(batch(server, headers=BINARY).body) == {}


@pytest.mark.parametrize("headers", [{}, BINARY], ids=["json", "binary"])
def test_missing_shards_are_named_in_request_order(
    server: ServerHandle, owner: FakeOwner, headers: dict[str, str]
) -> None:
    owner.store["a"] = torch.ones(1)
    reply = batch(server, "z", "a", "y", headers=headers)
    assert reply.status == 400
    assert reply.json == {
        "status": "error",
        "message": "One or more requested shards were not found",
        "missing_shard_ids": ["z", "y"],
    }


BAD_BODIES = [b"", b"{", b"[" * 100_000, b"\xff", [], "text", None, {}, {"shard_ids": None}, {"shard_ids": "ab"}]
BAD_BODIES += [{"shard_ids": {"a": 1}}]


@pytest.mark.parametrize("body", [*BAD_BODIES, {"shard_ids": [1]}, {"shard_ids": ["a", None]}], ids=repr)
def test_a_batch_with_a_bad_body_is_refused(server: ServerHandle, body: object) -> None:
    assert_refused(ask(server, "POST", "/data/batch", body), 400, BATCH_MESSAGE)


def test_more_shards_than_fit_a_frame_are_refused(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "MAX_TENSORS", 2)
    owner.store.update({name: torch.ones(1) for name in "abc"})
    assert_refused(batch(server, *"abc", headers=BINARY), 400, "3 ids; a frame has at most 2")
    assert batch(server, *"abc").status == 200


def test_a_stored_tensor_that_cannot_travel_is_a_fault_and_the_next_request_works(
    server: ServerHandle, owner: FakeOwner
) -> None:
    owner.store.update({"odd": torch.empty(2, dtype=torch.uint4), "fine": torch.ones(1)})
    for headers in ({}, BINARY):
        reply = batch(server, "fine", "odd", headers=headers)
        assert_refused(reply, 500, "tensors of torch.uint4 do not travel; call view(torch.uint8) first")
    assert batch(server, "fine", headers=BINARY).status == 200


def test_clear_removes_from_the_store_and_from_the_owners_cache(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update({name: torch.ones(2) for name in "abc"})
    reply = ask(server, "DELETE", "/data/clear", {"shard_ids": ["a", "unknown", "b"]})
    assert reply.status == 200
    assert reply.json == {"status": "ok", "cleared_count": 2, "num_tensors": 1, "total_bytes": 8}
    assert owner.evicted == ["a", "unknown", "b"]


def test_a_bad_id_never_keeps_the_others_from_being_cleared(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update({name: torch.ones(2) for name in "ab"})
    reply = ask(server, "DELETE", "/data/clear", {"shard_ids": [7, "a", ["x"], {"y": 1}, None, "b"]})
    assert (reply.status, reply.json["cleared_count"]) == (200, 2)
    assert owner.evicted == ["a", "b"]


@pytest.mark.parametrize("body", BAD_BODIES, ids=repr)
def test_clear_with_a_bad_body_is_refused(server: ServerHandle, body: object) -> None:
    assert_refused(ask(server, "DELETE", "/data/clear", body), 400, LIST_MESSAGE)


def test_a_failing_eviction_is_reported_but_the_store_is_cleared(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store["a"] = torch.ones(2)
    owner.eviction_error = RuntimeError("cache broken")
    assert_refused(ask(server, "DELETE", "/data/clear", {"shard_ids": ["a"]}), 500, "cache broken")
    assert len(owner.store) == 0


def test_serials_tell_which_shards_there_are_and_whether_they_are_the_same(
    server: ServerHandle, owner: FakeOwner
) -> None:
    def serials() -> list[str | None]:
        reply = ask(server, "POST", "/data/serials", {"shard_ids": ["a", "gone", "b", "a"]})
        assert reply.status == 200
        found: list[str | None] = reply.json["serials"]
        return found

    owner.store.update({"a": torch.ones(1), "b": torch.ones(1)})
    before = serials()
    assert before == serials()
    assert (before[1], before[0], len(set(before))) == (None, before[3], 3)
    owner.store["a"] = torch.ones(1)
    owner.store["b"].add_(1)
    owner.store["gone"] = torch.ones(1)
    assert not set(before) & set(serials())


@pytest.mark.parametrize("body", BAD_BODIES, ids=repr)
def test_serials_with_a_bad_body_are_refused(server: ServerHandle, body: object) -> None:
    assert_refused(ask(server, "POST", "/data/serials", body), 400, BATCH_MESSAGE)


@pytest.mark.parametrize("trims", [True, False])
def test_reclaim_says_whether_memory_was_given_back(server: ServerHandle, owner: FakeOwner, trims: bool) -> None:
    owner.trims = trims
    reply = ask(server, "POST", "/data/reclaim")
    assert (reply.status, reply.json) == (200, {"status": "ok", "trimmed": trims})


def test_health_counts_what_is_stored_and_what_was_sent(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store.update({"a": torch.ones(10), "b": torch.ones(1)})
    bodies = [
        batch(server, "a", "b", headers=BINARY).body,
        batch(server, "a", "a").body,
        ask(server, "GET", "/data/b").body,
    ]
    batch(server, "missing")
    reply = ask(server, "GET", "/health")
    assert (reply.status, {key: reply.json[key] for key in reply.json.keys() - {"incarnation", "same_host"}}) == (
        200,
        {
            "num_responses": 0,
            "num_busy_refusals": 0,
            "status": "ok",
            "num_tensors": 2,
            "total_bytes": 44,
            "sent_payload_bytes": 44 + 80 + 4,
            "sent_body_bytes": sum(map(len, bodies)),
            "expired_shards": 0,
            "expired_bytes": 0,
        },
    )
