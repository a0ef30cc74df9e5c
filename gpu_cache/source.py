"""The protocol of a transport: it describes shards, then reads their bytes into the cache's buffers."""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from gpu_cache.config import ALIGNMENT

MemoryT = TypeVar("MemoryT")


@dataclasses.dataclass(slots=True, init=False)
class ShardSpec:
    """One shard of a stream: its key and what its bytes mean (C order, the machine's byte order). Not to be changed.

    `nbytes` follows from the other fields; it is kept, as it is asked for many times. A shape may be given as a list.

    Raises:
        TypeError: The shape holds something else than whole numbers.
        ValueError: A length is negative.
    """

    key: Hashable
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    def __init__(self, key: Hashable, dtype: torch.dtype, shape: Sequence[int]) -> None:
        if not isinstance(shape, tuple) or type(nbytes := math.prod(shape) * dtype.itemsize) is not int or nbytes < 0:
            shape = tuple(map(operator.index, shape))
            nbytes = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0:
                raise ValueError(f"shard {key!r} has the shape {list(shape)}: no length is negative")
        self.key, self.dtype, self.shape, self.nbytes = key, dtype, shape, nbytes


@dataclasses.dataclass(slots=True, eq=False)
class LentMemory:
    """Host memory with shards in it, such as another process's, that a reader lends for copies.

    This process never writes into it.

    Attributes:
        tensor: `(nbytes,)` uint8.
        turn: Held while a device registers it.
        readers: Whether a device's copies read it without staging, by device.
        endings: Called before it is unmapped, when no copy is under way any more.
        is_lasting: Whether it stays mapped for other reads, so that a device may register it.
    """

    tensor: torch.Tensor
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    readers: dict[object, bool] = dataclasses.field(default_factory=dict)
    endings: list[Callable[[], object]] = dataclasses.field(default_factory=list)
    is_lasting: bool = True


class Stretch(NamedTuple):
    """Bytes that lie in one piece in lent memory.

    Attributes:
        at: The place that they belong to, as the caller counts.
        memory: The memory that they are in.
        begin: Their begin in it.
        nbytes: Their number.
    """

    at: int
    memory: LentMemory
    begin: int
    nbytes: int


class ShardReader(Protocol):
    """One connection to one node, drained by one thread; only `cancel` may be called from another.

    The stream comes in parts, one answer of the node each. The cache calls `next_specs`, then `read_into` until it has
    every byte of the part. It begins again until `next_specs` returns None. Each key is in the specs or in
    `failures`, or else an exception ends the stream. It fails every key that was not read yet.

    A reader may have `num_received`: the bytes that came over its connection so far, or None. Any thread asks for it.
    Without it, a read of more than a second counts as stalled while readers of other nodes wait.

    A reader may have `ends_in_time`: true if each of its calls returns within `timeout_s`, whatever happens. Then the
    thread that waits for the shards may drain it, as long as that is not the main thread.

    A reader whose bytes lie in memory of this process may lend them, see `LendingReader`. `transport`, if a reader has
    it, names the way of its latest part.

    Inside the cache, a reader of shards that are in one of its pools has `resident`, which returns their copies. Then
    nothing is read.
    """

    @property
    def node(self) -> str:
        """Address of the node, for messages and for counting by source."""

    @property
    def keys(self) -> Sequence[Hashable]:
        """The keys that this reader was opened for."""

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        """Keys that the node cannot deliver, with the reason; grows with each part."""

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next part and describe its shards in stream order; None at the end of the stream."""

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers (writable, bytes) with the next bytes of the part, in order; blocks until all are full.

        A `FetchError` with `may_go_on` set ends the part, not the stream. Shards of it that earlier reads did not
        complete are in `failures`, or the next `next_specs` announces them again.
        """

    def cancel(self) -> None:
        """Make a blocked `next_specs` or `read_into` fail soon. Any thread; idempotent; frees nothing."""

    def close(self) -> None:
        """Give back the connection. Called once, by the draining thread, after its last read."""


class LendingReader(ShardReader, Protocol):
    """A `ShardReader` that may lend its bytes. The cache then copies them straight to the places that they belong to.

    Lent memory stays mapped until the next `next_specs`, or `close`. `confirm` says whether its bytes stayed as they
    were.

    Attributes:
        is_lending: Whether it lends the part that `next_specs` has just described. Callers that copy themselves then
            call `read_run`; `read_into` works too.
    """

    is_lending: bool

    def read_run(self, places: Sequence[tuple[int, int]]) -> Sequence[Stretch]:
        """The stretches of lent memory that hold the next bytes of the part.

        Args:
            places: For each shard, or piece of one, the place of its bytes and their number; in stream order.
        """

    def confirm(self) -> None:
        """Raise, as `read_into` does, unless the bytes of all stretches so far stayed right until now."""


