"""Reader of one node's shards over HTTP: requests bounded in size, answers in either form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from reprlib import repr as short_repr
from typing import cast

import torch

from gpu_cache import Promise, ShardSpec, TensorReader
from gpu_cache.process import no_collections
from gpu_cache.rpc.client.connection import AddressError, HttpAnswer, is_numeric
from gpu_cache.rpc.client.requester import (
    FAULTS,
    NUM_TRIES,
    HttpSettings,
    Requester,
    ResultT,
    kind_of_status,
    named,
)
from gpu_cache.rpc.shard import (
    ShardAnswerError,
    ShardFetchError,
    ShardLostError,
    ShardMissingError,
    ShardUnreachableError,
    TooLongError,
    WireError,
    answer_error,
    nbytes_of,
)
from gpu_cache.rpc.wire.frame import (
    CONTENT_TYPE,
    PREFIX_BYTES,
    Layout,
    described,
    header_nbytes,
    parse_header,
    serials_of,
)
from gpu_cache.rpc.wire.serialization import MAX_RANK, tensor_from_json

_SKIPPED_BYTES = 1 << 20  # at a time
# Bytes that a header may have beside the promised ids and shapes: some owners write them with more space.
_HEADER_SLACK_BYTES, _ENTRY_BYTES = 4096, 512
_JSON_SLACK_BYTES = 4096  # bytes of a tensor in JSON, beside its data
# Brackets and commas of a tensor in JSON. Each may become an object of a hundred bytes, and base64 has none of them.
_MAX_MARKS = 4 * MAX_RANK


@dataclasses.dataclass(frozen=True, slots=True)
class FrameBody:
    """The tensors' bytes in a binary answer, while they are being read."""

    shards: list[ShardSpec]
    answer: HttpAnswer
    header: bytearray
    num_seen: int = 0  # bytes of its first shard that answers before it have brought

    @property
    def num_read(self) -> int:
        """Bytes of the shards that were read."""
        return sum(spec.nbytes for spec in self.shards) - self.answer.unread_bytes

    def rest(self) -> tuple[list[ShardSpec], int, int]:
        """The shards with bytes to come; of the first one the bytes read, and the most that any answer brought."""
        num_known, position = self.num_read, 0
        while self.shards[position].nbytes <= num_known:
            num_known -= self.shards[position].nbytes
            position += 1
        shards = [spec for spec in self.shards[position:] if spec.nbytes]
        return shards, num_known, max(num_known, 0 if position else self.num_seen)

    def has_same(self, key: Hashable, other: FrameBody) -> bool:
        """Whether both have a shard with the same bytes: by incarnation and serial, if the owner says them."""
        serials, others = serials_of(self.header), serials_of(other.header)
        mine, theirs = (
            (self.answer.incarnation, serials.get(str(key))),
            (other.answer.incarnation, others.get(str(key))),
        )
        return mine == theirs and all(mine)


class Expectation:
    """The answer to one request, as far as the handles promise it.

    Args:
        keys: As they are asked for.
        promises: Of their handles, where known.
        max_unknown_bytes: The most bytes of a shard that no handle promises, or of one whole answer in JSON.
    """

    def __init__(self, keys: Sequence[Hashable], promises: Mapping[Hashable, Promise], max_unknown_bytes: int) -> None:
        self.shards = [ShardSpec(key, one[0], one[1]) for key in keys if (one := promises.get(key)) is not None]
        self._keys, self._max_unknown_bytes = keys, max_unknown_bytes
        self._layout: Layout | None = None
        if len(self.shards) == len(keys):
            with contextlib.suppress(WireError, KeyError):  # the owner will say so
                texts = [described(spec.dtype, spec.shape, spec.nbytes) for spec in self.shards]
                self._layout = Layout(keys, self.shards, texts)

    def foreseen(self, header: bytearray, payload_nbytes: int) -> list[ShardSpec] | None:
        """The shards in the order of their bytes if all is as promised; else the header has to be parsed."""
        if self._layout is None or not self._layout.is_of(header, payload_nbytes):
            return None
        return [self.shards[index] for index in self._layout.indices]

    def check_header(self, nbytes: int) -> None:
        """Raise `TooLongError` if so long a header cannot be about these shards."""
        if self._layout is not None and nbytes <= 2 * self._layout.header_nbytes:
            return
        limit = _HEADER_SLACK_BYTES + _ENTRY_BYTES * len(self._keys) + 2 * len(json.dumps(self._keys))
        if nbytes > limit:
            raise TooLongError(
                f"a header of {nbytes:,} bytes; one about {len(self._keys):,} shards has {limit:,} at most"
            )

    @property
    def json_bytes(self) -> int:
        """The most bytes of the JSON form."""
        num_unknown = len(self._keys) - len(self.shards)
        payload_nbytes = sum(spec.nbytes * (1 + (spec.dtype is torch.bfloat16)) for spec in self.shards)
        payload_nbytes += self._max_unknown_bytes if num_unknown else 0
        return payload_nbytes * 3 // 2 + _JSON_SLACK_BYTES * len(self._keys)  # base64 takes a third more


