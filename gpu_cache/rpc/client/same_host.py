"""Shards of owners on the same host, read where they are: in segments that are mapped once, without a socket's bytes.

The owner holds what it answered about until it is told that the copies are done, or the connection ends. So a reader
looks at its connection after the copies, before they land: if it is still open, the bytes were good.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from gpu_cache import Promise, ShardSpec
from gpu_cache.hosts import is_loopback
from gpu_cache.process import no_collections
from gpu_cache.report.schema import NODE_CACHE, SHARED_MEMORY
from gpu_cache.rpc.client.connection import split_address
from gpu_cache.rpc.client.memory import (
    FAULTS,
    PATIENCE_S,
    MemoryConnection,
    OutOfReachError,
    OwnersMemory,
    Segment,
    reason_of,
)
from gpu_cache.rpc.client.pool import NodeState
from gpu_cache.rpc.client.reader import HttpReader
from gpu_cache.rpc.shard import ShardUnreachableError, WireError, nbytes_of
from gpu_cache.rpc.wire.records import (
    ELSEWHERE,
    FETCH,
    FETCH_FOR,
    MAX_IDS,
    UNKNOWN_COUNT,
    Foreseen,
    boot_id,
    joined_ids,
    proxied_text,
    record_of,
)
from gpu_cache.source import Stretch, fill_from_lent, joined_places

# A node cache is asked for so much at once: its answer comes when the last shard is there.
_PROXIED_BYTES, _PROXIED_IDS = 64 << 20, 4096


class _Way(NamedTuple):
    """A socket to ask for shards.

    Attributes:
        path: Where it is.
        is_proxy: Whether a node cache answers there, for owners on other hosts.
    """

    path: str
    is_proxy: bool = False


class SameHostReader:
    """A `ShardReader` of shared memory: the owner's, if it turns out to be on this host, else a node cache's.

    Shards that are in neither come over HTTP.

    Args:
        http: Reads the same shards over HTTP. It asks the owner first, as its answer announces the owner's socket, and
            brings the shards that are in no shared memory.
        node: What is known of the owner.
        memories: Segments that this process maps.
        promises: Of the handles, where known.
        deadline: As by `time.monotonic()`.
    Attributes:
        ends_in_time: As of `http`.
        is_lending: Whether the part is in shared memory.
        transport: How the latest part came.
    """

    def __init__(
        self,
        http: HttpReader,
        node: NodeState,
        memories: OwnersMemory,
        promises: Mapping[Hashable, Promise],
        deadline: float,
    ) -> None:
        self.node, self.keys, self.failures = http.node, http.keys, http.failures
        self.ends_in_time = http.ends_in_time
        self.is_lending, self.transport = False, ""
        self._http, self._node, self._memories = http, node, memories
        self._promises, self._deadline = promises, deadline
        self._is_over = self._is_cancelled = False  # nothing is read from the owner's memory any more
        self._is_proxy_over = False  # nor from a node cache's
        self._way_of_part = _Way("")
        self._elsewhere: list[Hashable] = []  # over HTTP, when the others are here
        self._connection: MemoryConnection | None = None
        self._part: list[ShardSpec] = []
        self._places: list[tuple[Segment, int, int]] = []  # segment, begin and length of each shard with bytes
        self._at = self._start = self._num_confirmed = 0  # of the next to be read: number, bytes read; confirmed ones
        self._num_shared_bytes = 0

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next shards, in memory where that is known to work."""
        self._end_part(is_good=True)
        while True:
            if (way := self._way()) is None:
                self._http.put_back(self._elsewhere)
                self._elsewhere = []
            elif specs := self._shared_part(way):
                self.transport = NODE_CACHE if way.is_proxy else SHARED_MEMORY
                return specs
            if (part := self._http.next_specs()) is not None:
                self.transport = self._http.transport
                self._tell_why()
                return part
            if not self._elsewhere:  # nothing is left
                return None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the next bytes."""
        if self.is_lending:
            fill_from_lent(self, buffers)
        else:
            self._http.read_into(buffers)

    def read_run(self, places: Sequence[tuple[int, int]]) -> list[Stretch]:
        """Where the next bytes are in the owner's memory; neighbours are one stretch."""
        runs, self._at, self._start = joined_places(self._places, self._at, self._start, places)
        for _, segment, begin, nbytes in runs:
            segment.populate(begin, nbytes)
            self._num_shared_bytes += nbytes
        return [Stretch(at, segment.lent, begin, nbytes) for at, segment, begin, nbytes in runs]

    def confirm(self) -> None:
        """Look whether the owner has held the shards until now.

        Raises:
            ShardUnreachableError: It is gone, or has given them up; `next_specs` goes on over HTTP.
        """
        connection = self._connection
        if connection is not None and connection.is_open and not self._is_cancelled:
            self._num_confirmed = self._at
            return
        holder = "the node cache" if self._way_of_part.is_proxy else "the owner"
        lost = ShardUnreachableError(
            f"Failed to fetch shards from {self.node}: {holder} ended the connection under which it held them"
        )
        lost.may_go_on = not self._is_cancelled
        self._http.put_back([spec.key for spec in self._part if spec.nbytes][self._num_confirmed :])
        self._end_part(is_good=False)
        self._leave(self._way_of_part)
        raise lost

    @property
    def num_received(self) -> int:
        """Bytes that came so far, either way; any thread."""
        return self._http.num_received + self._num_shared_bytes

    def cancel(self) -> None:
        """Cut the connections."""
        self._is_cancelled = True
        if (connection := self._connection) is not None:
            connection.sock.cut()
        self._http.cancel()

    def close(self) -> None:
        """Give back the connections, and let the owner have its shards."""
        self._end_part(is_good=not self._is_cancelled)
        self._http.close()

    def _way(self) -> _Way | None:
        """The socket to ask next: the owner's, if it is of this host, or a node cache's; if it is worth trying."""
        boot, _, path = (self._node.memory or "").partition(" ")
        if self._is_cancelled:
            return None
        if path and boot == boot_id():
            return _Way(path) if not self._is_over and self._memories.is_worth_trying(path) else None
        found = None if self._is_proxy_over else self._memories.proxy(self.node)
        return None if found is None else _Way(found, is_proxy=True)

    def _shared_part(self, way: _Way) -> list[ShardSpec] | None:
        """Ask for what is left; None if that failed, or nothing of it is in memory: HTTP goes on."""
        left, self._way_of_part = self._http.take_left(), way
        wanted, text, later = self._proxied(left) if way.is_proxy else _direct(left)
        specs: list[ShardSpec] = []
        is_over, began = not later, time.monotonic()
        try:
            if text is not None:
                specs, wanted = self._asked(way, text, wanted), []
        except FAULTS as error:
            is_over, is_of_owner = True, way.is_proxy and self._connection is not None  # it is there, and told nothing
            self._end_part(is_good=False)
            if not self._is_cancelled:
                reason = reason_of(error, way.path)
                waited_s = time.monotonic() - began if isinstance(error, TimeoutError) else math.inf
                self._memories.refuse(way.path, self.node, reason, is_of_owner=is_of_owner, waited_s=waited_s)
        if not specs:
            self._end_part(is_good=True)
        self._elsewhere += wanted
        self._http.put_back(later)
        if is_over:
            self._leave(way)
        return specs or None

    def _leave(self, way: _Way) -> None:
        """Ask there no more."""
        if way.is_proxy:
            self._is_proxy_over = True
            self._http.put_back(self._elsewhere)  # the owner is asked now, and may turn out to be of this host
            self._elsewhere = []
        else:
            self._is_over = True

    def _proxied(self, left: Sequence[Hashable]) -> tuple[list[Hashable], bytes | None, list[Hashable]]:
        """As many as a node cache is asked for at once, the request's body, and those behind them.

        Shards without a promise that fits a record come over HTTP.
        """
        records: dict[Hashable, bytes] = {}
        nbytes, end = 0, len(left)
        for number, key in enumerate(left):
            promise = self._promises.get(key)
            record = ELSEWHERE if promise is None else record_of(promise[0], promise[1], 0, 0)
            if promise is None or record is ELSEWHERE:
                self._elsewhere.append(key)
                continue
            nbytes += nbytes_of(promise)
            if records and (nbytes > _PROXIED_BYTES or len(records) == _PROXIED_IDS):
                end = number
                break
            records[key] = record
        text = proxied_text(self.node, records) if records else None
        return list(records), text, list(left[end:])

    def _asked(self, way: _Way, text: bytes, wanted: Sequence[Hashable]) -> list[ShardSpec]:
        """The shards that are in memory, in the order in which they lie there."""
        ends = min(self._deadline, time.monotonic() + PATIENCE_S)
        self._connection = connection = self._memories.borrow(way.path, ends)
        if self._is_cancelled:  # looked at after _connection was filled: from here on it can be cut
            raise OutOfReachError("the fetch was given up")
        if not way.is_proxy:
            self._node.note(connection.incarnation)
        connection.ask(text, len(wanted), self._deadline, FETCH_FOR if way.is_proxy else FETCH)
        with no_collections:  # while the owner answers
            foreseen = Foreseen(wanted, self._promises)
        told = connection.told(len(wanted))
        segments = self._memories.segments(way.path, told)  # first: it closes the descriptors that came
        if told.removals != UNKNOWN_COUNT:
            self._node.note_removals(str(told.removals))
        with no_collections:
            answer = foreseen.compared(told.records, self._http.is_welcome)
            self._announce(answer.found, segments)
        for key in answer.absent:
            self.failures[key] = self._http.missing(key)
        self._elsewhere += answer.elsewhere
        return self._part

    def _announce(self, found: Iterable[tuple[ShardSpec, int, int]], segments: Mapping[int, Segment]) -> None:
        """Lend shards; one loop, as there are thousands.

        Raises:
            WireError: One is outside of its segment.
        """
        specs: list[ShardSpec] = []
        places: list[tuple[Segment, int, int]] = []
        for spec, number, begin in found:
            specs.append(spec)
            if nbytes := spec.nbytes:
                segment = segments.get(number)
                if segment is None or begin + nbytes > segment.nbytes:
                    raise WireError(f"shard {spec.key!r} is outside of segment {number}")
                places.append((segment, begin, nbytes))
        self._part, self._places = specs, places
        self._at = self._start = self._num_confirmed = 0
        self.is_lending = True

    def _end_part(self, *, is_good: bool) -> None:
        """Let the owner have its shards, and others the connection."""
        connection, self._connection = self._connection, None
        self.is_lending = False
        self._part, self._places = [], []
        if connection is None:
            return
        if is_good:
            try:
                connection.release()
            except OSError:  # it is gone
                is_good = False
        self._memories.give_back(connection, is_good=is_good)

    def _tell_why(self) -> None:
        """Say that an owner of this host announces no memory, or that there is no node cache for one of another."""
        if self._node.memory is None or self._node.memory.partition(" ")[0] == boot_id():
            return
        with contextlib.suppress(ValueError):
            if self._node.memory == "" and is_loopback(split_address(self.node)[0]):
                self._memories.tell(
                    self.node, "its server offers no shared memory (GPU_CACHE_SHM=0, or another version)"
                )
                return
        self._memories.tell_of_no_proxy(self.node)


def _direct(left: Sequence[Hashable]) -> tuple[list[Hashable], bytes | None, list[Hashable]]:
    """As many as an owner is asked for at once, the request's body, and those behind them."""
    wanted = list(left[:MAX_IDS])
    return wanted, joined_ids(wanted) if wanted else None, list(left[MAX_IDS:])
