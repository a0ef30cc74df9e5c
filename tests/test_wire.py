"""The binary frame: a safetensors document both ways, and a parser that believes nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import _TYPES as SAFETENSORS_DTYPES
from safetensors.torch import load, save

from areal.infra.rpc import layout, wire
from areal.infra.rpc.shard import WireError
from areal.infra.rpc.wire import Frame, decode_frame, header_nbytes, parse_header
from gpu_cache import ShardSpec
from tests.support.wire_tensors import WIRE_DTYPES, patterned, raw_bytes, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

UNNAMED_DTYPES = {torch.complex32, torch.complex128, torch.float8_e8m0fnu}


def encoded(*items: tuple[str, torch.Tensor]) -> bytes:
    return b"".join(Frame(items))


def header_of(frame: bytes) -> dict[str, Any]:
    return json.loads(frame[8 : 8 + header_nbytes(frame[:8], len(frame))])


def entry(dtype: Any = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def header(*entries: Any, **metadata: Any) -> dict[str, Any]:
    """A header as `json.dumps` takes it: entries by position, valid ids unless others are given."""
    ids = {"ids": json.dumps([f"id{index}" for index in range(len(entries))])}
    return {"__metadata__": ids | metadata} | {str(index): each for index, each in enumerate(entries)}


def parse(document: Any, data_nbytes: int = 4) -> list[ShardSpec]:
    return parse_header(json.dumps(document).encode(), data_nbytes)


@pytest.mark.parametrize("dtype", WIRE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3), (70_000,)], ids=str)
def test_every_dtype_and_shape_arrives_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = patterned(dtype, *shape)
    arrived = decode_frame(encoded(("a shard", tensor)))
    assert list(arrived) == ["a shard"]
    assert same_bits(arrived["a shard"], tensor)


def test_a_frame_of_all_dtypes_arrives_bit_for_bit() -> None:
    items = [(f"{dtype}/{seed}", patterned(dtype, 2, seed, seed=seed)) for seed in range(3) for dtype in WIRE_DTYPES]
    arrived = decode_frame(encoded(*items))
    assert arrived.keys() == dict(items).keys()
    assert [shard_id for shard_id, tensor in items if not same_bits(arrived[shard_id], tensor)] == []


def test_all_bfloat16_patterns_arrive_bit_for_bit() -> None:
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert same_bits(decode_frame(encoded(("x", tensor)))["x"], tensor)


@pytest.mark.parametrize("columns", [6, 40_000], ids=["joined", "uncopied"])
def test_memory_order_gradients_and_lazy_conjugation_do_not_show(columns: int) -> None:
    tensor = patterned(torch.complex64, 4, columns)
    views = [tensor.t(), tensor[:, ::2], tensor[1:3, 2], tensor[3:, 1::columns], tensor.conj(), tensor.conj().imag]
    views.append(torch.nn.Parameter(torch.arange(float(columns))))
    arrived = decode_frame(encoded(*((str(index), view) for index, view in enumerate(views))))
    for index, view in enumerate(views):
        assert same_bits(arrived[str(index)], view.detach().resolve_conj().resolve_neg()), index
    assert not arrived["6"].requires_grad


@pytest.mark.parametrize("dtype", sorted(set(WIRE_DTYPES) - UNNAMED_DTYPES, key=str), ids=str)
def test_the_safetensors_library_reads_what_we_write(dtype: torch.dtype) -> None:
    if dtype not in SAFETENSORS_DTYPES.values():
        pytest.skip(f"this release of safetensors has no name for {dtype}")
    first, second = patterned(dtype, 3, 5), patterned(dtype, 2, seed=1)
    loaded = load(encoded(("x", first), ("y", second)))
    assert loaded.keys() == {"0", "1"}
    assert same_bits(loaded["0"], first)
    assert same_bits(loaded["1"], second)


@pytest.mark.parametrize("dtype", sorted(UNNAMED_DTYPES, key=str), ids=str)
def test_a_dtype_without_a_name_is_raw_bytes_to_the_safetensors_library(dtype: torch.dtype) -> None:
    tensor = patterned(dtype, 2, 3)
    frame = encoded(("x", torch.ones(1)), ("y", tensor))
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
    frame = encoded(*items)
    begins = {item[0]: header_of(frame)[str(index)]["data_offsets"][0] for index, item in enumerate(items)}
    by_place = sorted(begins, key=begins.__getitem__)
    assert by_place[:2] == ["c0", "l0"]
    assert by_place[-2:] == ["h0", "b0"]
    assert begins["f1"] == begins["f0"] + 8
    data = frame[8 + header_nbytes(frame[:8], len(frame)) :]
    assert data == b"".join(raw_bytes(dict(items)[shard_id]) for shard_id in by_place)
    assert (len(frame) - len(data)) % 8 == 0


def test_entries_describe_the_shards_in_the_order_of_their_bytes() -> None:
    frame = encoded(
        ("half", patterned(torch.float16, 2, 2)), ("none", torch.empty(0)), ("raw", torch.ones(1).cdouble())
    )
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
    arrived = decode_frame(encoded(*items))
    assert {shard_id: tensor.item() for shard_id, tensor in arrived.items()} == dict(zip(ids, range(8), strict=True))


def test_an_empty_frame_is_a_frame() -> None:
    assert decode_frame(encoded()) == {}


def test_the_length_is_known_before_the_parts_are_made() -> None:
    frame = Frame([("a", torch.ones(100)), ("b", patterned(torch.uint8, 300_000)), ("c", torch.empty(0))])
    assert frame.payload_nbytes == 300_400
    assert frame.nbytes == sum(map(len, frame)) == len(frame.header) + 300_400


def test_large_tensors_are_sent_from_their_own_memory() -> None:
    tensor = patterned(torch.uint8, 1 << 20)
    _, part = Frame([("x", tensor)])
    tensor[0] += 1
    assert part[0] == tensor[0]


def test_small_tensors_are_joined_up_to_a_mebibyte() -> None:
    items = [(str(index), patterned(torch.float32, 2304, seed=index)) for index in range(300)]
    _, *parts = Frame(items)
    assert [len(part) for part in parts] == [9216 * 113, 9216 * 113, 9216 * 74]
    assert b"".join(parts) == b"".join(raw_bytes(tensor) for _, tensor in items)


def test_a_frame_keeps_its_tensors_after_they_left_the_store() -> None:
    frame = Frame([("x", torch.full((200_000,), 7, dtype=torch.uint8)), ("y", torch.full((3,), 7, dtype=torch.uint8))])
    assert set(b"".join(list(frame)[1:])) == {7}


def test_arrived_tensors_are_writable_and_have_memory_of_their_own() -> None:
    buffer = bytearray(encoded(("x", torch.arange(3)), ("y", torch.arange(3))))
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
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 100)
    with pytest.raises(WireError, match="the limit is 100"):
        Frame([("x" * 50, one)])
    monkeypatch.setattr(layout, "MAX_TENSORS", 1)
    with pytest.raises(WireError, match="a frame has at most 1"):
        Frame([("x", one), ("y", one)])


def test_a_parser_takes_any_key_order_spacing_and_layout() -> None:
    document = header(entry(begin=4, end=8), entry(shape=(), begin=0, end=1), entry(shape=(3,), begin=1, end=4))
    text = json.dumps(dict(reversed(document.items())), indent=3).encode() + b"  \n"
    assert [each.key for each in parse_header(text, 8)] == ["id1", "id2", "id0"]


@pytest.mark.parametrize(
    ("prefix", "content_length"),
    [
        (struct.pack("<Q", 100), 107),
        (struct.pack("<Q", (16 << 20) + 1), 1 << 40),
        (b"\xff" * 8, 1 << 40),
        (struct.pack("<Q", 0)[:7], 100),
        (b"", 0),
        (struct.pack("<Q", 1), 5),
    ],
)
def test_a_header_that_cannot_be_there_is_refused(prefix: bytes, content_length: int) -> None:
    with pytest.raises(WireError, match="announce a header"):
        header_nbytes(prefix, content_length)


def test_a_header_that_fills_the_frame_is_fine() -> None:
    assert header_nbytes(struct.pack("<Q", 92), 100) == 92


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(header(entry(end=5)), "has 4 bytes, the offsets 5", id="longer than its shape"),
        pytest.param(header(entry(shape=(3,))), "has 3 bytes, the offsets 4", id="shorter than its shape"),
        pytest.param(header(entry(begin=4, end=0)), "no offsets", id="offsets swapped"),
        pytest.param(header(entry(begin=-4, end=0)), "no offsets", id="negative offset"),
        pytest.param(header(entry(begin=False)), "no offsets", id="bool offset"),
        pytest.param(header(entry(end=4.0)), "no offsets", id="float offset"),
        pytest.param(header(entry(end=None)), "no offsets", id="null offset"),
        pytest.param(header(entry() | {"data_offsets": [0, 4, 4]}), "not a list of two", id="three offsets"),
        pytest.param(header(entry() | {"data_offsets": 4}), "not a list of two", id="one offset"),
        pytest.param(header(entry(begin=1, end=5)), "begins at 1", id="hole at the start"),
        pytest.param(
            header(entry(shape=(2,), end=2), entry(shape=(1,), begin=3, end=4)), "begins at 3", id="hole between"
        ),
        pytest.param(header(entry(shape=(3,), end=3), entry(shape=(2,), begin=2, end=4)), "begins at 2", id="overlap"),
        pytest.param(header(entry(shape=(2,), end=2)), "describes 2 bytes of data, 4 are", id="trailing bytes"),
        pytest.param(header(entry(shape=(8,), end=8)), "describes 8 bytes of data, 4 are", id="cut short"),
        pytest.param(header(entry("F4")), "unknown dtype 'F4'", id="unknown dtype"),
        pytest.param(header(entry(["U8"])), "unknown dtype", id="dtype is a list"),
        pytest.param(header(entry(shape=(-4,))), "-4 is not a length", id="negative length"),
        pytest.param(header(entry(shape=(True, 4))), "True is not a length", id="bool length"),
        pytest.param(header(entry(shape=(4.0,))), "4.0 is not a length", id="float length"),
        pytest.param(header(entry(shape="4")), "a shape is a list", id="shape is text"),
        pytest.param(header(entry(shape=(1,) * 65)), "at most 64 lengths", id="rank 65"),
        pytest.param(header(entry(shape=(2**33, 2**33))), "exceeds", id="overflow"),
        pytest.param(header(entry(shape=(0, 2**64), end=0)), "exceeds", id="overflow behind a zero"),
        pytest.param(header(entry() | {"extra": 1}), "is described by", id="extra field"),
        pytest.param(header({"dtype": "U8", "shape": [4]}), "is described by", id="missing field"),
        pytest.param(header("U8"), "is described by", id="entry is text"),
        pytest.param({"0": entry()}, "__metadata__ maps", id="no metadata"),
        pytest.param({"__metadata__": [], "0": entry()}, "__metadata__ maps", id="metadata is a list"),
        pytest.param(header(entry(), ids=["id0"]), "__metadata__ maps", id="ids not as text"),
        pytest.param({"__metadata__": {}, "0": entry()}, "list of strings, not None", id="no ids"),
        pytest.param(header(entry(), ids="[0]"), "list of strings", id="ids are numbers"),
        pytest.param(header(entry(), ids='{"id0": 1}'), "list of strings", id="ids are an object"),
        pytest.param(header(entry(), ids='["id0"'), "ids in __metadata__ is not JSON", id="ids are cut"),
        pytest.param(header(entry(), ids='["a", "b"]'), "2 ids, 2 distinct, for 1 tensors", id="too many ids"),
        pytest.param(header(entry(), ids="[]"), "0 ids", id="too few ids"),
        pytest.param(
            header(entry(end=4), entry(shape=(0,), begin=4), ids='["a", "a"]'), "2 ids, 1 distinct", id="ids repeat"
        ),
        pytest.param({"__metadata__": {"ids": '["a"]'}, "1": entry()}, "is described by", id="keys from one"),
        pytest.param({"__metadata__": {"ids": '["a"]'}, "00": entry()}, "is described by", id="key with a zero"),
        pytest.param(header(entry(), raw='{"1": ["complex32", [1]]}'), "raw names", id="raw without an entry"),
        pytest.param(header(entry(), raw='{"0": ["float32", [1]]}'), "unknown dtype 'float32'", id="raw has a name"),
        pytest.param(header(entry(), raw='{"0": ["complex32", [2]]}'), "has 8 bytes, the", id="raw of other length"),
        pytest.param(header(entry(), raw='{"0": ["complex32"]}'), "not a list of two", id="raw without a shape"),
        pytest.param(header(entry(), raw="[]"), "raw in __metadata__ is not an object", id="raw is a list"),
        pytest.param([], "the header is not an object", id="list"),
        pytest.param(None, "the header is not an object", id="null"),
    ],
)
def test_a_header_that_lies_is_refused(document: Any, message: str) -> None:
    with pytest.raises(WireError, match=message):
        parse(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff{}", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"__metadata__":{}}'.encode("utf-16"), "not JSON"),
        (b"[" * 1_000_000, "not JSON"),
        (b'{"0":' * 200_000, "not JSON"),
        (b'{"0":' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"__metadata__":{"ids":"[]"},"__metadata__":{"ids":"[]"}}', "2 keys, 1 distinct"),
        (
            json.dumps(header(entry()))[:-1].encode() + b',"0":' + json.dumps(entry()).encode() + b"}",
            "3 keys, 2 distinct",
        ),
        (json.dumps(header(entry())).replace('"dtype"', '"shape":[1],"dtype"').encode(), "4 keys, 3 distinct"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_header_that_is_not_plain_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        parse_header(text, 4)


def test_more_tensors_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TENSORS", 2)
    assert len(parse(header(*[entry(shape=(0,), end=0)] * 2), 0)) == 2
    with pytest.raises(WireError, match="the limit is 2"):
        parse(header(*[entry(shape=(0,), end=0)] * 3), 0)


@pytest.mark.parametrize(
    "damage", [lambda frame: frame + b"x", lambda frame: frame[:-1], lambda frame: frame[:20], lambda frame: b""]
)
def test_a_frame_of_another_length_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(WireError):
        decode_frame(damage(encoded(("x", torch.ones(3)))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BOOL", "C64", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)
METADATA = st.dictionaries(
    st.sampled_from(["ids", "raw", "format"]),
    st.sampled_from(['["a"]', '["a","b"]', "[]", '{"0":["complex32",[1]]}']) | JSON.map(json.dumps) | JSON,
)
HEADERS = st.dictionaries(st.sampled_from(["0", "1", "2", "x"]), ENTRIES | JSON, max_size=3).flatmap(
    lambda entries: (METADATA | JSON).map(lambda metadata: {"__metadata__": metadata, **entries})
)


@given(document=HEADERS | JSON, data_nbytes=st.integers(0, 40))
def test_only_wire_errors_escape_from_any_json(document: Any, data_nbytes: int) -> None:
    try:
        entries = parse(document, data_nbytes)
    except WireError:
        return
    assert sum(each.nbytes for each in entries) == data_nbytes


@given(text=st.binary(max_size=60), data_nbytes=st.integers(0, 40))
def test_only_wire_errors_escape_from_any_bytes(text: bytes, data_nbytes: int) -> None:
    with pytest.raises(WireError):
        parse_header(text, data_nbytes)


@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_a_frame_with_one_byte_changed_is_refused_or_has_the_same_length(at: int, value: int) -> None:
    frame = bytearray(encoded(("x", torch.ones(3)), ("y", torch.zeros(2, dtype=torch.int16))))
    frame[at % len(frame)] = value
    try:
        arrived = decode_frame(frame)
    except WireError:
        return
    assert sum(tensor.nbytes for tensor in arrived.values()) == 16
