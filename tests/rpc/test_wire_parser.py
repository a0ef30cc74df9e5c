"""The parser of the binary frame believes nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_cache import ShardSpec
from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.wire import frame as wire
from gpu_cache.rpc.wire.frame import decode_frame, header_nbytes, parse_header
from tests.support.wire_tensors import framed

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def entry(dtype: Any = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def header(*entries: Any, **metadata: Any) -> dict[str, Any]:
    """A header as `json.dumps` takes it: entries by position, valid ids unless others are given."""
    ids = {"ids": json.dumps([f"id{index}" for index in range(len(entries))])}
    return {"__metadata__": ids | metadata} | {str(index): each for index, each in enumerate(entries)}


def parse(document: Any, data_nbytes: int = 4) -> list[ShardSpec]:
    return parse_header(json.dumps(document).encode(), data_nbytes)


def test_a_parser_takes_any_key_order_spacing_and_layout() -> None:
    document = header(entry(begin=4, end=8), entry(shape=(), begin=0, end=1), entry(shape=(3,), begin=1, end=4))
    text = json.dumps(dict(reversed(document.items())), indent=3).encode() + b"  \n"
    assert [each.key for each in parse_header(text, 8)] == ["id1", "id2", "id0"]


def test_a_parser_ignores_entries_that_it_does_not_know() -> None:
    assert parse(header(entry(), later="a newer server's")) == parse(header(entry()))


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
        decode_frame(damage(framed(("x", torch.ones(3)))))


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
    frame = bytearray(framed(("x", torch.ones(3)), ("y", torch.zeros(2, dtype=torch.int16))))
    frame[at % len(frame)] = value
    try:
        arrived = decode_frame(frame)
    except WireError:
        return
    assert sum(tensor.nbytes for tensor in arrived.values()) == 16
