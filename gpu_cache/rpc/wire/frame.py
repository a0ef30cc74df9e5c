"""The binary frame: a safetensors document that carries shards under opaque ids.

    8 bytes, little-endian: length of the header | the header, JSON, padded with spaces to a multiple of 8 | the bytes

The header's keys are "0", "1", … in the order in which the ids were asked for. Entries of `__metadata__` say the rest,
each a text, as safetensors wants strings there:

- "ids": JSON, the list of shard ids, by index;
- "raw", only where needed: JSON, {"index": ["dtype", [shape]]} of the tensors whose dtype has no name in safetensors
  (complex32, complex128, float8_e8m0fnu). Their entries in the header are U8, as long as the tensor has bytes;
- "serials", from an owner: the serial of each shard, by index, with a space between two. Equal serials from one
  incarnation of a server mean equal bytes. A reader goes on amid a shard only where both are equal.

A reader ignores other entries. It foresees the header, and parses one that differs in more than the serials.

The bytes are packed without holes, widest dtype first, then by dtype, then by index. So each tensor is aligned to its
own width (up to 8), and a reader builds the tensors of one dtype from one range. Bits arrive as they were sent, except
that a bool's byte other than 0 and 1 (which no operation of torch writes) may arrive as 1.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from reprlib import repr as short_repr
from typing import Any, Protocol

import torch

from gpu_cache import ShardSpec
from gpu_cache.device.hostmem import host_tensor
from gpu_cache.device.modes import plain_tensors
from gpu_cache.rpc.shard import MAX_PROMISES, WireError
from gpu_cache.rpc.wire.records import ELSEWHERE
from gpu_cache.rpc.wire.serialization import DTYPES, check_travels, checked_shape, dense_bytes, host_bytes, is_dense


class OwnedShard:
    """A tensor and the facts about it that the binary form needs, taken when it is stored and not when it is fetched.

    Taking them costs 6 us, more than all else that serving a small shard takes, and trainers wait for the latter.
    Values written into the tensor later are served; another shape or memory given to it is not.

    Attributes:
        nbytes: Its length.
        text: Its dtype and shape, as a frame's header has them.
        memory: Its bytes, if it is dense and in host memory; else None.
        stored_at: When, by the clock of its store.
        record: What the owner says of it to processes of this host.
    """

    __slots__ = (
        "_fault", "_number", "_serial", "_tensors", "_version", "dtype", "memory", "nbytes", "record", "shape",
        "stored_at", "text",
    )  # fmt: skip

    memory: memoryview | None
    _tensors: dict[str, torch.Tensor]  # one at most; `setdefault` lets one of several threads make it
    _version: int | None

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensors = {_THE_ONE: tensor}
        self._describe(tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        self._version = _version(tensor)
        try:
            check_travels(tensor)
        except TypeError as error:
            self._fault = str(error)
            return
        self.text = described(self.dtype, self.shape, self.nbytes)
        if is_dense(tensor):
            self.memory = dense_bytes(tensor)

    @classmethod
    def over(cls, memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> OwnedShard:
        """A shard whose tensor is made when a caller asks for it. The drop of a tensor gives the GIL away.

        Args:
            memory: Its bytes, dense; kept for as long as the shard or its tensor.
            dtype: One that travels.
            shape: Its shape.
        """
        shard = cls.__new__(cls)
        shard._tensors, shard._version = {}, 0
        shard._describe(dtype, shape, len(memory), memory)
        shard.text = described(dtype, shape, len(memory))
        return shard

    def _describe(
        self, dtype: torch.dtype, shape: tuple[int, ...], nbytes: int, memory: memoryview | None = None
    ) -> None:
        self.dtype, self.shape, self.nbytes, self.memory = dtype, shape, nbytes, memory
        self.text, self._fault = "", ""
        self.stored_at, self.record = 0.0, ELSEWHERE
        self._number, self._serial = 0, ""

    @property
    def tensor(self) -> torch.Tensor:
        """As it was stored; one object for all callers."""
        if (found := self._tensors.get(_THE_ONE)) is None:
            with plain_tensors():
                if self.nbytes:
                    made = torch.frombuffer(self.memory, dtype=self.dtype).view(self.shape)
                else:
                    made = torch.empty(self.shape, dtype=self.dtype, device="cpu")
            found = self._tensors.setdefault(_THE_ONE, made)  # another thread may have made it
        return found

    @property
    def serial(self) -> str:
        """Tells this tensor, with what was written into it so far, from every other that its store has had.

        Empty outside a store. torch counts no writes into inference tensors, nor those past it, as through numpy.
        """
        tensor = self._tensors.get(_THE_ONE)  # None: no caller has had it, nor written into it
        if not self._serial or self._version is None or tensor is None or self._version == tensor._version:
            return self._serial
        return f"{self._number}.{tensor._version}"

    def number(self, number: int) -> None:
        """Note its store's number for it, which no other of the store's shards gets."""
        self._number, self._serial = number, f"{number}.{self._version or 0}"

    def check(self, shard_id: str) -> None:
        """Raise `TypeError` if it cannot be sent."""
        if self._fault:
            raise TypeError(self._fault)
        tensor = self._tensors.get(_THE_ONE)  # a caller may be making it
        if tensor is not None and tensor.is_meta:
            raise TypeError(f"shard {shard_id} is a meta tensor: it has no bytes to send")


_THE_ONE = "tensor"


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written into; None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version


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
    """The facts about a tensor that a layout needs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Layout:
    """Shards laid out one behind another: widest dtype first, then by dtype, then as they were asked for.

    Args:
        ids: Distinct, in the order asked for.
        shards: The shards that they name.
        texts: Their descriptions, by `described`.
        serials: Each shard's number in the sender's store; empty for a sender that numbers none, and for a reader.
    Attributes:
        indices: Places in the request, in the order of the bytes.
        header_nbytes: The length of the header.
        payload_nbytes: The length of all tensors' bytes.
    Raises:
        WireError: More shards than a frame has, too long a header, or a dtype that does not travel.
    """

    def __init__(
        self, ids: Sequence[Hashable], shards: Sequence[Described], texts: Sequence[str], serials: Sequence[str] = ()
    ) -> None:
        if len(shards) > MAX_TENSORS:
            raise WireError(f"{len(shards):,} ids; a frame has at most {MAX_TENSORS:,}")
        groups = _by_dtype(shards)
        self.indices = list(chain.from_iterable(groups.values()))
        self._before = _metadata(ids, shards, sorted(index for dtype in _UNNAMED for index in groups[dtype]))
        self._after, self.payload_nbytes = _entries(self.indices, shards, texts)
        self._told = f', "serials": "{" ".join(serials)}"'.encode() if serials else b""
        nbytes = len(self._before) + len(self._told) + len(self._after)
        self.header_nbytes = -(-nbytes // 8) * 8
        if self.header_nbytes > MAX_HEADER_BYTES:
            raise WireError(f"a header of {self.header_nbytes:,} bytes, the limit is {MAX_HEADER_BYTES:,}")

    def header(self) -> bytes:
        """A frame up to the bytes: the header, and its length before it. Only a sender makes it."""
        prefix = self.header_nbytes.to_bytes(PREFIX_BYTES, "little")
        return b"".join([prefix, self._before, self._told, self._after]).ljust(PREFIX_BYTES + self.header_nbytes)

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


@functools.lru_cache(MAX_PROMISES)  # shards of a batch are described the same again and again
def described(dtype: torch.dtype, shape: tuple[int, ...], nbytes: int) -> str:
    """A tensor's dtype and shape in a header; a dtype that has no name there is described in `raw` beside it.

    Raises:
        KeyError: The dtype does not travel.
    """
    name = _NAMES[dtype]
    # A promised (True, 2) finds what (1, 2) left here, and the other way round.
    return f'"dtype":"{name}","shape":{list(map(int, shape))}' if name else f'"dtype":"U8","shape":[{nbytes}]'


def _by_dtype(shards: Iterable[Described]) -> dict[torch.dtype, list[int]]:
    """Indices, the widest dtypes first; cheaper than a sort with a key of Python's."""
    groups: dict[torch.dtype, list[int]] = {dtype: [] for dtype in _WIDEST_FIRST}
    try:
        for index, spec in enumerate(shards):
            groups[spec.dtype].append(index)
    except KeyError as error:
        raise WireError(f"tensors of {error} do not travel") from error
    return groups


def _metadata(ids: Sequence[Hashable], shards: Sequence[Described], unnamed: Iterable[int]) -> bytes:
    """A header's beginning: `__metadata__`, not yet closed; `unnamed` are indices of shards that `raw` describes."""
    raw = {
        str(index): [str(shards[index].dtype).removeprefix("torch."), list(shards[index].shape)] for index in unnamed
    }
    metadata = {"ids": json.dumps(ids)} | ({"raw": json.dumps(raw)} if raw else {})
    return f'{{"__metadata__":{json.dumps(metadata)[:-1]}'.encode()


def _entries(indices: Iterable[int], shards: Sequence[Described], texts: Sequence[str]) -> tuple[bytes, int]:
    """The rest of a header, composed as text, as `json.dumps` takes twice as long; and how many bytes it describes."""
    entries, end = ["}"], 0
    for index in indices:
        begin, end = end, end + shards[index].nbytes
        entries.append(f',"{index}":{{{texts[index]},"data_offsets":[{begin},{end}]}}')
    entries.append("}")
    return "".join(entries).encode(), end


CONTENT_TYPE = "application/vnd.safetensors"

_NAMED = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}
_RAW = {name: dtype for name, dtype in DTYPES.items() if dtype not in NAME_OF_DTYPE}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class Frame:
    """Tensors laid out for sending; iterating yields the header, then the memory of one tensor after another.

    Nothing is copied but what is not dense in host memory, when its turn comes. The frame keeps its tensors alive,
    whatever happens to the store meanwhile. No part is empty: behind one, asyncio from Python 3.12 on waits for a
    socket that is ready, over and over.

    Args:
        items: Distinct ids with their tensors, in the order asked for; an owner has what it takes ready.

    Raises:
        TypeError: A dtype or layout that does not travel, or a meta tensor.
        WireError: Ids that repeat, or more than the limits allow.
    """

    def __init__(self, items: Iterable[tuple[str, torch.Tensor | OwnedShard]]) -> None:
        ids: list[str] = []
        shards: list[OwnedShard] = []
        for shard_id, item in items:
            shard = item if isinstance(item, OwnedShard) else _owned(item)
            shard.check(shard_id)
            ids.append(shard_id)
            shards.append(shard)
        if (num_ids := len(set(ids))) != len(ids):
            raise WireError(f"{len(ids):,} ids, {num_ids:,} distinct")
        serials = [shard.serial for shard in shards]
        layout = Layout(ids, shards, [shard.text for shard in shards], serials if all(serials) else ())
        self._shards = [shards[index] for index in layout.indices if shards[index].nbytes]
        self.header, self.payload_nbytes = layout.header(), layout.payload_nbytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.payload_nbytes

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self.header
        for shard in self._shards:
            yield host_bytes(shard.tensor) if shard.memory is None else shard.memory


