"""Serves shards to other processes of this host: their places in shared memory, over a Unix socket.

A connection holds the shards of its latest answer until its client releases them, asks for others, or is gone. One that
holds them for longer than it may is closed first, and then its shards are let go: a client that finds its connection
open after it has copied knows that the bytes were good.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import math
import os
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpu_cache.process import OwnThread, forget_sockets, leave_to_parent
from gpu_cache.rpc import runtime
from gpu_cache.rpc.runtime import Runtime
from gpu_cache.rpc.segments import MAX_PATH, is_wanted, socket_folder
from gpu_cache.rpc.shard import WireError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.records import (
    ABSENT,
    COUNT,
    ELSEWHERE,
    FETCH,
    FETCH_FOR,
    FORGET,
    HEADER,
    HELLO,
    MAX_DESCRIPTORS,
    MAX_IDS,
    MAX_IDS_BYTES,
    MEMORY_HEADER,
    NUMBER,
    RECORD_BYTES,
    RECORDS,
    RELEASE,
    SEGMENT,
    SEGMENTS,
    Header,
    Proxied,
    announced,
    parse_proxied,
    segments_in,
    split_ids,
    user_of,
)

_READ_BYTES = 256 << 10
_PAUSE_S = 0.1  # without descriptors, until the next is accepted
_BACKLOG = 256
_SUFFIX = ".sock"
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much of one client the server bears.

    Attributes:
        request_s: The longest time in which a client may send a request, from its first byte on. If it begins the
            request during an answer, the time begins at the answer's end.
        answer_s: The longest time in which a client may take an answer.
        hold_s: The longest time for which a client may hold shards, whatever it asks for.
        num_clients: Connections at once; beyond, the longest idle one is closed, or the new one.
    """

    request_s: float = 10.0
    answer_s: float = 30.0
    hold_s: float = 600.0
    num_clients: int = 256


class Located(NamedTuple):
    """What is answered about shards.

    Attributes:
        records: One for each, in the order asked for.
        held: Keep the shards where they are.
        removals: How often their owner has removed shards; UNKNOWN_COUNT where that was not asked.
    """

    records: bytes
    held: Sequence[object]
    removals: int


class Proxy(Protocol):
    """Brings shards of owners on other hosts into the segments of the server's store."""

    def begin(self, asked: Proxied, answer: Callable[[Located], None]) -> None:
        """Look for shards; does not block. Calls `answer` once, on any thread."""

    def forget(self, shard_ids: Sequence[str]) -> None:
        """These were cleared. Does not block."""


