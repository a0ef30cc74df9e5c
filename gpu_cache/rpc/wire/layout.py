"""The order of shards in a binary frame, and the header that describes it; composed by the sender and foreseen by a
reader that knows what it asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import torch

from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.wire.serialization import DTYPES

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536

NAME_OF_DTYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_NAMES = {dtype: NAME_OF_DTYPE.get(dtype, "") for dtype in DTYPES.values()}
_UNNAMED = {dtype for dtype, name in _NAMES.items() if not name}
_WIDEST_FIRST = sorted(DTYPES.values(), key=lambda dtype: -dtype.itemsize)
# The one part of a header that a reader cannot foresee; it stands last in `__metadata__`.
_SERIALS = re.compile(rb'(, "serials": "[0-9. ]*")?')


class Described(Protocol):
    """What a layout has to know of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Layout:
    """Shards laid out one behind another: widest dtype first, then by dtype, then as they were asked for.

    Args:
        ids: Distinct, in the order asked for.
        shards: What they name.
        texts: What `described` says of them.
        serials: Of each shard, as the sender's store numbers them; none where it does not, and none for a reader.
    Attributes:
        indices: Places in the request, in the order of the bytes.
        header: With its length before it: a frame up to the bytes.
        payload_nbytes: Of the bytes.
    Raises:
        WireError: More shards than a frame has, too long a header, or a dtype that does not travel.
    """

    def __init__(
        self, ids: Sequence[Hashable], shards: Sequence[Described], texts: Sequence[str], serials: Sequence[str] = ()
    ) -> None:
        if len(shards) > MAX_TENSORS:
            raise WireError(f"{len(shards):,} ids; a frame has at most {MAX_TENSORS:,}")
        self.indices = _by_dtype(shards)
        self.payload_nbytes = sum(shard.nbytes for shard in shards)
        self._before, self._after = _metadata(ids, shards), _entries(self.indices, shards, texts)
        told = f', "serials": "{" ".join(serials)}"'.encode() if serials else b""
        self.header = _framed(self._before + told + self._after)

    def is_of(self, header: bytes | bytearray, payload_nbytes: int) -> bool:
        """Whether a frame has this header, but for its serials and the length before it, and so many bytes."""
        text = header.rstrip(b" ")
        begin, end = len(self._before), len(text) - len(self._after)
        return (
            payload_nbytes == self.payload_nbytes
            and text.startswith(self._before)
            and text.endswith(self._after)
            and _SERIALS.fullmatch(text, begin, end) is not None
        )


def described(dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> str:
    """A tensor's dtype and shape in a header; a dtype that has no name there is described in `raw` beside it.

    Raises:
        KeyError: The dtype does not travel.
    """
    name = _NAMES[dtype]
    return f'"dtype":"{name}","shape":{list(shape)}' if name else f'"dtype":"U8","shape":[{nbytes}]'


def _by_dtype(shards: Iterable[Described]) -> list[int]:
    """Indices, grouped; cheaper than a sort with a key of Python's."""
    groups: dict[torch.dtype, list[int]] = {dtype: [] for dtype in _WIDEST_FIRST}
    try:
        for index, spec in enumerate(shards):
            groups[spec.dtype].append(index)
    except KeyError as error:
        raise WireError(f"tensors of {error} do not travel") from error
    return [index for group in groups.values() for index in group]


def _metadata(ids: Sequence[Hashable], shards: Sequence[Described]) -> bytes:
    """A header's beginning: `__metadata__`, not yet closed."""
    raw = {
        str(index): [str(shard.dtype).removeprefix("torch."), list(shard.shape)]
        for index, shard in enumerate(shards)
        if shard.dtype in _UNNAMED
    }
    metadata = {"ids": json.dumps(ids)} | ({"raw": json.dumps(raw)} if raw else {})
    return f'{{"__metadata__":{json.dumps(metadata)[:-1]}'.encode()


def _entries(indices: Iterable[int], shards: Sequence[Described], texts: Sequence[str]) -> bytes:
    """The rest of a header; composed as text, as `json.dumps` takes twice as long."""
    entries, end = [], 0
    for index in indices:
        begin, end = end, end + shards[index].nbytes
        entries.append(f',"{index}":{{{texts[index]},"data_offsets":[{begin},{end}]}}')
    return f"}}{''.join(entries)}}}".encode()


def _framed(text: bytes) -> bytes:
    """A header with its length before it, padded to a multiple of 8."""
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(text):,} bytes, the limit is {MAX_HEADER_BYTES:,}")
    return len(text).to_bytes(PREFIX_BYTES, "little") + text