def fill_from_lent(reader: LendingReader, buffers: Sequence[memoryview]) -> None:
    """Fill buffers with the next bytes that a reader lends, and have it confirm them: its `read_into`."""
    for buffer in filter(len, buffers):
        target = torch.frombuffer(buffer, dtype=torch.uint8)
        for at, memory, begin, nbytes in reader.read_run([(0, len(buffer))]):
            target[at : at + nbytes].copy_(memory.tensor[begin : begin + nbytes])
    reader.confirm()


def joined_places(
    listed: Sequence[tuple[MemoryT, int, int]], number: int, start: int, places: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, MemoryT, int, int]], int, int]:
    """Where the next bytes of some shards are; neighbours are one stretch. One loop, as there are thousands.

    Args:
        listed: Of each shard: its memory, its begin there and its length.
        number: The first to be read.
        start: Its bytes that were read before.
        places: Of each shard, or piece of one, where it goes and its length.
    Returns:
        Where it goes, memory, begin and length of each stretch; then `number` and `start` of what is next.
    """
    runs: list[tuple[int, MemoryT, int, int]] = []
    first, first_begin, length = 0, 0, 0
    known: MemoryT | None = None
    for at, nbytes in places:
        memory, begin, whole = listed[number]
        begin += start
        gap = at - first
        if memory is known and gap == begin - first_begin and 0 <= gap - length < ALIGNMENT:
            length = gap + nbytes
        else:
            if known is not None:
                runs.append((first, known, first_begin, length))
            first, known, first_begin, length = at, memory, begin, nbytes
        start += nbytes
        if start == whole:
            number, start = number + 1, 0
    if known is not None:
        runs.append((first, known, first_begin, length))
    return runs, number, start


class ShardSource(Protocol):
    """Opens readers for keys. Any thread."""

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        """One reader for each node and connection; together they cover the keys, each key once.

        Does no I/O: a reader connects at its first `next_specs`. All I/O of a reader ends within `timeout_s`.
        """


class _NoSource:
    """A source without shards, for calls that need only cached ones."""

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        return []


NO_SOURCE = _NoSource()


def opened(source: ShardSource, keys: Sequence[Hashable], timeout_s: float) -> Iterator[ShardReader]:
    """The readers that a source opens.

    Raises:
        TypeError: It returned something else; names the source, and what that was.
    """
    found: Any = source.open(keys, timeout_s)
    told = f"open of the source {type(source).__name__} returned"
    if not isinstance(found, Iterable):
        raise TypeError(f"{told} a {type(found).__name__}: a list of ShardReaders is expected")
    for reader in found:
        kind = type(reader)  # asked first: a property may do something
        if lacking := [name for name in _OF_READERS if not (hasattr(kind, name) or hasattr(reader, name))]:
            raise TypeError(f"{told} a {kind.__name__} as a ShardReader, which has no {', '.join(lacking)}")
        yield reader


_OF_READERS = ("node", "keys", "failures", "next_specs", "read_into", "cancel", "close")


def check_promises(expected: object) -> None:
    """Refuse promises that are none, or not by key. A thousand good ones take 0.03 ms.

    Raises:
        TypeError: They are no mapping, or one is no tuple of three; names it, and its key.
    """
    if not isinstance(expected, Mapping):
        kind = type(expected).__name__
        raise TypeError(f"expected is a {kind}: promises by key are expected, as in {{key: (dtype, shape, owner)}}")
    promises = expected.values()
    if set(map(type, promises)) == {tuple} and set(map(len, promises)) == {3}:
        return
    for key, promise in expected.items():
        if promise is not None and (not isinstance(promise, tuple) or len(promise) != 3):
            raise TypeError(
                f"expected has {promise!r} for {key!r}: a tuple (dtype, shape, owner) is expected, owner None for any"
            )


def check_call(source: object, prefer: object, expected: object) -> None:
    """Refuse a source that cannot be asked, and a place or promises that are none.

    Raises:
        TypeError: `source` is a class or has no `open`, or `expected` is no mapping of tuples of three.
        ValueError: `prefer` is another word.
    """
    if expected is not None:
        check_promises(expected)
    if prefer not in ("device", "host"):
        raise ValueError(f"prefer={prefer!r}: must be 'device' or 'host'")
    if isinstance(source, type):
        raise TypeError(
            f"source is the class {source.__name__}: a ShardSource is expected, such as {source.__name__}()"
        )
    if not callable(getattr(source, "open", None)):
        raise TypeError(f"source is a {type(source).__name__}: a ShardSource is expected, with open(keys, timeout_s)")