def _owned(tensor: torch.Tensor) -> OwnedShard:
    check_travels(tensor)
    return OwnedShard(tensor)


def header_nbytes(prefix: bytes, content_length: int) -> int:
    """Length of the header, from a frame's first 8 bytes and the length of the whole.

    Raises:
        WireError: No frame could begin so.
    """
    nbytes = int.from_bytes(prefix, "little")
    if len(prefix) != PREFIX_BYTES or nbytes > min(MAX_HEADER_BYTES, content_length - PREFIX_BYTES):
        raise WireError(
            f"{len(prefix)} bytes announce a header of {nbytes:,} bytes in a frame of {content_length:,}; "
            f"the limit is {MAX_HEADER_BYTES:,}"
        )
    return nbytes


def parse_header(header: bytes, data_nbytes: int) -> list[ShardSpec]:
    """Describe the shards of a frame in the order of their bytes.

    Everything is checked, so that a reader may allocate what the entries say: together they cover the data exactly.
    The order of the keys, the spacing and the order of the bytes are the sender's choice.

    Args:
        header: The JSON, without the 8 bytes before it.
        data_nbytes: The number of bytes that follow it.

    Raises:
        WireError: The header breaks the format.
    """
    document = _json_object(header, "the header")
    metadata = document.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise WireError(f"__metadata__ maps names to strings, it is not {short_repr(metadata)}")
    ids = _shard_ids(metadata, len(document))
    raw = _json_object(metadata.get("raw", "{}"), "raw in __metadata__")
    if not raw.keys() <= document.keys():
        raise WireError(f"raw names {short_repr(sorted(raw.keys() - document.keys()))}, which the header does not")
    placed = []
    for index, shard_id in enumerate(ids):
        begin, end, dtype, shape = _placed_tensor(document.get(str(index)), raw.get(str(index)))
        placed.append((begin, end, ShardSpec(shard_id, dtype, shape)))
    placed.sort(key=itemgetter(0, 1))
    _check_cover(placed, data_nbytes)
    return [spec for _, _, spec in placed]