class HttpReader:
    """A `ShardReader` over `POST /data/batch`: one part for each request.

    Args:
        keys: Shard ids, wanted from this node.
        promises: Of their handles, where known: nothing longer is read, and nothing else.
        requester: Asks the node's route `FETCH`.
        settings: Limits of a request.
    Attributes:
        ends_in_time: Whether each call does. Nothing ends a resolver's, which finds the address of a name.
    """

    transport = "http"

    def __init__(
        self,
        keys: Sequence[Hashable],
        promises: Mapping[Hashable, Promise],
        requester: Requester,
        settings: HttpSettings,
    ) -> None:
        self.node, self.keys = requester.address, keys
        self.ends_in_time = is_numeric(self.node)
        self.failures: dict[Hashable, Exception] = {}
        self._promises, self._requester, self._settings = promises, requester, settings
        self._node_state = requester.node  # the reader learns the node's wire form here, and the backend remembers it
        self._left = list(reversed(keys))
        self._most = settings.max_binary_shards  # in one request; fewer once a request or an answer was too long
        self._expectation: Expectation  # that of the request under way
        self._body: FrameBody | None = None  # that of a binary part
        self._announced: Sequence[ShardSpec] = ()  # the shards of that part
        self._part_nbytes = self._num_read = 0  # its bytes, and those of reads that succeeded
        self._num_changes = 0  # parts in a row that were given up as the owner had other shards in the end
        self._decoded: TensorReader | None = None  # a part in the JSON form

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next shards; those that the owner lacks, or has otherwise than promised, become `failures`.

        Raises:
            ShardFetchError: The owner refused, could not be reached, or sent what is no use.
        """
        if self._num_read == self._part_nbytes:
            self._num_changes = 0
        while self._left:
            wanted = self._next_wanted()
            self._requester.num_faults = 0
            specs = self._ask(wanted, partial(self._part, wanted))
            if specs is not None:
                return specs
            self._left += [key for key in reversed(wanted) if key not in self.failures]
        return None

    def take_left(self) -> list[Hashable]:
        """Leave what was not asked for yet to the caller; between two parts."""
        left, self._left = self._left[::-1], []
        return left

    def put_back(self, keys: Sequence[Hashable]) -> None:
        """Ask for these with the next part, and those behind it."""
        self._left += reversed(keys)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Receive straight into the buffers; after a fault, the shards that are not complete are asked for again.

        Raises:
            ShardMissingError: The owner lost some of these meanwhile; `next_specs` goes on with the others.
            ShardAnswerError: The owner has another shard under the id of one that was read in part; `next_specs` goes
                on with it.
            ShardFetchError: Too many faults without a byte between them, or the time was up.
        """
        if self._decoded is not None:
            self._decoded.read_into(buffers)
            return
        left = [buffer for buffer in reversed(buffers) if len(buffer)]
        while left:
            assert self._body is not None, "read before next_specs"
            try:
                self._body.answer.fill(left)
            except FAULTS as error:
                self._body = self._asked_again(self._body, error)
                left = _behind(buffers, self._part_nbytes - self._body.answer.unread_bytes - self._num_read)
        self._num_read += sum(map(len, buffers))

    @property
    def num_received(self) -> int:
        """Bytes that came over the connection so far; any thread."""
        return self._requester.num_received

    def cancel(self) -> None:
        """Cut the connection."""
        self._requester.cancel()

    def close(self) -> None:
        """Give the connection back."""
        self._requester.release()

    def _next_wanted(self) -> list[Hashable]:
        """As many as one request may name: bounded by bytes and by number, the latter lower in the JSON form."""
        limits = self._settings
        most = min(self._most, limits.max_binary_shards if self._node_state.is_binary else limits.max_json_shards)
        wanted = self._left[: -most - 1 : -1]
        total = 0
        for number, promise in enumerate(map(self._promises.get, wanted)):
            total += limits.max_binary_bytes // limits.max_json_shards if promise is None else nbytes_of(promise)
            if number and total > limits.max_binary_bytes:
                del wanted[number:]
                break
        del self._left[-len(wanted) :]
        return wanted

    def _ask(self, wanted: Sequence[Hashable], receive: Callable[[HttpAnswer], ResultT]) -> ResultT:
        try:
            return self._requester.send(wanted, receive, partial(self._foresee, wanted))
        except AddressError as error:
            raise self._failed(ShardUnreachableError, str(error), wanted) from error
        except TypeError as error:  # an id that JSON cannot express
            raise self._failed(ShardFetchError, str(error), wanted) from error
        except (ValueError, RecursionError) as error:
            raise self._failed(ShardAnswerError, str(error), wanted) from error

    def _foresee(self, wanted: Sequence[Hashable]) -> None:
        """Lay out what the owner should answer, while it does the same."""
        with no_collections:
            self._expectation = Expectation(wanted, self._promises, self._settings.max_unknown_bytes)

    def _failed(self, kind: type[ShardFetchError], what: str, wanted: Sequence[Hashable]) -> ShardFetchError:
        return kind(f"Failed to fetch shard batch from {self._requester.url}: {what} ({named(wanted)})")

    def _part(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec] | None:
        """Describe the shards of an answer; None if what did not fail is to be asked for again."""
        if answer.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and len(wanted) > 1:
            self._requester.text_of(answer)
            self._most = len(wanted) // 2
            return None
        if answer.status != 200:
            self._note_missing(wanted, answer)
            return None
        self._node_state.is_binary = is_binary = answer.content_type == CONTENT_TYPE
        try:
            if not is_binary:
                return self._json_part(wanted, answer)
            body = self._frame(wanted, answer)
        except TooLongError as error:
            if len(wanted) == 1:
                self.failures[wanted[0]] = self._failed(ShardAnswerError, str(error), wanted)
            self._most = max(1, len(wanted) // 2)  # until the request names nothing but the shard that is too long
            return None
        if body is None:
            return None
        self._body, self._decoded = body, None
        self._announced, self._part_nbytes, self._num_read = body.shards, answer.unread_bytes, 0
        return body.shards

    def _note_missing(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> None:
        """Make shards that the owner lacks `failures`; any other refusal ends the fetch."""
        text = self._requester.text_of(answer)
        missing = _missing_ids(text) if answer.status == 400 else frozenset()
        lost = [key for key in wanted if key in missing]
        if not lost:
            refusal = self._requester.refusal_of(answer.status, text)
            raise self._failed(kind_of_status(answer.status), refusal, wanted)
        for key in lost:
            self.failures[key] = self.missing(key)

    def missing(self, key: Hashable) -> ShardMissingError:
        """The error of a shard that the owner does not have."""
        if (restart := self._node_state.restart) is not None:
            return ShardLostError(key, self.node, restart.before, restart.now)
        return ShardMissingError(f"Failed to fetch shard {key} from {self.node}: the owner does not have it")

    def _frame(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> FrameBody | None:
        """Read a binary answer up to its bytes; None if some shards are not as promised, which are `failures` now."""
        length = answer.unread_bytes
        if length < 0:
            raise WireError("a frame in chunks, which does not say how long it is")
        header_bytes = header_nbytes(bytes(answer.read(min(PREFIX_BYTES, length))), length)
        self._expectation.check_header(header_bytes)
        header = answer.read(header_bytes)
        with no_collections:
            shards = self._expectation.foreseen(header, answer.unread_bytes)
        if shards is None:
            with no_collections:
                shards = parse_header(bytes(header), answer.unread_bytes)
            self._check_count(len(shards), wanted)
            if unwanted := {spec.key for spec in shards}.difference(wanted):
                raise WireError(f"it sent shard {next(iter(unwanted))!r} without being asked for it")
            is_welcome = [self.is_welcome(spec) for spec in shards]  # all of them are looked at
            if not all(is_welcome):
                return None
        return FrameBody(shards, answer, header)

    def is_welcome(self, found: ShardSpec) -> bool:
        """Whether a shard is as its handle promises, or short enough where no handle promised; else it fails."""
        promise, limit = self._promises.get(found.key), self._settings.max_unknown_bytes
        if promise is None and found.nbytes > limit:
            self.failures[found.key] = ShardAnswerError(
                f"Failed to fetch shard {found.key} from {self.node}: it has {found.nbytes:,} bytes, no handle "
                f"says how many it should have, and the limit is then {limit:,} (max_unknown_bytes)"
            )
        elif promise is not None and (found.dtype, found.shape) != promise[:2]:
            self.failures[found.key] = answer_error(found.key, promise, (found.dtype, found.shape, promise[2]))
        return found.key not in self.failures

    def _asked_again(self, broken: FrameBody, error: BaseException) -> FrameBody:
        """The rest of a body that broke off: a suffix in the order of its bytes, so the sender's order is the same."""
        if broken.num_read > broken.num_seen:
            self._requester.num_faults = 0
        self._requester.fault(error)
        return self._ask([spec.key for spec in broken.rest()[0]], partial(self._resumed, broken))

    def _resumed(self, broken: FrameBody, answer: HttpAnswer) -> FrameBody:
        """The same shards as before, behind the bytes that are known of the first one, or at its begin if it changed.

        Raises:
            ShardFetchError: The part broke off; `next_specs` announces wanted shards again.
        """
        shards, num_known, num_seen = broken.rest()
        if answer.status != 200:
            self._note_missing([spec.key for spec in shards], answer)
            raise self._part_lost()
        body = self._frame_again(shards, answer)
        if body is None:
            raise self._part_lost()
        if num_known and not body.has_same(shards[0].key, broken):
            if self._part_nbytes - body.answer.unread_bytes < self._num_read:
                raise self._changed(shards[0])  # its first bytes are out of reach
            num_known = 0
        for start in range(0, num_known, _SKIPPED_BYTES):
            answer.read(min(num_known - start, _SKIPPED_BYTES))
        return dataclasses.replace(body, num_seen=num_seen)

    def _frame_again(self, shards: list[ShardSpec], answer: HttpAnswer) -> FrameBody | None:
        """As `_frame`; what has changed so much that the buffers do not fit is announced again."""
        if answer.content_type != CONTENT_TYPE:
            raise self._changed(shards[0])
        try:
            body = self._frame([spec.key for spec in shards], answer)
        except TooLongError:
            raise self._changed(shards[0]) from None
        if body is not None and body.shards != shards:
            raise self._changed(shards[0])
        return body

    def _changed(self, spec: ShardSpec) -> ShardFetchError:
        """Announce again, as the owner has other bytes under the id of a shard than those that were read of it."""
        self._num_changes += 1
        error = ShardAnswerError(
            f"Failed to fetch shard {spec.key} from {self.node}: the connection broke off in its {spec.nbytes:,} "
            f"bytes, and the owner had others in their place, {self._num_changes} times in a row"
        )
        return self._part_lost(error) if self._num_changes < NUM_TRIES else error

    def _part_lost(self, error: ShardFetchError | None = None) -> ShardFetchError:
        """Announce again, with the next part, what of this one has not been read and has not failed; returns why."""
        again, end = [], 0
        for spec in self._announced:
            end += spec.nbytes
            if spec.nbytes and end > self._num_read:
                again.append(spec.key)
        self._left += [key for key in reversed(again) if key not in self.failures]
        reason = error or next(self.failures[key] for key in again if key in self.failures)
        assert isinstance(reason, ShardFetchError)
        reason.may_go_on = True
        return reason

    def _json_part(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec]:
        limit = self._expectation.json_bytes
        text = answer.read_rest(limit + 1) if answer.unread_bytes <= limit else b""
        if not 0 < len(text) <= limit:
            kind = TooLongError if text or answer.unread_bytes else WireError
            raise kind(f"{max(answer.unread_bytes, len(text)):,} bytes of JSON; expected 1 to {limit:,}")
        num_marks = sum(text.count(mark) for mark in (b"[", b"{", b","))
        if num_marks > (most := _MAX_MARKS * len(wanted)):
            raise WireError(f"{num_marks:,} brackets and commas in JSON; {len(wanted):,} tensors have {most:,} at most")
        listed = json.loads(text)
        if not isinstance(listed, list):
            raise WireError(f"the answer is not a list but {short_repr(listed)}")
        self._check_count(len(listed), wanted)
        loaded = [self._tensor(key, described) for key, described in zip(wanted, listed, strict=True)]
        self._decoded = TensorReader(self.node, wanted, lambda: loaded)
        specs = self._decoded.next_specs() or ()
        self.failures.update(self._decoded.failures)
        return specs

    def _tensor(self, key: Hashable, described: object) -> torch.Tensor | ShardFetchError:
        """The shard, or why it is no use; the others are."""
        try:
            tensor = tensor_from_json(described)
        except ValueError as error:
            return self._failed(ShardAnswerError, str(error), [key])
        if tensor.is_meta:
            return self._failed(ShardAnswerError, "a tensor without data", [key])
        spec = ShardSpec(key, tensor.dtype, tuple(tensor.shape))
        return tensor if self.is_welcome(spec) else cast(ShardFetchError, self.failures[key])

    def _check_count(self, num_returned: int, wanted: Sequence[Hashable]) -> None:
        if num_returned != len(wanted):
            raise ShardAnswerError(
                f"Batch fetch from {self._requester.url} returned {num_returned} shards for {len(wanted)} requested "
                f"({named(wanted)})"
            )


def _behind(buffers: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """The rest of the buffers behind their first bytes, the next one last."""
    left = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left[::-1]


def _missing_ids(text: str) -> frozenset[str]:
    try:
        missing = json.loads(text)["missing_shard_ids"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    return frozenset(key for key in missing if isinstance(key, str)) if isinstance(missing, list) else frozenset()
