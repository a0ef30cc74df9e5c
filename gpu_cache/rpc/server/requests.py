"""The `/data` routes as calls on an owner, for any HTTP server."""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Sequence
from reprlib import repr as short_repr
from typing import Any, Protocol

import torch

from gpu_cache.process import no_collections
from gpu_cache.rpc.server.answers import Answer, TooLongError, array_answer, frame_answer, refusal
from gpu_cache.rpc.server.turns import RETRY_AFTER_S, Place, Turns
from gpu_cache.rpc.shard import RETRY_AFTER_MS_HEADER, WireError
from gpu_cache.rpc.store import ShardStore
from gpu_cache.rpc.wire.frame import CONTENT_TYPE, PREFIX_BYTES, decode_frame
from gpu_cache.rpc.wire.records import MAX_IDS
from gpu_cache.rpc.wire.serialization import tensor_from_text

DEFAULT_MAX_BODY_BYTES = 1 << 30
# Answers with tensors under way at once. Each may keep some MB in the transport; with more of them none is faster.
DEFAULT_MAX_RESPONSES = 32
# The answer to clients beyond the limit. Seconds are whole in the standard's header; ours says it exactly.
COME_BACK = {"Retry-After": "1", RETRY_AFTER_MS_HEADER: str(round(1000 * RETRY_AFTER_S))}
_MAX_IDS_COMMAS = 4 * MAX_IDS  # in ids too
# The most bytes in the header of a frame with one tensor.
_MAX_PUT_HEADER_BYTES = 64 << 10
NO_IDS_TO_READ = "Expected JSON body with string list field 'shard_ids'"
NO_IDS_TO_CLEAR = "'shard_ids' must be a list"


class DataOwner(Protocol):
    """The process whose shards are served."""

    @property
    def store(self) -> ShardStore:
        """The shards that the routes serve."""

    def evict(self, shard_ids: Sequence[str]) -> int:
        """Drop shards from this process's own cache; returns how many were there."""

    def trim(self) -> bool:
        """Give unused memory back; returns whether any was."""


