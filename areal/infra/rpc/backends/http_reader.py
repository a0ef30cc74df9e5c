"""Shards of one node over one connection: the part of the HTTP backend that a draining thread runs."""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from areal.infra.rpc.backends.http_connection import ConnectionPool, HttpAnswer, NodeConnection
from areal.infra.rpc.serialization import tensor_from_json
from areal.infra.rpc.shard import ShardFetchError, ShardMissingError, WireError
from areal.infra.rpc.wire import CONTENT_TYPE, PREFIX_BYTES, FrameEntry, header_nbytes, parse_header
from gpu_cache import ShardSpec, TensorReader

NUM_TRIES = 3
_RETRY_PAUSE_S = 0.05
_MAX_ERROR_TEXT = 2000

# What a connection may raise that another try may mend.
FAULTS = (OSError, http.client.HTTPException)


@dataclasses.dataclass(slots=True)
class NodeForm:
    """What a node's server speaks, once it has answered."""

    is_binary: bool | None = None  # None: not asked yet


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """What every request of a backend has in common."""

    headers: Mapping[str, str]
    max_json_shards: int
    max_binary_bytes: int = 256 << 20
    max_binary_shards: int = 4096
    max_body_bytes: int = 8 << 30


class Requester:
    """Sends requests to one node over one connection, trying again where that can help.

    Thread-safety: one thread; `cancel` from any.
    """

    def __init__(self, address: str, pool: ConnectionPool, settings: HttpSettings, deadline: float) -> None:
        self.address = address
        self._pool, self._settings, self._deadline = pool, settings, deadline
        self._connection: NodeConnection | None = None
        self._is_cancelled = False

    def send(self, method: str, path: str, body: Any, accept: str | None = None) -> HttpAnswer:
        """Send one request; three tries within the deadline. A status other than 503 is an answer, not a fault.

        Raises:
            ShardFetchError: No answer; says how often it was tried, and the last error.
        """
        headers = {"Content-Type": "application/json", **self._settings.headers}
        if accept is not None:
            headers["Accept"] = accept
        payload = json.dumps(body).encode()
        last: BaseException | None = None
        for attempt in range(1, NUM_TRIES + 1):
            try:
                answer = self._try(method, path, payload, headers, is_fresh=attempt > 1)
                if answer.status != 503 or answer.retry_after_s is None:
                    return answer
                last, pause_s = ShardFetchError(f"503 body={error_text(answer)}"), answer.retry_after_s
            except FAULTS as error:
                self.drop()
                last, pause_s = error, _RETRY_PAUSE_S * attempt
            if self._is_cancelled or time.monotonic() + pause_s >= self._deadline or attempt == NUM_TRIES:
                break
            time.sleep(pause_s)
        raise ShardFetchError(
            f"Failed to fetch shards from http://{self.address}{path} after {attempt} attempts. Last error: {last!r}"
        ) from last

    def drop(self) -> None:
        """Close the connection, and the idle ones to the node, which are likely to be as dead."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._pool.forget(self.address)

    def release(self) -> None:
        """Give the connection back for others, or close it if its last answer was not read."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.release(connection)

    def cancel(self) -> None:
        """Make what is under way fail soon."""
        self._is_cancelled = True
        connection = self._connection
        if connection is not None:
            connection.cancel()

    def _try(self, method: str, path: str, payload: bytes, headers: Mapping[str, str], *, is_fresh: bool) -> HttpAnswer:
        if self._is_cancelled:
            raise ConnectionAbortedError("the fetch was given up")
        if self._connection is not None and not self._connection.can_be_reused:
            self.drop()
        if self._connection is None:
            self._connection = self._pool.acquire(self.address, fresh=is_fresh)
        return self._connection.request(method, path, payload, headers, self._deadline)


