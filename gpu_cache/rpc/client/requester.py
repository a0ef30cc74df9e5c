"""Requests about shards to one node, tried again after faults."""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TypeVar

from gpu_cache.rpc.client.connection import BrokenOffError, HttpAnswer, NodeConnection, is_out_of_descriptors
from gpu_cache.rpc.client.pool import ConnectionPool, NodeState, Place
from gpu_cache.rpc.shard import (
    CLIENT_HEADER,
    ShardAnswerError,
    ShardFetchError,
    ShardLocalError,
    ShardMissingError,
    ShardRefusedError,
    ShardTimeoutError,
    ShardUnreachableError,
)
from gpu_cache.rpc.tokens import TOKEN_VARIABLE
from gpu_cache.rpc.wire.frame import CONTENT_TYPE

ResultT = TypeVar("ResultT")

NUM_TRIES = 3
DEFAULT_MAX_UNKNOWN_BYTES = 8 << 30
# Bytes of a body that is read as text, beside the ids that a refusal may list.
_TEXT_SLACK_BYTES = 64 << 10
_MAX_SHOWN = 2000  # characters of a refusal in a message
_NAMED_SHARDS = 3  # how many shards a message names
# The system's: a program that seeds Python's own must get the same numbers with us as without.
_chance = random.SystemRandom().random
_SHORTEST_PAUSE_S = 0.01  # before a busy node is asked again, whatever it says