class RefusedError(Exception):
    """A request that is answered by a refusal.

    Args:
        status: The answer's HTTP status.
        message: For the client.
        headers: The answer's headers.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Sending:
    """Answers under way, at most so many at once, and what they came to.

    For servers that close each connection after one answer. A client that names itself is known again, and has its
    turn; see `Turns`.

    Args:
        num_places: Answers at once.
    Thread-safety: any thread.
    """

    def __init__(self, num_places: int) -> None:
        # Guards every field below.
        self._lock = threading.Lock()
        self._turns = Turns(num_places)
        self._sent_payload_bytes = self._sent_body_bytes = 0

    def begin(self, client: str) -> Place:
        """Take a place for an answer; raises `RefusedError` if there is none for this client, "" if it has no name."""
        with self._lock:
            place = self._turns.take(client or object())
            num_taken = self._turns.num_taken
        if place is None:
            raise busy(num_taken)
        return place

    def end(self, place: Place, answer: Answer | None, num_sent: int) -> None:
        """Give a place back; count the answer if all of it was sent."""
        is_whole = answer is not None and num_sent == answer.nbytes
        with self._lock:
            self._turns.leave(place)
            if answer is not None and is_whole:
                self._sent_payload_bytes += answer.payload_nbytes
                self._sent_body_bytes += answer.nbytes if answer.status == 200 else 0

    def figures(self) -> dict[str, int]:
        """What they came to, as `/health` says it."""
        with self._lock:
            return {
                "num_responses": self._turns.num_taken,
                "num_busy_refusals": self._turns.num_refusals,
                "sent_payload_bytes": self._sent_payload_bytes,
                "sent_body_bytes": self._sent_body_bytes,
            }


def check_length(nbytes: int, limit: int) -> None:
    """Raise `RefusedError` for a body that is too long."""
    if nbytes > limit:
        raise RefusedError(413, f"a body of {nbytes:,} bytes, the limit is {limit:,}")


def check_token(given: str, token: str) -> None:
    """Raise `RefusedError` unless an `Authorization` header shows the token."""
    # surrogateescape: servers decode headers so, and a comparison of bytes takes the same time for any of them.
    if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode()):
        message = "the bearer token is not this server's" if given else "a bearer token is required"
        raise RefusedError(401, message, {"WWW-Authenticate": "Bearer"})


def busy(num_taken: int) -> RefusedError:
    """The refusal of a client for which there is no place."""
    return RefusedError(503, f"busy: {num_taken} answers are under way, others were here before", COME_BACK)


def listed_ids(body: bytes | bytearray) -> list[Any] | None:
    """The list `shard_ids` of a JSON object, or None where there is no such thing.

    Raises:
        RefusedError: More of them than a request may have.
    """
    num_commas = body.count(b",")
    if num_commas > _MAX_IDS_COMMAS:
        raise _too_many_ids(num_commas)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    shard_ids = document.get("shard_ids") if isinstance(document, dict) else None
    if not isinstance(shard_ids, list):
        return None
    if len(shard_ids) > MAX_IDS:
        raise _too_many_ids(len(shard_ids))
    return shard_ids


def ids_to_read(shard_ids: list[Any] | None) -> list[str]:
    """The ids of a batch; raises `RefusedError` if they are no list of strings."""
    if shard_ids is None or not all(isinstance(shard_id, str) for shard_id in shard_ids):
        raise RefusedError(400, NO_IDS_TO_READ)
    return shard_ids


def _too_many_ids(num_ids: int) -> RefusedError:
    return RefusedError(413, f"about {num_ids:,} shard ids in one request, the limit is {MAX_IDS:,}")


def serials(owner: DataOwner, shard_ids: list[Any] | None) -> dict[str, Any]:
    """Which of these shards there are at this moment, and the serial of each; None for those that there are not.

    Raises:
        RefusedError: That is no list of strings.
    """
    shards = owner.store.find(ids_to_read(shard_ids))
    return {"status": "ok", "serials": [None if shard is None else shard.serial for shard in shards]}


def put(owner: DataOwner, shard_id: str, body: bytes | bytearray, content_type: str) -> None:
    """Store the tensor of a body, in either form.

    Raises:
        RefusedError: It is none; nothing was stored.
    """
    decode = _tensor_of_frame if content_type == CONTENT_TYPE else _tensor_of_json
    try:
        tensor = decode(body, shard_id)
    except (ValueError, TypeError, RecursionError) as error:
        raise RefusedError(400, str(error)) from None
    owner.store.put_copies([shard_id], [tensor])


def batch_answer(owner: DataOwner, shard_ids: list[str], is_binary: bool) -> Answer:
    """The tensors, all of one moment; or why not."""
    with no_collections:  # nearly all that is made for thousands of shards is gone at its end
        found, missing = owner.store.get_many(dict.fromkeys(shard_ids) if is_binary else shard_ids)
        if missing:
            return missing_answer(missing)
        if not is_binary:
            return all_as_json([(shard_id, shard.tensor) for shard_id, shard in found])
        try:
            return frame_answer(found)
        except WireError as error:  # more than fits a frame
            return refusal(400, str(error))


def all_as_json(found: Sequence[tuple[str, torch.Tensor]]) -> Answer:
    """The tensors as a JSON array; or the refusal of too long a one."""
    try:
        return array_answer(found)
    except TooLongError as error:
        return refusal(413, str(error))


def missing_answer(missing: Sequence[str]) -> Answer:
    """The refusal of a batch that has ids which the owner does not know."""
    return refusal(400, "One or more requested shards were not found", missing_shard_ids=missing)


def clear(owner: DataOwner, shard_ids: list[Any] | None) -> dict[str, Any]:
    """Forget shards, and answer how many those were and what is left; ids that are no strings are passed over.

    Raises:
        RefusedError: That is no list.
    """
    if shard_ids is None:
        raise RefusedError(400, NO_IDS_TO_CLEAR)
    unwanted = [shard_id for shard_id in shard_ids if isinstance(shard_id, str)]
    # The store first: evicted earlier, a shard could be fetched again from the store and stay in the cache.
    cleared = owner.store.remove(unwanted)
    owner.evict(unwanted)
    return {"status": "ok", "cleared_count": cleared, **owner.store.stats()}


def _tensor_of_json(body: bytes | bytearray, shard_id: str) -> torch.Tensor:
    tensor = tensor_from_text(body)
    if tensor.is_meta:
        raise ValueError(f"shard {shard_id} has no data to store")
    return tensor


def _tensor_of_frame(body: bytes | bytearray, shard_id: str) -> torch.Tensor:
    header_nbytes = int.from_bytes(body[:PREFIX_BYTES], "little")
    if _MAX_PUT_HEADER_BYTES < header_nbytes <= len(body):
        raise ValueError(f"a header of {header_nbytes:,} bytes for one tensor, the limit is {_MAX_PUT_HEADER_BYTES:,}")
    tensors = decode_frame(body)
    if tensors.keys() != {shard_id}:
        raise ValueError(f"expected one tensor with the id {shard_id}, got {short_repr(list(tensors))}")
    return tensors[shard_id]
