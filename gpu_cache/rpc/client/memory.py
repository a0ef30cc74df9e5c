"""The memory of owners of this host: segments that are mapped here, and the connections under which they are held."""

from __future__ import annotations

import array
import fcntl
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch

from gpu_cache.device.hostmem import POPULATE_READ, advise, mapped
from gpu_cache.process import leave_to_parent
from gpu_cache.rpc.client.connection import DeadlineSocket, is_out_of_descriptors
from gpu_cache.rpc.shard import MAX_INCARNATION, WireError
from gpu_cache.rpc.wire.records import (
    COUNT,
    FETCH,
    FORGET,
    HEADER,
    HELLO,
    MAX_DESCRIPTORS,
    MAX_SEGMENTS,
    NUMBER,
    RECORD_BYTES,
    RECORDS,
    RELEASE,
    SEGMENT,
    SEGMENTS,
    Header,
    joined_ids,
    user_of,
)
from gpu_cache.source import LentMemory

_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
_PAGES_BYTES = 2 << 20  # pages are mapped in such steps
PATIENCE_S = 10.0  # the longest wait for an owner of this host; then HTTP is asked, which tells more
_PROXY_PATIENCE_S = 30.0  # for a node cache, which may have to fetch the shards first
_AGAIN_S = 30.0  # for so long a socket that was out of reach is not tried
# For so long a node cache is not asked for the shards of an owner about which its answer came too late. The fetch had
# waited for that answer in vain.
_LATE_AGAIN_S = 600.0
_PER_WAIT = 20  # but no longer than so many times the wait: a caller may have had little time
_FORGOTTEN_AT_ONCE = 2048  # ids in one message to a node cache, so that its socket takes the message as a whole
_LOOK_S = 1.0  # between two looks at which owners are gone
_MAX_IDLE = 8  # connections to one owner
_MAX_MAPPED = 1024  # segments of all owners
_HOLD_SLACK_S = 5.0

logger = logging.getLogger(__name__)


class OutOfReachError(Exception):
    """The owner's memory cannot be read, for the reason given; its shards come over HTTP."""


# Errors that end a read of memory; `reason_of` puts them in words.
FAULTS = (OutOfReachError, OSError, WireError)