def serials_of(header: bytes | bytearray) -> dict[str, str]:
    """The serials in a header that `parse_header` takes, by shard id; none where the sender tells none."""
    metadata = _json_object(header, "the header")["__metadata__"]
    ids, serials = _json(metadata["ids"], "ids in __metadata__"), metadata.get("serials", "").split(" ")
    return dict(zip(ids, serials, strict=True)) if len(ids) == len(serials) and all(serials) else {}


def decode_frame(frame: bytes | bytearray | memoryview) -> dict[str, torch.Tensor]:
    """Build the tensors of a whole frame, by id, each in memory of its own.

    Raises:
        WireError: The frame breaks the format; nothing was allocated.
    """
    view = memoryview(frame).cast("B")
    at = PREFIX_BYTES + header_nbytes(bytes(view[:PREFIX_BYTES]), len(view))
    tensors = {}
    with plain_tensors():
        for spec in parse_header(bytes(view[PREFIX_BYTES:at]), len(view) - at):
            flat = host_tensor(spec.nbytes)
            flat.numpy().data[:] = view[at : at + spec.nbytes]
            tensors[str(spec.key)] = flat.view(spec.dtype).view(spec.shape)
            at += spec.nbytes
    return tensors


def _json(text: str | bytes | bytearray, where: str) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{where} is not JSON: {error}") from error


