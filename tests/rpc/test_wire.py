"""The binary frame: a safetensors document both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES
from safetensors.torch import load, save

from gpu_cache import ShardSpec
from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire import frame as frames
from gpu_cache.rpc.wire.frame import Frame, decode_frame, header_nbytes, parse_header, serials_of
from tests.support.wire_tensors import WIRE_DTYPES, framed, patterned, raw_bytes, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

UNNAMED_DTYPES = {torch.complex32, torch.complex128, torch.float8_e8m0fnu}


def header_of(frame: bytes) -> dict[str, Any]:
    return json.loads(frame[8 : 8 + header_nbytes(frame[:8], len(frame))])


@pytest.mark.parametrize("dtype", WIRE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3), (70_000,)], ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = patterned(dtype, *shape)
    arrived = decode_frame(framed(("a shard", tensor)))
    assert list(arrived) == ["a shard"]
    assert same_bits(arrived["a shard"], tensor)


def test_a_frame_of_all_dtypes_arrives_bit_for_bit() -> None:
    items = [(f"{dtype}/{seed}", patterned(dtype, 2, seed, seed=seed)) for seed in range(3) for dtype in WIRE_DTYPES]
    arrived = decode_frame(framed(*items))
    assert arrived.keys() == dict(items).keys()
    assert [shard_id for shard_id, tensor in items if not same_bits(arrived[shard_id], tensor)] == []


def test_all_bfloat16_patterns_arrive_bit_for_bit() -> None:
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert same_bits(decode_frame(framed(("x", tensor)))["x"], tensor)


@pytest.mark.parametrize("columns", [6, 40_000], ids=["joined", "uncopied"])
def test_memory_order_gradients_and_lazy_conjugation_do_not_show(columns: int) -> None:
    tensor = patterned(torch.complex64, 4, columns)
    views = [tensor.t(), tensor[:, ::2], tensor[1:3, 2], tensor[3:, 1::columns], tensor.conj(), tensor.conj().imag]
    views.append(torch.nn.Parameter(torch.arange(float(columns))))
    arrived = decode_frame(framed(*((str(index), view) for index, view in enumerate(views))))
    for index, view in enumerate(views):
        assert same_bits(arrived[str(index)], view.detach().resolve_conj().resolve_neg()), index
    assert not arrived["6"].requires_grad


@pytest.mark.parametrize("dtype", sorted(set(WIRE_DTYPES) - UNNAMED_DTYPES, key=str), ids=str)
def test_the_safetensors_library_reads_what_we_write(dtype: torch.dtype) -> None:
    if dtype not in SAFETENSORS_DTYPES.values():
        pytest.skip(f"this release of safetensors has no name for {dtype}")
    first, second = patterned(dtype, 3, 5), patterned(dtype, 2, seed=1)
    loaded = load(framed(("x", first), ("y", second)))
    assert loaded.keys() == {"0", "1"}
    assert same_bits(loaded["0"], first)
    assert same_bits(loaded["1"], second)


@pytest.mark.parametrize("dtype", sorted(UNNAMED_DTYPES, key=str), ids=str)
def test_a_dtype_without_a_name_is_raw_bytes_to_the_safetensors_library(dtype: torch.dtype) -> None:
    tensor = patterned(dtype, 2, 3)
    frame = framed(("x", torch.ones(1)), ("y", tensor))
    assert load(frame)["1"].numpy().tobytes() == raw_bytes(tensor)
    raw = json.loads(header_of(frame)["__metadata__"]["raw"])
    assert raw == {"1": [str(dtype).removeprefix("torch."), [2, 3]]}


def test_we_read_what_the_safetensors_library_writes() -> None:
    tensors = {"0": patterned(torch.int16, 3), "1": patterned(torch.float64, 2, 2), "2": patterned(torch.bool, 5)}
    arrived = decode_frame(save(tensors, metadata={"ids": '["a", "b", "c"]', "format": "pt"}))
    assert arrived.keys() == {"a", "b", "c"}
    assert same_bits(arrived["a"], tensors["0"])
    assert same_bits(arrived["b"], tensors["1"])
    assert same_bits(arrived["c"], tensors["2"])


def test_bytes_are_packed_widest_dtype_first_and_in_request_order_within_one() -> None:
    items = [
        ("b0", patterned(torch.bool, 3)),
        ("f0", patterned(torch.float32, 2)),
        ("h0", patterned(torch.bfloat16, 1)),
        ("i0", patterned(torch.int32, 1)),
        ("c0", patterned(torch.complex128, 1)),
        ("f1", patterned(torch.float32, 1, seed=1)),
        ("l0", patterned(torch.int64, 1)),
    ]
    frame = framed(*items)
    begins = {item[0]: header_of(frame)[str(index)]["data_offsets"][0] for index, item in enumerate(items)}
    by_place = sorted(begins, key=begins.__getitem__)
    assert by_place[:2] == ["c0", "l0"]
    assert by_place[-2:] == ["h0", "b0"]
    assert begins["f1"] == begins["f0"] + 8
    data = frame[8 + header_nbytes(frame[:8], len(frame)) :]
    assert data == b"".join(raw_bytes(dict(items)[shard_id]) for shard_id in by_place)
    assert (len(frame) - len(data)) % 8 == 0


def test_entries_describe_the_shards_in_the_order_of_their_bytes() -> None:
    frame = framed(("half", patterned(torch.float16, 2, 2)), ("none", torch.empty(0)), ("raw", torch.ones(1).cdouble()))
    start = 8 + header_nbytes(frame[:8], len(frame))
    entries = parse_header(frame[8:start], len(frame) - start)
    assert [(each.key, each.dtype, each.shape, each.nbytes) for each in entries] == [
        ("raw", torch.complex128, (1,), 16),
        ("none", torch.float32, (0,), 0),
        ("half", torch.float16, (2, 2), 8),
    ]


def test_ids_are_opaque() -> None:
    ids = ["0", "1", "__metadata__", "", "ids", 'quote"\\\n', "späť/%2F 🙂", "\ud800"]
    items = [(shard_id, torch.tensor([number])) for number, shard_id in enumerate(ids)]
    arrived = decode_frame(framed(*items))
    assert {shard_id: tensor.item() for shard_id, tensor in arrived.items()} == dict(zip(ids, range(8), strict=True))


def stored(**tensors: torch.Tensor) -> ShardStore:
    store = ShardStore()
    store.update(tensors)
    return store


def sent_by(store: ShardStore, *ids: str) -> bytes:
    return b"".join(Frame(store.get_many(ids)[0]))


def serials_in(frame: bytes) -> dict[str, str]:
    return serials_of(frame[8 : 8 + header_nbytes(frame[:8], len(frame))])


def test_an_owner_tells_a_serial_of_each_shard() -> None:
    store = stored(a=torch.ones(3), b=torch.ones(2), c=torch.ones(1).cdouble())
    before = serials_in(sent_by(store, "a", "b", "c"))
    assert before.keys() == {"a", "b", "c"}
    assert len(set(before.values())) == 3
    assert serials_in(sent_by(store, "c", "a")) == {"c": before["c"], "a": before["a"]}
    assert load(sent_by(store, "a", "b"))["1"].tolist() == [1, 1], "for the safetensors library it is another text"
    store["a"] = torch.ones(3)
    store["b"].add_(1)
    after = serials_in(sent_by(store, "a", "b", "c"))
    assert (before["a"] != after["a"], before["b"] != after["b"]) == (True, True)
    assert before["c"] == after["c"]
    del store["a"]
    store["a"] = torch.ones(3)
    assert serials_in(sent_by(store, "a"))["a"] not in {before["a"], after["a"]}


def test_a_shard_made_under_inference_mode_has_a_serial_too() -> None:
    with torch.inference_mode():
        store = stored(a=torch.ones(3))
    before = serials_in(sent_by(store, "a"))
    store["a"] = torch.ones(3)
    assert before != serials_in(sent_by(store, "a"))


def test_a_frame_without_an_owner_tells_no_serials() -> None:
    assert serials_in(framed(("a", torch.ones(3)))) == {}
    (_, numbered), *_ = stored(a=torch.ones(3)).get_many(["a"])[0]
    mixed = b"".join(Frame([("a", numbered), ("b", torch.ones(2))]))
    assert serials_in(mixed) == {}
    assert decode_frame(mixed).keys() == {"a", "b"}


@pytest.mark.parametrize("text", ["", "1.0", "1.0 2.0 3.0", "1.0  2.0", " "])
def test_serials_for_other_shards_are_none(text: str) -> None:
    frame = framed(("a", torch.ones(3)), ("b", torch.ones(2)))
    header = header_of(frame)
    header["__metadata__"]["serials"] = text
    assert serials_of(json.dumps(header).encode()) == {}


def test_a_header_is_recognised_with_other_serials() -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(2), "raw": torch.ones(1).cdouble()}
    specs = [ShardSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    foreseen = frames.Layout(list(tensors), specs, [frames.described(s.dtype, s.shape, s.nbytes) for s in specs])
    store = stored(**tensors)
    for frame in (framed(*tensors.items()), sent_by(store, *tensors)):
        header, length = frame[8 : 8 + header_nbytes(frame[:8], len(frame))], foreseen.payload_nbytes
        assert foreseen.is_of(header, length)
        assert not foreseen.is_of(header, length + 1)
        assert not foreseen.is_of(header[: len(header) // 2], length)
        # Any other byte but of a serial makes it another header.
        serials = json.loads(header)["__metadata__"].get("serials", "none").encode()
        for at in range(len(header.rstrip())):
            is_serial = header.find(serials) <= at < header.find(serials) + len(serials)
            assert is_serial or not foreseen.is_of(header[:at] + b"#" + header[at + 1 :], length), at


def test_a_reader_that_expects_a_length_of_true_leaves_the_headers_of_owners_alone() -> None:
    frames.described(torch.float32, (True, 19), 76)
    tensor = torch.arange(19.0).reshape(1, 19)
    assert same_bits(decode_frame(framed(("a", tensor)))["a"], tensor)


def test_an_empty_frame_is_a_frame() -> None:
    assert decode_frame(framed()) == {}


def test_the_length_is_known_before_the_parts_are_made() -> None:
    frame = Frame([("a", torch.ones(100)), ("b", patterned(torch.uint8, 300_000)), ("c", torch.empty(0))])
    assert frame.payload_nbytes == 300_400
    assert frame.nbytes == sum(map(len, frame)) == len(frame.header) + 300_400


def test_large_tensors_are_sent_from_their_own_memory() -> None:
    tensor = patterned(torch.uint8, 1 << 20)
    _, part = Frame([("x", tensor)])
    tensor[0] += 1
    assert part[0] == tensor[0]


def test_a_frame_keeps_its_tensors_after_they_left_the_store() -> None:
    frame = Frame([("x", torch.full((200_000,), 7, dtype=torch.uint8)), ("y", torch.full((3,), 7, dtype=torch.uint8))])
    assert set(b"".join(list(frame)[1:])) == {7}


def test_arrived_tensors_are_writable_and_have_memory_of_their_own() -> None:
    buffer = bytearray(framed(("x", torch.arange(3)), ("y", torch.arange(3))))
    arrived = decode_frame(buffer)
    buffer[-48:] = bytes(48)
    arrived["x"] += 1
    assert arrived["x"].tolist() == [1, 2, 3]
    assert arrived["y"].tolist() == [0, 1, 2]
    assert arrived["x"].untyped_storage().nbytes() == 24


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(2, dtype=torch.uint4), torch.ones(2, 2).to_sparse(), torch.empty(2, device="meta")],
    ids=["uint4", "sparse", "meta"],
)
def test_other_tensors_are_refused_before_anything_is_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError):
        Frame([("fine", torch.ones(1)), ("not", tensor)])


def test_repeated_ids_and_too_many_are_refused_by_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(1)
    with pytest.raises(WireError, match="2 ids, 1 distinct"):
        Frame([("x", one), ("x", one)])
    monkeypatch.setattr(frames, "MAX_HEADER_BYTES", 100)
    with pytest.raises(WireError, match="the limit is 100"):
        Frame([("x" * 50, one)])
    monkeypatch.setattr(frames, "MAX_TENSORS", 1)
    with pytest.raises(WireError, match="a frame has at most 1"):
        Frame([("x", one), ("y", one)])