class HttpReader:
    """A `ShardReader` over `POST /data/batch`: one part for each request.

    Args:
        keys: Shard ids, wanted from this node.
        nbytes: Their lengths where known.
        requester: The connection.
        settings: Limits of a request.
        form: What the node speaks; learnt here, remembered by the backend.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        nbytes: Mapping[Hashable, int],
        requester: Requester,
        settings: HttpSettings,
        form: NodeForm,
    ) -> None:
        self.node, self.keys = requester.address, keys
        self.failures: dict[Hashable, Exception] = {}
        self._nbytes, self._requester, self._settings, self._form = nbytes, requester, settings, form
        self._left = list(reversed(keys))
        self._read: Callable[[Sequence[memoryview]], None] = _nothing_to_read

    @property
    def _url(self) -> str:
        return f"http://{self.node}/data/batch"

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next shards; those the owner does not have become `failures`, the rest is asked for again."""
        while self._left:
            wanted = self._next_wanted()
            while wanted:
                answer = self._requester.send("POST", "/data/batch", {"shard_ids": wanted}, accept=CONTENT_TYPE)
                if answer.status == 200:
                    return self._part(wanted, answer)
                wanted = self._without_missing(wanted, answer)
        return None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Receive straight into the buffers.

        Raises:
            ShardFetchError: The body broke off or came too late.
        """
        try:
            self._read(buffers)
        except FAULTS as error:
            raise ShardFetchError(f"Failed to fetch shards from {self._url}: {error}") from error

    def cancel(self) -> None:
        """Cut the connection."""
        self._requester.cancel()

    def close(self) -> None:
        """Give the connection back."""
        self._requester.release()

    def _next_wanted(self) -> list[Hashable]:
        """As many as one request may name: bounded by bytes and number, by number alone in the JSON form."""
        limits = self._settings
        most = limits.max_binary_shards if self._form.is_binary else limits.max_json_shards
        wanted: list[Hashable] = []
        total = 0
        while self._left and len(wanted) < most:
            total += self._nbytes.get(self._left[-1], limits.max_binary_bytes // limits.max_json_shards)
            if wanted and total > limits.max_binary_bytes:
                break
            wanted.append(self._left.pop())
        return wanted

    def _without_missing(self, wanted: list[Hashable], answer: HttpAnswer) -> list[Hashable]:
        """What to ask again for when the owner lacks some; any other refusal ends the fetch."""
        text = error_text(answer)
        missing = _missing_ids(text) if answer.status == 400 else frozenset()
        lost = [key for key in wanted if key in missing]
        if not lost:
            raise ShardFetchError(f"Failed to fetch shard batch from {self._url}: {answer.status} body={text}")
        for key in lost:
            self.failures[key] = ShardMissingError(
                f"Failed to fetch shard {key} from {self.node}: the owner does not have it"
            )
        return [key for key in wanted if key not in missing]

    def _part(self, wanted: list[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec]:
        self._form.is_binary = answer.content_type == CONTENT_TYPE
        try:
            return self._binary_part(wanted, answer) if self._form.is_binary else self._json_part(wanted, answer)
        except (*FAULTS, ValueError, TypeError, RecursionError) as error:
            raise ShardFetchError(
                f"Failed to fetch shard batch from {self._url}: {error} (shards {', '.join(map(str, wanted[:3]))}"
                f"{', ...' if len(wanted) > 3 else ''})"
            ) from error

    def _binary_part(self, wanted: list[Hashable], answer: HttpAnswer) -> list[ShardSpec]:
        entries = list(frame_entries(answer, self._settings.max_body_bytes))
        if {entry.shard_id for entry in entries} != set(wanted):
            raise WireError(_count_mismatch(self._url, len(entries), len(wanted)))
        self._read = answer.read_into
        return [ShardSpec(entry.shard_id, entry.dtype, entry.shape) for entry in entries]

    def _json_part(self, wanted: list[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec]:
        described = json.loads(answer.read())
        if not isinstance(described, list) or len(described) != len(wanted):
            raise WireError(_count_mismatch(self._url, len(described), len(wanted)))
        tensors = [_with_bytes(tensor_from_json(one)) for one in described]
        decoded = TensorReader(self.node, wanted, lambda: tensors)
        self._read = decoded.read_into
        return decoded.next_specs() or ()


def frame_entries(answer: HttpAnswer, max_body_bytes: int) -> Iterator[FrameEntry]:
    """Read a binary answer up to its bytes, and describe its shards in the order of their bytes."""
    length = answer.unread_bytes
    if not PREFIX_BYTES <= length <= max_body_bytes:
        raise WireError(f"a frame of {length:,} bytes; expected {PREFIX_BYTES} to {max_body_bytes:,}")
    header = answer.read(header_nbytes(answer.read(PREFIX_BYTES), length))
    yield from parse_header(header, answer.unread_bytes)


def error_text(answer: HttpAnswer) -> str:
    """The body of a refusal, as text; cut if it is long, unless it lists missing shards."""
    text = answer.read().decode("utf-8", "replace")
    return text if len(text) <= _MAX_ERROR_TEXT or "missing_shard_ids" in text else text[:_MAX_ERROR_TEXT] + " ..."


def _missing_ids(text: str) -> frozenset[str]:
    try:
        missing = json.loads(text)["missing_shard_ids"]
    except (ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(key for key in missing if isinstance(key, str)) if isinstance(missing, list) else frozenset()


def _with_bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise WireError("a tensor without data")
    return tensor


def _count_mismatch(url: str, returned: int, requested: int) -> str:
    return f"Batch fetch from {url} returned {returned} shards for {requested} requested"


def _nothing_to_read(buffers: Sequence[memoryview]) -> None:
    raise AssertionError("read before next_specs")