class Segment:
    """An owner's segment, mapped here.

    Args:
        descriptor: The segment's; the caller closes it.
        nbytes: As the owner says.
    Raises:
        OutOfReachError: It is shorter, or its owner could make it so.
        OSError: It cannot be mapped.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or os.fstat(descriptor).st_size < nbytes:
            raise OutOfReachError(f"a segment of {nbytes:,} bytes is not what its owner says")
        memory = mapped(descriptor, nbytes, is_writable=False)
        self.lent = LentMemory(torch.from_numpy(memory))
        self.nbytes = nbytes
        self._address = memory.ctypes.data
        self._is_present = bytearray(-(-nbytes // _PAGES_BYTES))

    def populate(self, begin: int, nbytes: int) -> None:
        """Map the pages of a range at once, instead of one by one while they are copied."""
        first, last = begin // _PAGES_BYTES, -(-(begin + nbytes) // _PAGES_BYTES)
        if all(self._is_present[first:last]):
            return
        start, end = first * _PAGES_BYTES, min(last * _PAGES_BYTES, self.nbytes)
        advise(self._address + start, end - start, POPULATE_READ)  # where that is not known, faults do it
        self._is_present[first:last] = bytes([1]) * (last - first)

    def close(self) -> None:
        """Tell the devices that read it; it stays mapped for as long as anything here refers to it."""
        while self.lent.endings:
            self.lent.endings.pop()()


class Told(NamedTuple):
    """An owner's answer.

    Attributes:
        records: One for each shard, in the order asked for.
        segments: Number, length and descriptor of new ones. The receiver closes the descriptors.
        alive: Numbers of all its segments.
        removals: How often it has removed shards; UNKNOWN_COUNT of a node cache that does not know.
    """

    records: memoryview
    segments: list[tuple[int, int, int]]
    alive: set[int]
    removals: int


class MemoryConnection:
    """A connection to an owner's socket.

    Args:
        path: The socket's.
        deadline: The end of connecting, as by `time.monotonic()`.
    Attributes:
        sock: The socket; `cut` from any thread makes every call fail.
        incarnation: That of the owner's server.
        owes_answer: Whether the owner was asked, and not all of its answer was read.
    Raises:
        OSError: No process answers there, or not in time. As the errors below, by any call.
        WireError: Another program answers.
        OutOfReachError: It is another user's, or this process has no descriptor left for a segment.
    Thread-safety: one thread.
    """

    def __init__(self, path: str, deadline: float) -> None:
        self.sock = DeadlineSocket(socket.AF_UNIX)
        self.sock.deadline, self.sock.patience_s = deadline, PATIENCE_S
        self.owes_answer = False
        try:
            self.sock.connect(path)
            if user_of(self.sock) != os.geteuid():
                raise OutOfReachError(f"{path} is another user's")
            self.incarnation = self._hello()
        except BaseException:
            self.sock.close()
            raise
        self.path = path

    @property
    def is_open(self) -> bool:
        """Whether the owner has neither ended it nor sent what it was not asked for."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def ask(self, text: bytes, number: int, deadline: float, kind: int = FETCH) -> None:
        """Ask for shards, which the owner then holds until `release`; `told` has its answer.

        Args:
            text: Their ids, as of `joined_ids`; for FETCH_FOR, as of `proxied_text`.
            number: How many.
            deadline: The end of the fetch, as by `time.monotonic()`.
            kind: The request's.
        """
        now = time.monotonic()
        left_s = deadline - now
        patience_s = PATIENCE_S if kind == FETCH else _PROXY_PATIENCE_S
        self.sock.deadline, self.sock.patience_s = now + min(left_s / 3, patience_s), patience_s
        hold_ms = min(int((max(left_s, 0.0) + _HOLD_SLACK_S) * 1000), 0xFFFFFFFF)
        self.owes_answer = True
        self.sock.sendall(Header(kind, number, hold_ms, len(text)).encoded() + text)

    def told(self, number: int) -> Told:
        """The answer about so many shards, by the deadline of `ask`."""
        segments: list[tuple[int, int, int]] = []
        try:
            header, descriptors = self._header()
            while header.kind == SEGMENTS:
                self._add_segments(segments, header, descriptors)
                header, descriptors = self._header()
            _close_all(descriptors)
            begin = COUNT.size + NUMBER.size * header.more
            expected = RECORDS, number, begin + RECORD_BYTES * number
            if (header.kind, header.number, header.nbytes) != expected or header.more > MAX_SEGMENTS:
                what = f"an answer of kind {header.kind} about {header.number:,} shards, {header.nbytes:,} bytes"
                raise WireError(what)
            body = memoryview(self._body(header.nbytes))
        except BaseException:
            _close_all(descriptor for _, _, descriptor in segments)
            raise
        self.owes_answer = False
        alive = {one for (one,) in NUMBER.iter_unpack(body[COUNT.size : begin])}
        return Told(body[begin:], segments, alive, *COUNT.unpack(body[: COUNT.size]))

    def forget(self, text: bytes, number: int) -> bool:
        """Tell a node cache of shards that were cleared, without a wait; whether its socket took the message.

        Args:
            text: Their ids, as of `joined_ids`.
            number: How many.
        """
        message = Header(FORGET, number, 0, len(text)).encoded() + text
        try:
            return self.sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(message)
        except OSError:
            return False

    def release(self) -> None:
        """Tell the owner that the shards are copied."""
        self.sock.deadline = time.monotonic() + PATIENCE_S
        self.sock.sendall(Header(RELEASE, 0, 0, 0).encoded())

    def close(self) -> None:
        """Close it; the owner lets go of what it held."""
        self.sock.close()

    def _hello(self) -> str:
        header, descriptors = self._header()
        _close_all(descriptors)
        if header.kind != HELLO or header.nbytes > MAX_INCARNATION:
            raise WireError(f"a greeting of kind {header.kind}, {header.nbytes:,} bytes long")
        return self._body(header.nbytes).decode("ascii", "replace")

    def _add_segments(self, segments: list[tuple[int, int, int]], header: Header, descriptors: list[int]) -> None:
        """Add those of one message; their descriptors also where the message is none."""
        begin, number = len(segments), len(descriptors)
        segments += [(0, 0, descriptor) for descriptor in descriptors]
        if (header.number, header.nbytes) != (number, number * SEGMENT.size):
            raise WireError(f"{number} descriptors for {header.number:,} segments in {header.nbytes:,} bytes")
        listed = SEGMENT.iter_unpack(self._body(header.nbytes))
        segments[begin:] = [(*one, fd) for one, fd in zip(listed, descriptors, strict=True)]

    def _header(self) -> tuple[Header, list[int]]:
        """The beginning of a message, and the descriptors that came with it."""
        text, found = bytearray(HEADER.size), array.array("i")
        left = memoryview(text)
        try:
            while left:
                count, rights, flags, _ = self.sock.recvmsg_into([left], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
                for level, kind, content in rights:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        found.frombytes(content[: len(content) // 4 * 4])
                if flags & socket.MSG_CTRUNC:
                    raise OutOfReachError("this process has no descriptor left for a segment")
                if not count:
                    raise ConnectionResetError("the owner ended the connection")
                left = left[count:]
            return Header.decoded(text), found.tolist()
        except BaseException:
            _close_all(found)
            raise

    def _body(self, nbytes: int) -> bytearray:
        body = bytearray(nbytes)
        left = memoryview(body)
        while left:
            count = self.sock.recv_into(left, 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionResetError("the owner ended the connection")
            left = left[count:]
        return body


class OwnerMemory:
    """What is mapped of one owner, and idle connections to it. Its `OwnersMemory` guards it.

    Attributes:
        num_readers: Readers at work.
    """

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self.idle: list[MemoryConnection] = []
        self.num_readers = 0
        self.used_at = time.monotonic()


class OwnersMemory:
    """The memory of owners of this host that is mapped here, kept until they are gone.

    Args:
        node_cache: Where a node cache says which socket is its own; "": shards of other hosts come over HTTP.
    Thread-safety: any thread. Connects, maps and closes outside the lock.
    """

    def __init__(self, node_cache: str = "") -> None:
        self._node_cache = node_cache
        # Guards every field below, and every `OwnerMemory`.
        self._lock = threading.Lock()
        self._owners: dict[str, OwnerMemory] = {}  # by path
        self._refused: dict[str, float] = {}  # by path, until when it is not tried
        self._told: dict[str, str] = {}  # by address, the latest reason in the log
        self._looked_at = 0.0
        self._is_closed = False
        leave_to_parent(self)

    def disown(self) -> object:
        """Know nothing in a forked child, which has neither the mappings nor the connections."""
        kept, self._lock = self._owners, threading.Lock()
        self._owners, self._refused = {}, {}
        return kept

    def stats(self) -> dict[str, int]:
        """`owners`, `segments` and `mapped_bytes`, of one moment."""
        with self._lock:
            segments = [one for owner in self._owners.values() for one in owner.segments.values()]
            return {
                "owners": len(self._owners),
                "segments": len(segments),
                "mapped_bytes": sum(one.nbytes for one in segments),
            }

    def is_worth_trying(self, path: str, address: str = "") -> bool:
        """Whether it was not out of reach just now; a node cache also for shards of one owner."""
        now = time.monotonic()
        with self._lock:
            return not self._is_closed and max(self._refused.get(one, 0.0) for one in (path, path + address)) <= now

    def proxy(self, address: str) -> str | None:
        """The socket of this host's node cache, if there is one that is worth trying for an owner's shards."""
        path = self._proxy_path()
        return path if path and self.is_worth_trying(path, address) else None

    def _proxy_path(self) -> str:
        """The socket's own name, which no other node cache will have: its segments are known by that."""
        try:
            return os.path.realpath(self._node_cache, strict=True) if self._node_cache else ""
        except OSError:
            return ""

    def tell_of_no_proxy(self, address: str) -> None:
        """If a node cache should be there and is not, say that shards of an owner come over HTTP for that reason."""
        if self._node_cache and not self._proxy_path():
            self.tell(address, f"no node cache at {self._node_cache}")

    def forget_shards(self, shard_ids: Sequence[Hashable]) -> None:
        """Have the node cache drop cleared shards soon, if this process has read from it. Does not block.

        If its socket does not take all ids at once, it drops the other shards after its next question to their owner.
        """
        path = self._proxy_path()
        wanted = [one for one in shard_ids if type(one) is str] if path else []
        if not wanted:
            return
        with self._lock:
            owner = self._owners.get(path)
            connection = owner.idle.pop() if owner is not None and owner.idle else None
            if owner is None or connection is None:
                return
            owner.num_readers += 1
        groups = (wanted[at : at + _FORGOTTEN_AT_ONCE] for at in range(0, len(wanted), _FORGOTTEN_AT_ONCE))
        texts = ((joined_ids(group), len(group)) for group in groups)
        is_good = all(connection.forget(text, number) for text, number in texts if text is not None)
        self.give_back(connection, is_good=is_good)

    def borrow(self, path: str, deadline: float) -> MemoryConnection:
        """A connection to an owner; give it back by `give_back`.

        Raises:
            OSError: There is none. As `WireError` and `OutOfReachError` do.
        """
        while True:
            with self._lock:
                if (owner := self._owners.get(path)) is None:
                    owner = self._owners[path] = OwnerMemory()
                connection = owner.idle.pop() if owner.idle else None
                owner.num_readers += 1
                is_look_due = time.monotonic() >= self._looked_at + _LOOK_S
            try:
                if is_look_due:
                    self._close_gone()
                if connection is None:
                    return MemoryConnection(path, deadline)
                if connection.is_open:
                    return connection
                connection.close()
            except BaseException:
                self._leave(path)
                raise
            self._leave(path)

    def give_back(self, connection: MemoryConnection, *, is_good: bool) -> None:
        """Keep a connection for the next reader, or close it.

        One that owes an answer is closed, whatever ended its reader: the next one would take the answer for its own.
        """
        if not is_good or connection.owes_answer:
            connection.close()
            self._leave(connection.path)
        else:
            self._leave(connection.path, connection)

    def refuse(
        self, path: str, address: str, reason: str, *, is_of_owner: bool = False, waited_s: float = math.inf
    ) -> None:
        """Leave a socket alone for a while: shards come over HTTP. Say why, once for each owner and reason.

        Args:
            path: The socket's.
            address: The owner whose shards were asked for there.
            reason: The fault.
            is_of_owner: Whether the fault is about this owner: a node cache is asked for the shards of others still.
            waited_s: The wait for an answer that did not come, in seconds; infinite for another fault.
        """
        key, again_s = (path + address, _LATE_AGAIN_S) if is_of_owner else (path, _AGAIN_S)
        with self._lock:
            self._refused[key] = time.monotonic() + min(again_s, _PER_WAIT * waited_s)
        self.tell(address, reason)

    def tell(self, address: str, reason: str) -> None:
        """Say why shards of an owner of this host come over HTTP, unless that was said."""
        with self._lock:
            is_new, self._told[address] = self._told.get(address) != reason, reason
        if is_new:
            logger.info("shards of %s come over HTTP: %s", address, reason)

    def segments(self, path: str, told: Told) -> dict[int, Segment]:
        """Map the segments that an answer brought; all of the owner's that are mapped now, by number.

        Unmaps those that the owner has no more; not while others read.
        """
        made = self._mapped(path, told.segments) if told.segments else {}
        with self._lock:
            owner = self._owners[path]
            for number, segment in made.items():
                owner.segments.setdefault(number, segment)
            gone = [] if owner.num_readers > 1 else [one for one in owner.segments if one not in told.alive]
            unused = [owner.segments.pop(number) for number in gone]
            found = owner.segments.copy()
        for segment in unused:
            segment.close()
        return found

    def _mapped(self, path: str, brought: Sequence[tuple[int, int, int]]) -> dict[int, Segment]:
        """Map those that are not mapped yet, and close all descriptors."""
        try:
            with self._lock:
                known = set(self._owners[path].segments)
            return {number: Segment(fd, nbytes) for number, nbytes, fd in brought if number not in known}
        finally:
            _close_all(descriptor for _, _, descriptor in brought)

    def close(self) -> None:
        """Forget every owner that nothing reads from now, and the others when they are given back. Idempotent."""
        with self._lock:
            self._is_closed = True
        self._drop(list(self._owners))

    def _leave(self, path: str, kept: MemoryConnection | None = None) -> None:
        """One reader less; its connection is kept if there are not too many."""
        with self._lock:
            owner = self._owners[path]
            owner.num_readers -= 1
            owner.used_at = time.monotonic()
            if kept is not None and len(owner.idle) < _MAX_IDLE and not self._is_closed:
                owner.idle.append(kept)
                return
            is_over = self._is_closed or not (owner.idle or owner.num_readers)
        if kept is not None:
            kept.close()
        if is_over:
            self._drop([path])

    def _close_gone(self) -> None:
        """Forget owners that have ended their connections, and the longest unused where too much is mapped."""
        now = time.monotonic()
        with self._lock:
            self._looked_at = now
            self._refused = {path: until for path, until in self._refused.items() if until > now}
            idle = {path: owner.idle[-1] for path, owner in self._owners.items() if owner.idle}
            by_use = sorted(self._owners, key=lambda path: self._owners[path].used_at)
            num_mapped = sum(len(owner.segments) for owner in self._owners.values())
        self._drop([path for path, connection in idle.items() if not connection.is_open])
        while num_mapped > _MAX_MAPPED and len(by_use) > 1:
            num_mapped -= self._drop([by_use.pop(0)])

    def _drop(self, paths: Iterable[str]) -> int:
        """Forget owners that nothing reads from now; the number of their segments."""
        unused = []
        with self._lock:
            for path in paths:
                if path in self._owners and not self._owners[path].num_readers:
                    unused.append(self._owners.pop(path))
        for owner in unused:
            for connection in owner.idle:
                connection.close()
            for segment in owner.segments.values():
                segment.close()
        return sum(len(owner.segments) for owner in unused)


def reason_of(error: BaseException, path: str) -> str:
    """Say in words why memory was not read, of one of `FAULTS` and the socket that was asked."""
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens on {path} any more: its process has ended"
    if isinstance(error, FileNotFoundError):
        return f"{path} cannot be reached from here ({error.strerror}): its process has ended, or is in a container"
    if isinstance(error, PermissionError):
        return f"{path} is another user's ({error.strerror})"
    if isinstance(error, TimeoutError):
        return f"no answer on {path}: {error}"
    return "this process has no descriptor left" if is_out_of_descriptors(error) else str(error)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
