"""Long texts of JSON: made in parts, taken apart without being parsed, and refused before they cost anything."""

from __future__ import annotations

import json

import pytest
import torch

from gpu_cache.rpc.server import answers
from gpu_cache.rpc.server.main import ServerHandle
from gpu_cache.rpc.wire import serialization
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, OwnedShard, decode_frame
from gpu_cache.rpc.wire.serialization import TensorText, tensor_from_json, tensor_from_text, tensor_to_json
from tests.support.data_routes import BINARY, ask, assert_refused, batch
from tests.support.fake_owner import FakeOwner
from tests.support.wire_tensors import WIRE_DTYPES, patterned, raw_bytes, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize("dtype", WIRE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 11), (2, 40)], ids=str)
def test_a_text_made_in_parts_is_the_text_of_the_whole(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = patterned(dtype, *shape)
    monkeypatch.setattr(serialization, "_ENCODED_CHUNK", 96)
    text = TensorText(tensor)
    made = b"".join(text)
    assert len(made) == text.nbytes
    assert same_bits(tensor_from_json(json.loads(made)), tensor)
    monkeypatch.undo()
    assert json.loads(made) == tensor_to_json(tensor)
    assert made.decode() == json.dumps(tensor_to_json(tensor))


def test_the_text_of_a_meta_tensor_and_of_a_view() -> None:
    for tensor in (torch.empty(3, device="meta"), torch.arange(12).view(3, 4).t(), torch.ones(4)[::2]):
        assert b"".join(TensorText(tensor)).decode() == json.dumps(tensor_to_json(tensor))


def test_a_long_answer_is_made_in_parts_and_arrives_whole(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_JOINED_BYTES", 1000)
    monkeypatch.setattr(serialization, "_ENCODED_CHUNK", 3000)
    owner.store.update({"a": patterned(torch.float32, 5000), "b": patterned(torch.bfloat16, 777)})
    found = batch(server, "a", "b", "a").json
    assert all(same_bits(tensor_from_json(one), owner.store[name]) for one, name in zip(found, "aba", strict=True))
    assert same_bits(tensor_from_json(ask(server, "GET", "/data/a").json), owner.store["a"])


def test_tensors_are_sent_together_up_to_a_mebibyte_and_the_header_alone() -> None:
    tensors = [patterned(torch.float32, 2304, seed=index) for index in range(300)] + [torch.ones(1 << 19)]
    answer = answers.frame_answer([(str(index), OwnedShard(tensor)) for index, tensor in enumerate(tensors)])
    header, *groups = answer.groups
    assert [len(header), *map(len, groups)] == [1, 113, 113, 74, 1]
    assert b"".join(b"".join(group) for group in groups) == b"".join(map(raw_bytes, tensors))


def test_a_small_frame_is_one_part() -> None:
    tensors = {"a": patterned(torch.float32, 100), "b": patterned(torch.int64, 3)}
    answer = answers.frame_answer([(shard_id, OwnedShard(tensor)) for shard_id, tensor in tensors.items()])
    ((part,),) = answer.groups
    found = decode_frame(part)
    assert len(part) == answer.nbytes
    assert all(same_bits(found[shard_id], tensor) for shard_id, tensor in tensors.items())


def test_no_part_of_an_answer_is_empty() -> None:
    tensors = [torch.empty(0, 3), torch.ones(2), torch.ones(3), torch.empty(0)]
    for wanted in (tensors, tensors[:1], []):
        answer = answers.frame_answer([(str(index), OwnedShard(tensor)) for index, tensor in enumerate(wanted)])
        header, *groups = answer.groups
        assert all(len(part) for group in (header, *groups) for part in group)
        assert sum(len(part) for group in (header, *groups) for part in group) == answer.nbytes


@pytest.mark.parametrize("empty", [0, 1, 300])
def test_small_tensors_travel_with_empty_and_large_ones(server: ServerHandle, owner: FakeOwner, empty: int) -> None:
    tensors = {f"empty{number}": torch.empty(0, 3) for number in range(empty)}
    tensors |= {f"small{number}": patterned(torch.float32, number) for number in range(500)}
    tensors |= {"large": patterned(torch.int64, 400_000), "one": torch.ones((), dtype=torch.uint8)}
    owner.store.update(tensors)
    found = decode_frame(batch(server, *tensors, headers=BINARY).body)
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", "\t:  ")])
@pytest.mark.parametrize("first", ["type", "data"])
def test_a_long_tensor_is_taken_from_its_text(separators: tuple[str, str], first: str) -> None:
    tensor = patterned(torch.float32, 50_000)
    described = tensor_to_json(tensor)
    described = {first: described.pop(first)} | described | {"x": '"data": "'}
    assert same_bits(tensor_from_text(json.dumps(described, separators=separators).encode()), tensor)


DATA = tensor_to_json(patterned(torch.uint8, 90_000))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"x": {"data": DATA["data"]}} | DATA | {"data": "AAAA"}),
        json.dumps(DATA)[:-1] + ', "data": "AAAA"}',
        json.dumps([DATA]),
        json.dumps(DATA["data"]),
        json.dumps({"data": DATA["data"]}),
        json.dumps(DATA)[:-50],
        json.dumps(DATA).replace("A", "\\u0041", 1),
        json.dumps({"x": "y" * 70_000} | DATA),
        json.dumps(DATA | {"data": [DATA["data"]]}),
        "[" * 1_000_000,
        "[" + "[]," * 300_000 + "[]]",
        '{"data": "' + "[" * 1_000_000,
        '{"data": "' + '","' * 300_000,
    ],
    ids=range(13),
)
def test_a_long_text_of_anything_else_is_refused(server: ServerHandle, owner: FakeOwner, text: str) -> None:
    reply = ask(server, "PUT", "/data/a", text.encode())
    assert (reply.status, reply.json["status"]) == (400, "error")
    assert len(owner.store) == 0