class _Client:
    """One connection. Only the server's thread touches it.

    Attributes:
        asked: The bytes so far of a request that is not complete.
        is_waiting: Whether a proxy is at work on its request.
        answers: What is still to be sent, with the descriptors that go with its first byte.
        held: Shards of the latest answer.
        hold_s: For how long they may be held once the answer is sent.
        ends_at: When it is closed, as by `time.monotonic()`.
        event: The event of its socket that the server waits for.
        knows: Segments that it has descriptors of.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked = bytearray()
        self.is_waiting = False
        self.answers: deque[tuple[memoryview, Sequence[int]]] = deque()
        self.held: Sequence[object] = ()
        self.hold_s = 0.0
        self.ends_at = math.inf
        self.used_at = time.monotonic()
        self.event = selectors.EVENT_READ
        self.knows: set[int] = set()

    @property
    def is_busy(self) -> bool:
        """Whether its request is being answered: the next one waits."""
        return bool(self.answers) or self.is_waiting

    @property
    def is_idle(self) -> bool:
        return not (self.asked or self.held or self.is_busy)


class SameHostServer:
    """Answers processes of this user, on a thread of its own.

    Args:
        store: Whose shards.
        incarnation: That of the HTTP server beside it.
        limits: What it bears.
        folder: Where the socket is; None: a folder of this user alone.
        proxy: Brings shards of owners on other hosts; None: it serves the store's alone.
    Attributes:
        path: The socket's path.
    Raises:
        OSError: There is no place for a socket.
        RuntimeError: The system has no thread left.
    """

    def __init__(
        self,
        store: ShardStore,
        incarnation: str,
        limits: Limits | None = None,
        folder: Path | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._store, self._incarnation, self._proxy = store, incarnation, proxy
        self._limits = limits or Limits()
        self.path, self._listener = _listening(folder or socket_folder())
        self._waking, self._wake = socket.socketpair()
        self._clients: dict[int, _Client] = {}  # by descriptor
        self._located: deque[tuple[_Client, float, Located]] = deque()  # by a proxy; appended to by any thread
        self._selector = selectors.DefaultSelector()
        self._part = memoryview(bytearray(_READ_BYTES))  # made once: a fresh one costs page faults at each read
        self._listens_at = 0.0  # from when on, as there were no descriptors
        self._is_stopping = self._is_inherited = False
        self.num_answers = self.num_refused = self.num_bytes = 0  # since start; written by its thread
        for sock in (self._listener, self._waking):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = OwnThread(self._run, "areal-rpc-memory", self._ask_to_stop)
        try:
            self._thread.start()
        except RuntimeError:
            self._close()
            raise
        leave_to_parent(self)

    def __repr__(self) -> str:
        return f"SameHostServer({self.path}, {len(self._clients)} clients)"

    @property
    def num_clients(self) -> int:
        """Connections that there are; any thread."""
        return len(self._clients)

    def stop(self) -> None:
        """Close every connection, and remove the socket. Idempotent; any thread."""
        if not self._is_inherited:
            self._ask_to_stop()
            self._thread.join()

    def disown(self) -> object:
        """Close all sockets in a forked child, which else keeps them open when the owner is gone."""
        self._is_inherited = True
        sockets = [self._listener, self._waking, self._wake, *(client.sock for client in self._clients.values())]
        with contextlib.suppress(ValueError, KeyError):  # closed: it had stopped
            forget_sockets([self._selector.fileno()])
        forget_sockets(sock.fileno() for sock in sockets)
        return self

    def _ask_to_stop(self) -> None:
        self._is_stopping = True
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake; closed: it has stopped
            self._wake.send(b"x", socket.MSG_DONTWAIT)

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
        finally:
            for client in list(self._clients.values()):
                self._drop(client)
            self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        for sock in (self._listener, self._waking, self._wake):
            sock.close()
        self._selector.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._wait_s()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._waking:
                self._waking.recv(_READ_BYTES)
            elif (client := self._clients.get(key.fd)) is not None:
                self._attempt(client, self._flush if client.answers else self._read)
        self._pass_on()
        now = time.monotonic()
        for client in [one for one in self._clients.values() if one.ends_at <= now]:
            logger.warning("closed a connection on %s whose client was too slow", self.path)
            self._drop(client)
        if self._listens_at and self._listens_at <= now:
            self._listens_at = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _wait_s(self) -> float | None:
        ends = [client.ends_at for client in self._clients.values() if client.ends_at < math.inf]
        ends += [self._listens_at] if self._listens_at else []
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # of a client that is gone; or there are no descriptors
            if error.errno in _OUT_OF_DESCRIPTORS:
                self._selector.unregister(self._listener)
                self._listens_at = time.monotonic() + _PAUSE_S
            return
        if user_of(sock) != os.geteuid() or not self._has_room():
            self.num_refused += 1
            sock.close()
            return
        sock.setblocking(False)
        client = self._clients[sock.fileno()] = _Client(sock)
        self._selector.register(sock, client.event)
        try:
            self._send(client, [(Header(HELLO, 0, 0, len(self._incarnation)), self._incarnation.encode(), ())])
        except OSError:  # it is gone
            self._drop(client)

    def _has_room(self) -> bool:
        """Whether there may be one more; the longest idle one makes room."""
        if len(self._clients) < self._limits.num_clients:
            return True
        idle = min((one for one in self._clients.values() if one.is_idle), key=lambda one: one.used_at, default=None)
        if idle is not None:
            self._drop(idle)
        return idle is not None

    def _drop(self, client: _Client) -> None:
        """Close a connection, and only then let go of what it holds."""
        self._selector.unregister(client.sock)
        del self._clients[client.sock.fileno()]
        client.sock.close()
        client.held = ()
        self._store.segments.settle()

    def _pass_on(self) -> None:
        """Answer clients for whom a proxy has done its work, and who are still there."""
        while self._located:
            client, hold_s, located = self._located.popleft()
            if self._clients.get(client.sock.fileno()) is client:
                client.is_waiting = False
                self._attempt(client, partial(self._reply, located=located, hold_s=hold_s))

    def _attempt(self, client: _Client, work: Callable[[_Client], None]) -> None:
        """Do something for a client, and what it asked for meanwhile; a fault is the end of its connection."""
        client.used_at = time.monotonic()
        try:
            work(client)
            self._parse(client)
        except (OSError, WireError) as error:
            if isinstance(error, WireError):
                logger.warning("closed a connection on %s: %s", self.path, str(error))
            self._drop(client)

    def _read(self, client: _Client) -> None:
        """Take what came; raises `OSError` if the client is gone."""
        try:
            count = client.sock.recv_into(self._part)
        except BlockingIOError:
            return
        if not count:
            raise ConnectionResetError("the client is gone")
        client.asked += self._part[:count]
        if client.is_waiting and len(client.asked) > MAX_IDS_BYTES:
            raise WireError("a client that asks on and on, and waits for no answer")

    def _parse(self, client: _Client) -> None:
        """Answer requests that are complete, one at a time; raises `WireError` for what is none."""
        while not client.is_busy and (request := self._next_request(client)) is not None:
            self._answer(client, *request)
        if client.asked and not client.is_busy:  # the rest has to come in time; it may have begun during an answer
            client.ends_at = min(client.ends_at, time.monotonic() + self._limits.request_s)

    def _next_request(self, client: _Client) -> tuple[Header, bytearray] | None:
        """Take a request and its body out of what came; None until all of it is there."""
        if len(client.asked) < HEADER.size:
            return None
        request = Header.decoded(client.asked[: HEADER.size])
        _check(request, self._proxy)
        if len(client.asked) < (end := HEADER.size + request.nbytes):
            return None
        body = client.asked[HEADER.size : end]
        del client.asked[:end]
        return request, body

    def _answer(self, client: _Client, request: Header, body: bytearray) -> None:
        client.ends_at = math.inf
        client.held = ()
        hold_s = min(request.more / 1000, self._limits.hold_s)
        if request.kind == RELEASE:
            self._store.segments.settle()
        elif request.kind == FETCH:
            shards = self._store.find(split_ids(body, request.number) if request.number else [])
            records = b"".join([ABSENT if shard is None else shard.record for shard in shards])
            held = [shard for shard in shards if shard is not None and shard.record is not ELSEWHERE]
            self.num_bytes += sum(shard.nbytes for shard in held)
            self._reply(client, Located(records, held, self._store.num_removals), hold_s)
        elif self._proxy is not None:
            self._ask_proxy(client, request, body, hold_s)

    def _ask_proxy(self, client: _Client, request: Header, body: bytearray, hold_s: float) -> None:
        assert self._proxy is not None
        if request.kind == FORGET:
            self._proxy.forget(split_ids(body, request.number))
            return
        asked = parse_proxied(body, request)
        client.is_waiting = True

        def answer(located: Located) -> None:
            self._located.append((client, hold_s, located))
            self._wake_up()

        self._proxy.begin(asked, answer)

    def _reply(self, client: _Client, located: Located, hold_s: float) -> None:
        """Answer, and hold what the answer is about."""
        records, client.held, client.hold_s = located.records, located.held, hold_s
        self.num_answers += 1
        numbers = self._store.segments.numbers()
        alive = COUNT.pack(located.removals) + b"".join(map(NUMBER.pack, numbers))
        client.knows.intersection_update(numbers)
        is_known = len(client.knows) == len(numbers)  # each of them
        news = [] if is_known else [number for number in segments_in(records) if number not in client.knows]
        answer = Header(RECORDS, len(records) // RECORD_BYTES, len(numbers), len(alive) + len(records))
        self._send(client, [*(self._segments(client, news) if news else ()), (answer, alive + records, ())])

    def _segments(self, client: _Client, numbers: Sequence[int]) -> Iterator[tuple[Header, bytes, Sequence[int]]]:
        """Messages that bring descriptors, as many in each as the system lets through."""
        client.knows.update(numbers)
        found = self._store.segments.descriptors(numbers)
        for at in range(0, len(found), MAX_DESCRIPTORS):
            some = found[at : at + MAX_DESCRIPTORS]
            listed = b"".join(SEGMENT.pack(number, nbytes) for number, nbytes, _ in some)
            yield Header(SEGMENTS, len(some), 0, len(listed)), listed, [descriptor for _, _, descriptor in some]

    def _send(self, client: _Client, messages: Sequence[tuple[Header, bytes, Sequence[int]]]) -> None:
        for header, body, descriptors in messages:
            client.answers.append((memoryview(header.encoded() + body), descriptors))
        client.ends_at = time.monotonic() + self._limits.answer_s
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        """Send what the client takes now; its time to hold begins when it has taken all."""
        while client.answers:
            left, descriptors = client.answers[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                count = client.sock.sendmsg([left], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait_for(client, selectors.EVENT_WRITE)
                return
            client.answers.popleft()
            if count < len(left):
                client.answers.appendleft((left[count:], ()))
        client.ends_at = time.monotonic() + client.hold_s if client.held else math.inf
        self._wait_for(client, selectors.EVENT_READ)

    def _wait_for(self, client: _Client, event: int) -> None:
        if client.event != event:
            client.event = event
            self._selector.modify(client.sock, event)


class Offer:
    """The server beside an HTTP server that is not ours: starts when it is first announced, ends with the runtime.

    Args:
        incarnation: That of the HTTP server.
    Thread-safety: any thread.
    """

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        # Guards _served.
        self._lock = threading.Lock()
        self._served: tuple[Runtime | None, SameHostServer | None] = None, None
        leave_to_parent(self)

    def disown(self) -> object:
        """Offer nothing of the parent's in a forked child, where the lock may be held for good."""
        kept, self._lock, self._served = self._served, threading.Lock(), (None, None)
        return kept

    def server(self) -> SameHostServer | None:
        """The server of this process's store; None if there is none here."""
        current = runtime.current()
        with self._lock:
            owner, served = self._served
        if owner is current:
            return served
        made = opened(current.store, self._incarnation)
        with self._lock:
            if is_first := self._served[0] is not current:
                self._served = current, made
            served = self._served[1]
        if made is not None:
            if is_first:
                current.endings.append(made.stop)
            else:  # another thread was first
                made.stop()
        return served