class NodeBusyError(http.client.HTTPException):
    """The node answered 503, and when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


# Faults that another try may mend.
FAULTS = (OSError, http.client.HTTPException)


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """Settings that all requests of a backend share.

    `max_unknown_bytes` is the longest shard that is taken where no handle says its size. A connection that was idle
    for `doubt_after_s` may be dead without a word, as by a NAT. It gets `doubted_patience_s` to begin its answer; then
    the client asks over a fresh one.
    """

    headers: Mapping[str, str] = dataclasses.field(repr=False)  # one of them is the token
    max_json_shards: int = 32
    max_binary_bytes: int = 256 << 20
    max_binary_shards: int = 4096
    max_unknown_bytes: int = DEFAULT_MAX_UNKNOWN_BYTES
    fetch_timeout_s: float = 60.0
    delete_timeout_s: float = 10.0
    retry_pause_s: float = 0.1
    doubt_after_s: float = 15.0
    doubted_patience_s: float = 2.0


@dataclasses.dataclass(frozen=True)
class Route:
    """A route that takes shard ids, and what a message calls its work."""

    method: str
    path: str
    work: str


FETCH = Route("POST", "/data/batch", "fetch shards from")
CLEAR = Route("DELETE", "/data/clear", "clear shards at")
CHECK = Route("POST", "/data/serials", "look for shards at")


class Requester:
    """Sends requests to one route of one node over one connection, trying again where that can help.

    Args:
        address: The node's address.
        route: The route on the node's server.
        pool: Where connections come from.
        settings: Settings that all requests share.
        deadline: As by `time.monotonic()`, of all its requests together.
        node: Learns which server answers.
    Attributes:
        num_faults: Faults in a row; the reader sets it to 0 when it begins again, or sees progress. That a node is busy
            is none.
    Thread-safety: one thread; `cancel` from any.
    """

    def __init__(
        self,
        address: str,
        route: Route,
        pool: ConnectionPool,
        settings: HttpSettings,
        deadline: float,
        node: NodeState,
    ) -> None:
        self.address, self.url, self.node = address, f"http://{address}{route.path}", node
        self.num_faults = self._num_busy = 0
        self._route, self._pool, self._settings, self._deadline = route, pool, settings, deadline
        self._connection: NodeConnection | None = None
        self._cancelled, self._place = threading.Event(), Place()
        self._has_answered = False
        self._begun = 0.0  # the request under way, as by `time.monotonic()`
        self._shard_ids: Sequence[Hashable] = ()  # of the request under way
        self._max_text_bytes = _TEXT_SLACK_BYTES

    @cached_property
    def _headers(self) -> dict[str, str]:
        """Of each request; a reader of shared memory makes none."""
        named = {"Content-Type": "application/json", "Accept": CONTENT_TYPE, CLIENT_HEADER: secrets.token_hex(8)}
        return named | dict(self._settings.headers)

    def send(
        self,
        shard_ids: Sequence[Hashable],
        receive: Callable[[HttpAnswer], ResultT],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> ResultT:
        """Send one request, again after a fault, and return what `receive` makes of the answer.

        Args:
            shard_ids: The shards that the request names.
            receive: Reads the answer, whole or in part; its faults count as the request's.
            meanwhile: Called between request and answer, at each try.
        Raises:
            ShardUnreachableError: One fault too many, or ShardTimeoutError, ShardAnswerError or ShardLocalError, by
                the last fault; says how many there were.
            TypeError: Ids that JSON cannot express.
            AddressError: The address is none.
        """
        self._shard_ids, self._num_busy, self._begun = shard_ids, 0, time.monotonic()
        payload = json.dumps({"shard_ids": shard_ids}).encode()
        self._max_text_bytes = 2 * len(payload) + _TEXT_SLACK_BYTES  # for the same ids in other escapes
        while True:
            try:
                return receive(self._try(payload, meanwhile))
            except FAULTS as error:
                self.fault(error)

    def text_of(self, answer: HttpAnswer) -> str:
        """The body of a refusal, or of another answer about ids; not more of it than all ids take that were sent."""
        return answer.read_rest(self._max_text_bytes).decode("utf-8", "replace")

    def fault(self, error: BaseException) -> None:
        """Give up the connection, unless the node is only busy, and let some time pass before the next try.

        Raises:
            ShardFetchError: There is none: too many faults in a row, no time left, or cancelled.
        """
        if isinstance(error, NodeBusyError):
            self._num_busy += 1
            pause_s = self._wait_s(error)
        else:
            self.num_faults += 1
            self._drop_connections()
            pause_s = back_off_s(self._settings.retry_pause_s, self.num_faults, _chance())
        is_last = self.num_faults >= NUM_TRIES or time.monotonic() + pause_s >= self._deadline
        if is_last or self._cancelled.wait(pause_s):
            raise kind_of_fault(error)(
                f"Failed to {self._route.work} {self.url} after {self.num_faults + self._num_busy} attempts. "
                f"Last error: {shortened(repr(error))}{self._advice(error)} ({named(self._shard_ids)})"
            ) from error

    def refusal_of(self, status: int, text: str) -> str:
        """An answer other than 200, for a message; a refused token comes with its remedy."""
        if status != 401:
            advice = ""
        elif "Authorization" in self._settings.headers:
            advice = f"; the token that was sent is not the owner's: compare {TOKEN_VARIABLE} here and there"
        else:
            advice = f"; no token was sent: set {TOKEN_VARIABLE} to the owner's token before this process starts"
        return f"{status} body={shortened(text)}{advice}"

    def _advice(self, error: BaseException) -> str:
        """The question that a caller should ask first; of a time-out, the time that all attempts took."""
        if isinstance(error, ConnectionRefusedError):
            return "; does its server run?"
        if isinstance(error, TimeoutError):
            return f"; {time.monotonic() - self._begun:.3g} s in all"
        return "; is the address right?" if isinstance(error, socket.gaierror) else ""

    def _wait_s(self, busy: NodeBusyError) -> float:
        """As long as the node says, and up to half longer where there is time: those it refused came together."""
        told_s = max(busy.retry_after_s, _SHORTEST_PAUSE_S)
        longer_s = told_s * (1 + _chance() / 2)
        return longer_s if time.monotonic() + longer_s < self._deadline else told_s

    def _drop_connections(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._pool.forget(self.address)  # the idle ones are likely to be as dead

    def release(self) -> None:
        """Give connection and place back for others; the connection is closed if its last answer was not read."""
        connection, self._connection = self._connection, None
        # `cancel` sets the event, then cuts _connection. That is empty by now: it cuts no connection that others get.
        if connection is not None and not self._cancelled.is_set():
            self._pool.release(connection, self._place)
            return
        if connection is not None:
            connection.close()
        if self._place.is_taken:
            self._pool.leave(self._place)

    @property
    def num_received(self) -> int:
        """Bytes that came over the connection that it has now; any thread."""
        return 0 if (connection := self._connection) is None else connection.num_received or 0

    def cancel(self) -> None:
        """Make what is under way fail soon. Idempotent."""
        self._cancelled.set()
        self._place.is_given_up = True
        if not self._place.is_taken:
            self._pool.wake()
        if (connection := self._connection) is not None:
            connection.cancel()

    def _try(self, payload: bytes, meanwhile: Callable[[], object]) -> HttpAnswer:
        answer = self._answer(payload, meanwhile)
        self._has_answered = True
        if answer.status == 200:  # it is no secret, but one who has no token is told none
            self.node.memory = answer.memory
        if self.node.note(answer.incarnation):
            self._pool.forget(self.address)  # the idle ones are connected to a server that is gone
        if self._route is not CLEAR:
            self.node.note_removals(answer.removals)
        if answer.status == 503 and answer.retry_after_s is not None:
            raise NodeBusyError(f"503 body={shortened(self.text_of(answer))}", answer.retry_after_s)
        return answer

    def _answer(self, payload: bytes, meanwhile: Callable[[], object]) -> HttpAnswer:
        """Ask; what is due to a connection that was idle too long, or to descriptors that ran out, is no fault yet."""
        while True:
            connection = self._connected()
            since, now = connection.idle_since, time.monotonic()
            is_doubted = since is not None and now - since >= self._settings.doubt_after_s
            patience_s = self._try_ends - now
            try:
                return connection.request(
                    self._route.method,
                    self._route.path,
                    payload,
                    self._headers,
                    deadline=self._deadline,
                    patience_s=patience_s,
                    first_patience_s=min(self._settings.doubted_patience_s, patience_s) if is_doubted else None,
                    meanwhile=meanwhile,
                )
            except OSError as error:
                if not is_doubted and not (is_out_of_descriptors(error) and self._pool.make_room(self._place)):
                    raise
                self._drop_connections()

    def _connected(self) -> NodeConnection:
        """A connection whose last answer was read, mostly the same one. A place for it may have to be waited for."""
        connection = self._connection
        if connection is not None and not connection.can_be_reused:
            self._connection = None
            connection.close()
        if self._connection is None:
            if not self._place.is_taken:
                # Amid a fetch there are buffers that others wait for.
                self._pool.enter(self._place, self._try_ends if self._has_answered else self._deadline)
            self._connection = self._pool.acquire(self.address)
        if self._cancelled.is_set():  # looked at after _connection was filled: from here on it can be cut
            raise ConnectionAbortedError("the fetch was given up")
        return self._connection

    @property
    def _try_ends(self) -> float:
        """As by `time.monotonic()`: a connection that went dead without a word leaves time for the other tries."""
        now = time.monotonic()
        return now + (self._deadline - now) / (NUM_TRIES - self.num_faults)


def back_off_s(first_s: float, num_faults: int, chance: float) -> float:
    """The pause after that many faults in a row: twice as long each time, and up to half more or less by `chance`.

    So clients that lost the same node do not come back at the same moment.
    """
    return first_s * 2.0 ** (num_faults - 1) * (0.5 + chance)


def kind_of_fault(error: BaseException) -> type[ShardFetchError]:
    """The error of a request that ended with this fault."""
    if is_out_of_descriptors(error):
        return ShardLocalError
    if isinstance(error, (TimeoutError, NodeBusyError)):
        return ShardTimeoutError
    if isinstance(error, (OSError, BrokenOffError, http.client.IncompleteRead)):
        return ShardUnreachableError
    is_cut = isinstance(error, http.client.BadStatusLine) and not str(error).endswith("\n")
    return ShardUnreachableError if is_cut else ShardAnswerError


def kind_of_status(status: int) -> type[ShardFetchError]:
    """The error that stands for an answer of a status other than 200."""
    if status == 404:
        return ShardMissingError
    return ShardRefusedError if 400 <= status < 500 else ShardAnswerError


def shortened(text: str) -> str:
    """As much of a refusal as a message takes."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} ..."


def named(shard_ids: Sequence[Hashable]) -> str:
    """Which shards a message is about."""
    listed = ", ".join(map(repr, islice(shard_ids, _NAMED_SHARDS)))
    return f"shards {listed}" + (f", ... {len(shard_ids):,} in all" if len(shard_ids) > _NAMED_SHARDS else "")