def test_long_texts_are_not_parsed(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    loads = json.loads
    monkeypatch.setattr(serialization.json, "loads", lambda text: parsed.append(len(text)) or loads(text))
    assert ask(server, "PUT", "/data/a", b"[" + b"[]," * 2_000_000 + b"[]]").status == 400
    assert ask(server, "PUT", "/data/a", tensor_to_json(patterned(torch.uint8, 4_000_000))).status == 200
    assert ask(server, "POST", "/data/batch", {"shard_ids": ["a"] * 3_000_000}).status == 413
    assert ask(server, "POST", "/data/batch", b'{"shard_ids":[' + b"[]," * 1_000_000 + b"1]}").status == 413
    assert max(parsed) < 1000


@pytest.mark.parametrize(("method", "path"), [("POST", "/data/batch"), ("DELETE", "/data/clear")])
def test_more_ids_than_any_request_has_are_refused(server: ServerHandle, method: str, path: str) -> None:
    assert_refused(
        ask(server, method, path, {"shard_ids": ["a"] * 70_000}),
        413,
        "about 70,000 shard ids in one request, the limit is 65,536",
    )
    reply = ask(server, method, path, {"shard_ids": ["x" * 5_000_000]})
    assert reply.status == 413
    assert reply.json["message"].endswith("bytes, the limit is 4,194,304")
    assert ask(server, method, path, {"shard_ids": ["a"] * 65_536}).status in (200, 400)


def test_all_ids_that_are_missing_are_named(server: ServerHandle) -> None:
    shard_ids = [f"{number:036}" for number in range(65_536)]
    assert batch(server, *shard_ids).json["missing_shard_ids"] == shard_ids


def test_an_array_longer_than_any_may_be_is_refused_unless_it_is_one_shard(
    server: ServerHandle, owner: FakeOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_ARRAY_BYTES", 10_000)
    owner.store["a"] = torch.ones(10_000)
    assert batch(server, "a").status == 200
    assert batch(server, *["a"] * 20_000, headers=BINARY).status == 200
    nbytes = 20_000 * (len(json.dumps(tensor_to_json(owner.store["a"]))) + 1) + 1
    said = f"20,000 shards are {nbytes:,} bytes of JSON, the limit is 10,000; ask for fewer at a time, or for "
    assert_refused(batch(server, *["a"] * 20_000), 413, said + CONTENT_TYPE)


def test_a_frame_with_a_long_header_is_refused(server: ServerHandle) -> None:
    header = b"[" + b"[]," * 1_000_000 + b"[]]"
    reply = ask(server, "PUT", "/data/a", len(header).to_bytes(8, "little") + header, {"Content-Type": CONTENT_TYPE})
    assert_refused(reply, 400, f"a header of {len(header):,} bytes for one tensor, the limit is 65,536")
