"""The parser of binary frames under any damage: refused before anything is allocated, or read as it says."""

from __future__ import annotations

import functools
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.wire.frame import MAX_HEADER_BYTES, Frame, decode_frame, header_nbytes, parse_header
from gpu_cache.rpc.wire.serialization import DTYPES
from tests.support.fuzz_corpus import contents, corpus
from tests.support.fuzz_damage import (
    NUM_EXAMPLES,
    as_text,
    counted_allocations,
    damaged,
    exchanged,
    fuzz,
    repeating,
)
from tests.support.wire_tensors import WIRE_DTYPES, patterned, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@functools.cache
def written() -> list[bytes]:
    """Frames that we wrote, of every dtype."""
    mixed = [(f"{dtype}", patterned(dtype, 2, number % 3)) for number, dtype in enumerate(WIRE_DTYPES)]
    return [b"".join(Frame(mixed[at : at + 3])) for at in range(0, len(mixed), 3)]


def headers() -> list[tuple[Any, bytes]]:
    """Header and data of those frames."""
    split = [(frame, 8 + int.from_bytes(frame[:8], "little")) for frame in written()]
    return [(json.loads(frame[8:end]), frame[end:]) for frame, end in split]


def with_header(change: Callable[[st.SearchStrategy[bytes]], st.SearchStrategy[bytes]]) -> st.SearchStrategy[bytes]:
    """Frames whose header was changed and is as long as the frame says."""
    return st.sampled_from(headers()).flatmap(
        lambda pair: change(st.just(json.dumps(pair[0]).encode())).map(lambda text: packed(text, pair[1]))
    )


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


DAMAGES = {
    "bytes": damaged(st.sampled_from(written() + contents("frames"))),
    "bytes of the header": with_header(damaged),
    "bytes of the data": st.sampled_from(headers()).flatmap(
        lambda pair: damaged(st.just(pair[1])).map(lambda data: packed(json.dumps(pair[0]).encode(), data))
    ),
    "parts": with_header(lambda texts: exchanged(texts.map(json.loads)).map(as_text)),
    "keys": with_header(repeating),
}


def check_frame(frame: bytes) -> bool:
    """Refused with nothing allocated, or as many bytes of tensors as there are in the frame; whether the latter."""
    with counted_allocations() as sizes:
        try:
            tensors = decode_frame(frame)
        except WireError:
            assert not sizes, "allocated before everything was checked"
            return False
    data_nbytes = len(frame) - 8 - int.from_bytes(frame[:8], "little")
    assert sum(sizes) == sum(tensor.nbytes for tensor in tensors.values()) == data_nbytes
    assert all(tensor.dtype in DTYPES.values() for tensor in tensors.values())
    return True


@corpus("frames/valid")
def test_a_valid_frame_of_the_corpus_is_read_and_written_again(content: bytes) -> None:
    assert check_frame(content)
    tensors = decode_frame(content)
    again = decode_frame(b"".join(Frame(tensors.items())))
    assert all(same_bits(again[key], tensor) for key, tensor in tensors.items())


@corpus("frames/broken")
def test_a_broken_frame_of_the_corpus_is_refused(content: bytes) -> None:
    assert not check_frame(content)


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
@pytest.mark.parametrize("frames", DAMAGES.values(), ids=DAMAGES)
def test_a_frame_with_any_damage_is_refused_or_read_as_it_says(
    frames: st.SearchStrategy[bytes], num_examples: int
) -> None:
    outcomes = fuzz(check_frame, frames, num_examples)
    assert outcomes[False] > outcomes.total() / 20
    assert outcomes[True], "damage that does not matter"


def check_prefix(prefix_and_length: tuple[bytes, int]) -> None:
    prefix, content_length = prefix_and_length
    try:
        nbytes = header_nbytes(prefix, content_length)
    except WireError:
        return
    assert 0 <= nbytes <= min(MAX_HEADER_BYTES, content_length - 8)


@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_a_header_is_never_longer_than_the_limit_or_the_body(num_examples: int) -> None:
    lengths = st.integers(-(2**65), 2**65) | st.sampled_from([0, 7, 8, 9, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 8])
    near = lengths.map(lambda n: max(0, min(n, 2**64 - 1)).to_bytes(8, "little"))
    fuzz(check_prefix, st.tuples(near | st.binary(max_size=10), lengths), num_examples)


GREEDY = {
    "lists": b"[" + b"[]," * 60_000 + b"[]]",
    "objects": b"[" + b"{}," * 60_000 + b"{}]",
    "keys": b"{" + b",".join(b'"%d":0' % n for n in range(30_000)) + b"}",
    "numbers": b"[" + b"1.5," * 50_000 + b"1]",
    "one string": b'"' + b"x" * 200_000 + b'"',
    "one id": json.dumps({"__metadata__": {"ids": json.dumps(["x" * 200_000])}}).encode(),
    "many ids": json.dumps({"__metadata__": {"ids": json.dumps([str(n) for n in range(30_000)])}}).encode(),
    "escapes": b'"' + b"\\u0000" * 40_000 + b'"',
}


@pytest.mark.parametrize("header", GREEDY.values(), ids=GREEDY)
def test_a_header_costs_a_bounded_multiple_of_its_length(header: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            parse_header(header, 10**15)
        assert tracemalloc.get_traced_memory()[1] < 64 * len(header)
    finally:
        tracemalloc.stop()