def _json_object(text: str | bytes | bytearray, where: str) -> dict[str, Any]:
    document = _json(text, where)
    if not isinstance(document, dict):
        raise WireError(f"{where} is not an object but {short_repr(document)}")
    return document


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key: two readers might believe different values."""
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError(f"{len(pairs):,} keys, {len(document):,} distinct")
    return document


def _shard_ids(metadata: Mapping[str, str], num_tensors: int) -> list[str]:
    ids = _json(metadata.get("ids", "null"), "ids in __metadata__")
    if not isinstance(ids, list) or not all(isinstance(shard_id, str) for shard_id in ids):
        raise WireError(f"ids in __metadata__ is a list of strings, not {short_repr(ids)}")
    if not len(set(ids)) == len(ids) == num_tensors <= MAX_TENSORS:
        raise WireError(
            f"{len(ids):,} ids, {len(set(ids)):,} distinct, for {num_tensors:,} tensors; the limit is {MAX_TENSORS:,}"
        )
    return ids


def _placed_tensor(described: object, raw: object) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of one tensor, in agreement with each other."""
    if not isinstance(described, dict) or described.keys() != _ENTRY_KEYS:
        raise WireError(f"a tensor is described by {sorted(_ENTRY_KEYS)}, not by {short_repr(described)}")
    begin, end = _pair(described["data_offsets"])
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise WireError(f"{short_repr([begin, end])} are no offsets")
    dtype, shape, nbytes = _typed(_NAMED, described["dtype"], described["shape"])
    if nbytes == end - begin and raw is not None:
        dtype, shape, nbytes = _typed(_RAW, *_pair(raw))
    if nbytes != end - begin:
        raise WireError(f"{dtype} of shape {short_repr(shape)} has {nbytes:,} bytes, the offsets {end - begin:,}")
    return begin, end, dtype, shape


def _pair(value: object) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise WireError(f"not a list of two: {short_repr(value)}")
    return value[0], value[1]


def _typed(dtypes: Mapping[str, torch.dtype], name: object, shape: object) -> tuple[torch.dtype, tuple[int, ...], int]:
    dtype = dtypes.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise WireError(f"unknown dtype {short_repr(name)}")
    try:
        return dtype, *checked_shape(shape, dtype.itemsize)
    except ValueError as error:
        raise WireError(str(error)) from error


def _check_cover(placed: Iterable[tuple[int, int, ShardSpec]], data_nbytes: int) -> None:
    covered = 0
    for begin, end, spec in placed:
        if begin != covered:
            raise WireError(f"shard {spec.key} begins at {begin:,}, the one before it ends at {covered:,}")
        covered = end
    if covered != data_nbytes:
        raise WireError(f"the header describes {covered:,} bytes of data, {data_nbytes:,} are announced")
