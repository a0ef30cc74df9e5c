"""The order of shards in a binary frame, and the header that describes it; composed by the sender and foreseen by a
reader that knows what it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch

from areal.infra.rpc.serialization import DTYPES
from areal.infra.rpc.shard import WireError
from gpu_cache import ShardSpec

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
_WIDEST_FIRST = sorted(DTYPES.values(), key=lambda dtype: -dtype.itemsize)


class Layout:
    """Shards laid out one behind another: widest dtype first, then by dtype, then as they were asked for.

    Args:
        shards: With distinct string ids, in the order asked for.
    Attributes:
        indices: Places in the request, in the order of the bytes.
        shards: In the order of the bytes.
        header: With its length before it: a frame up to the bytes.
        payload_nbytes: Of the bytes.
    Raises:
        WireError: More shards than a frame has, too long a header, or a dtype that does not travel.
    """

    def __init__(self, shards: Sequence[ShardSpec]) -> None:
        if len(shards) > MAX_TENSORS:
            raise WireError(f"{len(shards):,} ids; a frame has at most {MAX_TENSORS:,}")
        self.indices = _by_dtype(shards)
        self.shards = [shards[index] for index in self.indices]
        self.payload_nbytes = sum(spec.nbytes for spec in shards)
        self.header = _header([spec.key for spec in shards], self.indices, self.shards)


def _by_dtype(shards: Iterable[ShardSpec]) -> list[int]:
    """Indices, grouped; cheaper than a sort with a key of Python's."""
    groups: dict[torch.dtype, list[int]] = {dtype: [] for dtype in _WIDEST_FIRST}
    try:
        for index, spec in enumerate(shards):
            groups[spec.dtype].append(index)
    except KeyError as error:
        raise WireError(f"tensors of {error} do not travel") from error
    return [index for group in groups.values() for index in group]


def _header(ids: Sequence[object], indices: Iterable[int], shards: Iterable[ShardSpec]) -> bytes:
    """Prefix and header; composed as text, as `json.dumps` takes twice as long."""
    entries, raw, end = [], {}, 0
    for index, spec in zip(indices, shards, strict=True):
        begin, end = end, end + spec.nbytes
        name, shape = NAME_OF_DTYPE.get(spec.dtype), list(spec.shape)
        if name is None:
            raw[str(index)] = [str(spec.dtype).removeprefix("torch."), shape]
            name, shape = "U8", [spec.nbytes]
        entries.append(f',"{index}":{{"dtype":"{name}","shape":{shape},"data_offsets":[{begin},{end}]}}')
    metadata = {"ids": json.dumps(ids)} | ({"raw": json.dumps(raw)} if raw else {})
    text = f'{{"__metadata__":{json.dumps(metadata)}{"".join(entries)}}}'.encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(text):,} bytes, the limit is {MAX_HEADER_BYTES:,}")
    return len(text).to_bytes(PREFIX_BYTES, "little") + text
