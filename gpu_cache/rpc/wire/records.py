"""What an owner says of its shards to a process of the same host: a record of 64 bytes for each.

    8 bytes: place in the segment | 4: the segment's number | 1: dtype | 1: dimensions | 2: none | 6 * 8: the shape

All little-endian. Records are made when a shard is stored; an answer is their concatenation. A shard that no record
describes (in plain memory, or of more than six dimensions) has the record ELSEWHERE, and travels over HTTP.

A message is a header of 24 bytes and what it announces. Requests: FETCH with ids, RELEASE. Answers: HELLO once, with
the server's incarnation; SEGMENTS, with descriptors, as they come to be needed; RECORDS.

A node cache takes two requests more. FETCH_FOR has a record for each shard, as its handle promises it, then the address
of its owner and the ids. FORGET has ids that were cleared, and no answer.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from gpu_cache import Promise, ShardSpec
from gpu_cache.rpc.shard import MAX_PROMISES, WireError
from gpu_cache.rpc.wire.serialization import DTYPES

# A header of HTTP answers: the host's boot, and the path of the socket.
MEMORY_HEADER = "X-Shard-Memory"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group

_MAX_DIMS = 6
_PLACE = struct.Struct("<QI")
_KIND = struct.Struct(f"<BBxx{_MAX_DIMS}Q")
_KINDS = [struct.Struct(f"<BBxx{dims}Q{8 * (_MAX_DIMS - dims)}x") for dims in range(_MAX_DIMS + 1)]
_RECORD = struct.Struct(f"<QI{_KIND.size}s")
RECORD_BYTES = _PLACE.size + _KIND.size
_ABSENT, _ELSEWHERE, _EMPTY = 0xFFFFFFFF, 0xFFFFFFFE, 0  # in the place of a segment's number
_DTYPES = list(DTYPES.values())  # new ones go to its end
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

HEADER = struct.Struct("<4sIIIQ")
_MAGIC = b"gcm1"
FETCH, RELEASE, HELLO, SEGMENTS, RECORDS, FETCH_FOR, FORGET = range(1, 8)
SEGMENT = struct.Struct("<IxxxxQ")  # of SEGMENTS: number and length
COUNT = struct.Struct("<Q")  # RECORDS begin with how often the owner has removed shards
UNKNOWN_COUNT = (1 << 64) - 1  # of a node cache that has not heard that from the owner
NUMBER = struct.Struct("<I")  # then come the numbers of its segments, and the records
MAX_IDS = 65_536
MAX_IDS_BYTES = 4 << 20
MAX_DESCRIPTORS = 253  # SCM_MAX_FD of Linux
MAX_SEGMENTS = 65_536
_SEPARATOR = "\0"
_where = itemgetter(1, 2)  # of a shard that is found


class Header(NamedTuple):
    """The beginning of a message.

    Attributes:
        kind: The message's kind.
        number: FETCH, FETCH_FOR, FORGET: ids; SEGMENTS: segments; RECORDS: records.
        more: FETCH, FETCH_FOR: how long the shards may have to be held, in milliseconds; RECORDS: the segments that
            there are.
        nbytes: The length of what follows.
    """

    kind: int
    number: int
    more: int
    nbytes: int

    def encoded(self) -> bytes:
        """Its 24 bytes."""
        return HEADER.pack(_MAGIC, self.kind, self.number, self.more, self.nbytes)

    @classmethod
    def decoded(cls, text: bytes | bytearray | memoryview) -> Header:
        """Read one; raises `WireError` if it is none."""
        magic, kind, number, more, nbytes = HEADER.unpack(text)
        if magic != _MAGIC:
            raise WireError(f"{bytes(text)!r} begins no message")
        return cls(kind, number, more, nbytes)


def record_of(dtype: torch.dtype, shape: Sequence[int], segment: int, place: int) -> bytes:
    """The record of a shard; ELSEWHERE if there is none for it."""
    kind = _kind(dtype, tuple(shape))
    return ELSEWHERE if kind is None else _PLACE.pack(place, segment) + kind


@functools.lru_cache(MAX_PROMISES)  # shards of a batch are of the same kinds again and again
def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes | None:
    code, dims = _CODES.get(dtype), len(shape)
    return None if code is None or dims > _MAX_DIMS else _KINDS[dims].pack(code, dims, *shape)


ABSENT, ELSEWHERE = (_PLACE.pack(0, one) + bytes(_KIND.size) for one in (_ABSENT, _ELSEWHERE))


def segments_in(records: bytes) -> list[int]:
    """The numbers of the segments that records name."""
    numbers = {number for _, number, _ in _RECORD.iter_unpack(records)}
    return sorted(numbers - {_ABSENT, _ELSEWHERE, _EMPTY})


class Answer(NamedTuple):
    """An owner's answer about the shards that it was asked for.

    Attributes:
        found: In shared memory, in the order in which they lie there. Of each the number of its segment, 0 where it has
            no bytes, and the place of its first byte there.
        absent: It does not have these.
        elsewhere: It has these, and they travel over HTTP.
    """

    found: list[tuple[ShardSpec, int, int]]
    absent: list[Hashable]
    elsewhere: list[Hashable]


class Foreseen:
    """Shards as their handles promise them, laid out while the owner answers, so that its records are compared at once.

    Args:
        ids: As they are asked for.
        promises: Of their handles, where known.
    """

    def __init__(self, ids: Sequence[Hashable], promises: Mapping[Hashable, Promise]) -> None:
        promised = list(map(promises.get, ids))
        self._ids = ids
        self._specs: list[Any] = [  # of a shard without a promise, None
            None if one is None else ShardSpec(key, one[0], one[1]) for key, one in zip(ids, promised, strict=True)
        ]
        self._kinds = [None if one is None else _kind(one.dtype, one.shape) for one in self._specs]

    def compared(self, records: bytes | memoryview, is_welcome: Callable[[ShardSpec], bool]) -> Answer:
        """Tell found, absent and other shards apart by the owner's records.

        Args:
            records: One for each.
            is_welcome: Asked about shards that are not as promised, or that no handle promises.
        Raises:
            WireError: These are no records of the shards.
        """
        if len(records) != len(self._ids) * RECORD_BYTES:
            raise WireError(f"{len(records):,} bytes of records for {len(self._ids):,} shards")
        told = zip(self._specs, self._kinds, _RECORD.iter_unpack(records), strict=True)
        found = [
            (spec, number, place)
            for spec, promised, (place, number, kind) in told
            if kind == promised and number < _ELSEWHERE
        ]
        answer = Answer(found, [], [])
        if len(found) < len(self._ids):
            self._add_others(answer, records, is_welcome)
        found.sort(key=_where)
        return answer

    def _add_others(self, answer: Answer, records: bytes | memoryview, is_welcome: Callable[[ShardSpec], bool]) -> None:
        """Add the shards that are not as promised, absent or elsewhere."""
        told = zip(self._ids, self._kinds, _RECORD.iter_unpack(records), strict=True)
        for key, promised, (place, number, kind) in told:
            if number >= _ELSEWHERE:
                (answer.absent if number == _ABSENT else answer.elsewhere).append(key)
            elif kind != promised and is_welcome(spec := ShardSpec(key, *_kind_of(kind))):
                answer.found.append((spec, number, place))


class Proxied(NamedTuple):
    """A request for shards of an owner on another host.

    Attributes:
        address: The owner's.
        ids: Of the shards, in the order in which they are to be answered about.
        promises: Of their handles.
        timeout_s: The time left for the caller's fetch, in seconds.
    """

    address: str
    ids: list[str]
    promises: dict[Hashable, Promise]
    timeout_s: float


def proxied_text(address: str, promises: Mapping[Hashable, bytes]) -> bytes | None:
    """The body of a request for shards by way of a node cache; None where they cannot be in one.

    Args:
        address: Of their owner.
        promises: A record of each by id, as its handle promises it.
    """
    text = joined_ids([address, *promises])
    return None if text is None else b"".join(promises.values()) + text


def parse_proxied(body: bytes | bytearray, request: Header) -> Proxied:
    """Read such a request; raises `WireError` if it is none."""
    end = request.number * RECORD_BYTES
    address, *ids = split_ids(body[end:], request.number + 1)
    found = Foreseen(ids, {}).compared(bytes(body[:end]), lambda _: True).found
    promises: dict[Hashable, Promise] = {spec.key: (spec.dtype, spec.shape, address) for spec, _, _ in found}
    if len(promises) != request.number:
        raise WireError(f"{len(promises):,} promises for {request.number:,} shards, or a shard is named twice")
    return Proxied(address, ids, promises, request.more / 1000)


def _kind_of(described: bytes) -> tuple[torch.dtype, tuple[int, ...]]:
    code, dims, *shape = _KIND.unpack(described)
    if code >= len(_DTYPES) or dims > _MAX_DIMS:
        raise WireError(f"a record of dtype {code} and {dims} dimensions")
    return _DTYPES[code], tuple(shape[:dims])


def joined_ids(ids: Sequence[object]) -> bytes | None:
    """Ids as a request has them; None where they cannot be in one."""
    if not all(type(one) is str for one in ids):
        return None
    try:
        text = _SEPARATOR.join(ids).encode()  # type: ignore[arg-type]
    except UnicodeEncodeError:
        return None
    is_plain = text.count(0) == max(len(ids) - 1, 0) and len(text) <= MAX_IDS_BYTES and len(ids) <= MAX_IDS
    return text if is_plain else None


def split_ids(text: bytes | bytearray, count: int) -> list[str]:
    """The ids of a request; raises `WireError` if they are others in number, or no text."""
    try:
        ids = text.decode().split(_SEPARATOR)
    except UnicodeDecodeError as error:
        raise WireError(f"ids that are no text: {error}") from error
    if len(ids) != count:
        raise WireError(f"{len(ids):,} ids where {count:,} are announced")
    return ids


def announced(path: str) -> str:
    """The text by which an owner names its socket in HTTP answers."""
    return f"{boot_id()} {path}"


def user_of(sock: socket.socket) -> int:
    """The user whose process is at the other end of a Unix socket."""
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


@functools.cache
def boot_id() -> str:
    """The same in all processes of one running system, whatever their namespaces; "" where it does not say."""
    try:
        with open(_BOOT_ID) as file:
            return file.read().strip()
    except OSError:
        return ""