def opened(store: ShardStore, incarnation: str) -> SameHostServer | None:
    """A server for a store; None where shared memory is off, or there is no place for a socket, which one line says."""
    if not is_wanted():
        return None
    try:
        return SameHostServer(store, incarnation)
    except (OSError, ValueError, RuntimeError) as error:
        logger.info("processes of this host fetch over HTTP: no socket for shared memory (%s)", str(error))
        return None


def headers(server: SameHostServer | None) -> dict[str, str]:
    """What an HTTP answer says of a server to clients of this host."""
    return {} if server is None else {MEMORY_HEADER: announced(server.path)}


def figures(store: ShardStore, server: SameHostServer | None) -> dict[str, Any]:
    """What `/health` says of shared memory."""
    served = {} if server is None else {"socket": server.path, "answers": server.num_answers, "bytes": server.num_bytes}
    return {"same_host": {**served, **store.segments.stats()}}


def _check(request: Header, proxy: Proxy | None) -> None:
    """Raise `WireError` for a request that is none, or asks for too much."""
    most = MAX_IDS_BYTES + (request.number * RECORD_BYTES if request.kind == FETCH_FOR else 0)
    kinds = (FETCH,) if proxy is None else (FETCH, FETCH_FOR, FORGET)
    is_about_ids = request.kind in kinds and request.number <= MAX_IDS and request.nbytes <= most
    is_release = request.kind == RELEASE and not request.nbytes
    if not (is_about_ids or is_release):
        raise WireError(
            f"a request of kind {request.kind} for {request.number:,} shards, {request.nbytes:,} bytes long"
        )


def _listening(folder: Path) -> tuple[str, socket.socket]:
    """A listening socket, which gets its name when it listens: a client that finds the name can connect."""
    _remove_dead(folder)
    name = f"{os.getpid()}-{secrets.token_hex(8)}"
    hidden, path = folder / f".{name}", str(folder / f"{name}{_SUFFIX}")
    if not path.isprintable() or not path.isascii() or len(path) > MAX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"{path} cannot be announced")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(hidden))
        os.chmod(hidden, 0o600)
        listener.listen(_BACKLOG)
        os.rename(hidden, path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        raise
    return path, listener


def _remove_dead(folder: Path) -> None:
    """Remove sockets of owners that ended without a word: no process listens there any more."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                os.unlink(path)
