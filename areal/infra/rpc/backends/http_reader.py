"""Reader of one node's shards over HTTP: requests bounded in size, answers in either form."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from reprlib import repr as short_repr
from typing import NamedTuple

import torch

from areal.infra.rpc.backends.http_connection import AddressError, HttpAnswer
from areal.infra.rpc.backends.http_requester import (
    FAULTS,
    HttpSettings,
    Requester,
    ResultT,
    kind_of_status,
    named,
    read_text,
    shortened,
)
from areal.infra.rpc.layout import PREFIX_BYTES, Layout, described
from areal.infra.rpc.serialization import tensor_from_json
from areal.infra.rpc.shard import (
    ShardAnswerError,
    ShardFetchError,
    ShardLostError,
    ShardMissingError,
    ShardUnreachableError,
    WireError,
)
from areal.infra.rpc.wire import CONTENT_TYPE, header_nbytes, parse_header
from gpu_cache import ShardSpec, TensorReader

_SKIPPED_BYTES = 1 << 20  # at a time


@dataclasses.dataclass(frozen=True, slots=True)
class FrameBody:
    """The tensors' bytes in a binary answer, while they are being read."""

    shards: list[ShardSpec]
    answer: HttpAnswer
    num_known: int = 0  # bytes at its beginning that an answer which broke off had brought already

    @property
    def num_new(self) -> int:
        """Bytes read beyond those."""
        return sum(spec.nbytes for spec in self.shards) - self.answer.unread_bytes - self.num_known

    def rest(self) -> tuple[list[ShardSpec], int]:
        """The shards that are not known to their end, and how many bytes of the first one are."""
        num_known = self.num_known + self.num_new
        position = 0
        while self.shards[position].nbytes <= num_known:
            num_known -= self.shards[position].nbytes
            position += 1
        return self.shards[position:], num_known


class Foreseen(NamedTuple):
    """An answer as the owner will give it if it has what is expected."""

    layout: Layout
    shards: list[ShardSpec]  # as they were asked for


class HttpReader:
    """A `ShardReader` over `POST /data/batch`: one part for each request.

    Args:
        keys: Shard ids, wanted from this node.
        expected: Meta tensors as they should be, where known: bounds requests, and saves parsing a header that says so.
        requester: Of the node, for `FETCH`.
        settings: Limits of a request.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        expected: Mapping[Hashable, torch.Tensor],
        requester: Requester,
        settings: HttpSettings,
    ) -> None:
        self.node, self.keys = requester.address, keys
        self.failures: dict[Hashable, Exception] = {}
        self._expected, self._requester, self._settings = expected, requester, settings
        self._node_state = requester.node  # what the node speaks is learnt here, and remembered by the backend
        self._left = list(reversed(keys))
        self._foreseen: Foreseen | None = None  # of the answer to the request under way
        self._body: FrameBody | None = None  # of a binary part
        self._announced: Sequence[ShardSpec] = ()  # the shards of that part
        self._num_read = 0  # of its bytes, by reads that succeeded
        self._decoded: TensorReader | None = None  # a part in the JSON form

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Ask for the next shards; those that the owner does not have become `failures`, the rest is asked for again.

        Raises:
            ShardFetchError: The owner refused, could not be reached, or sent what is no use.
        """
        while self._left:
            wanted = self._next_wanted()
            while wanted:
                self._requester.num_faults = 0
                specs = self._ask(wanted, partial(self._part, wanted))
                if specs is not None:
                    return specs
                wanted = [key for key in wanted if key not in self.failures]
        return None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Receive straight into the buffers; after a fault, the shards that are not complete are asked for again.

        Raises:
            ShardMissingError: The owner lost some of these meanwhile; `next_specs` goes on with the others.
            ShardFetchError: Too many faults without a byte between them, or the time was up.
        """
        if self._decoded is not None:
            self._decoded.read_into(buffers)
            return
        left = [buffer for buffer in reversed(buffers) if len(buffer)]
        num_bytes = sum(map(len, left))
        self._receive(left)
        self._num_read += num_bytes

    def cancel(self) -> None:
        """Cut the connection."""
        self._requester.cancel()

    def close(self) -> None:
        """Give the connection back."""
        self._requester.release()

    def _next_wanted(self) -> list[Hashable]:
        """As many as one request may name: bounded by bytes and by number, the latter lower in the JSON form."""
        limits = self._settings
        most = limits.max_binary_shards if self._node_state.is_binary else limits.max_json_shards
        wanted: list[Hashable] = []
        total = 0
        while self._left and len(wanted) < most:
            expected = self._expected.get(self._left[-1])
            total += limits.max_binary_bytes // limits.max_json_shards if expected is None else expected.nbytes
            if wanted and total > limits.max_binary_bytes:
                break
            wanted.append(self._left.pop())
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
        self._foreseen = None
        known = self._expected
        expected = [ShardSpec(key, known[key].dtype, tuple(known[key].shape)) for key in wanted if key in known]
        if len(expected) == len(wanted):
            with contextlib.suppress(WireError, KeyError):  # the owner will say so
                texts = [described(spec.dtype, spec.shape, spec.nbytes) for spec in expected]
                self._foreseen = Foreseen(Layout(wanted, expected, texts), expected)

    def _failed(self, kind: type[ShardFetchError], what: str, wanted: Sequence[Hashable]) -> ShardFetchError:
        return kind(f"Failed to fetch shard batch from {self._requester.url}: {what} ({named(wanted)})")

    def _part(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec] | None:
        """Describe the shards of an answer; None if the owner lacks some, which are `failures` now."""
        if answer.status != 200:
            self._note_missing(wanted, answer)
            return None
        self._node_state.is_binary = is_binary = answer.content_type == CONTENT_TYPE
        return self._binary_part(wanted, answer) if is_binary else self._json_part(wanted, answer)

    def _note_missing(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> None:
        """Make shards that the owner lacks `failures`; any other refusal ends the fetch."""
        text = read_text(answer)
        missing = _missing_ids(text) if answer.status == 400 else frozenset()
        lost = [key for key in wanted if key in missing]
        if not lost:
            raise self._failed(kind_of_status(answer.status), f"{answer.status} body={shortened(text)}", wanted)
        for key in lost:
            self.failures[key] = self._missing(key)

    def _missing(self, key: Hashable) -> ShardMissingError:
        if (restart := self._node_state.restart) is not None:
            return ShardLostError(key, self.node, restart.before, restart.now)
        return ShardMissingError(f"Failed to fetch shard {key} from {self.node}: the owner does not have it")

    def _binary_part(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> list[ShardSpec]:
        shards = self._described(wanted, answer)
        self._body, self._decoded = FrameBody(shards, answer), None
        self._announced, self._num_read = shards, 0
        return shards

    def _described(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> list[ShardSpec]:
        """Read a binary answer up to its bytes, and describe its shards in the order of their bytes."""
        length, limit = answer.unread_bytes, self._settings.max_body_bytes
        if answer.content_type != CONTENT_TYPE or not 0 <= length <= limit:
            raise WireError(f"{length:,} bytes of {answer.content_type}, not a frame of at most {limit:,}")
        header = answer.read(header_nbytes(bytes(answer.read_rest(PREFIX_BYTES)), length))
        foreseen = self._foreseen
        if foreseen and foreseen.layout.is_of(header, answer.unread_bytes):
            return [foreseen.shards[index] for index in foreseen.layout.indices]
        shards = parse_header(bytes(header), answer.unread_bytes)
        self._check_count(len(shards), wanted)
        if unwanted := {spec.key for spec in shards}.difference(wanted):
            raise WireError(f"it sent shard {next(iter(unwanted))!r} without being asked for it")
        return shards

    def _receive(self, left: list[memoryview]) -> None:
        """Fill buffers, the next one last, from the body of the part, and from further ones where it breaks off."""
        while left:
            assert self._body is not None, "read before next_specs"
            try:
                self._body.answer.fill(left)
            except FAULTS as error:
                self._body = self._asked_again(self._body, error)

    def _asked_again(self, broken: FrameBody, error: BaseException) -> FrameBody:
        """The rest of a body that broke off: a suffix in the order of its bytes, so the sender's order is the same."""
        if broken.num_new:
            self._requester.num_faults = 0
        self._requester.fault(error)
        shards, num_known = broken.rest()
        return self._ask([spec.key for spec in shards], partial(self._resumed, shards, num_known))

    def _resumed(self, shards: Sequence[ShardSpec], num_known: int, answer: HttpAnswer) -> FrameBody:
        """Check that an answer has the same shards as before, and skip what is known of the first one."""
        wanted = [spec.key for spec in shards]
        if answer.status != 200:
            self._note_missing(wanted, answer)
            raise self._part_lost()
        again = self._described(wanted, answer)
        if again != shards:
            raise WireError("the shards are not what they were before the connection broke")
        for start in range(0, num_known, _SKIPPED_BYTES):
            answer.read(min(num_known - start, _SKIPPED_BYTES))
        return FrameBody(again, answer, num_known)

    def _part_lost(self) -> Exception:
        """Announce again, with the next part, what of this one has not been read and is not lost; returns why."""
        again, end = [], 0
        for spec in self._announced:
            end += spec.nbytes
            if spec.nbytes and end > self._num_read:
                again.append(spec.key)
        self._left += [key for key in reversed(again) if key not in self.failures]
        error = next(self.failures[key] for key in again if key in self.failures)
        assert isinstance(error, ShardFetchError)
        error.may_go_on = True
        return error

    def _json_part(self, wanted: Sequence[Hashable], answer: HttpAnswer) -> Sequence[ShardSpec]:
        limit = self._settings.max_body_bytes
        text = answer.read_rest(limit + 1) if answer.unread_bytes <= limit else b""
        if not 0 < len(text) <= limit:
            raise WireError(f"{max(answer.unread_bytes, len(text)):,} bytes of JSON; expected 1 to {limit:,}")
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
        return self._failed(ShardAnswerError, "a tensor without data", [key]) if tensor.is_meta else tensor

    def _check_count(self, num_returned: int, wanted: Sequence[Hashable]) -> None:
        if num_returned != len(wanted):
            raise ShardAnswerError(
                f"Batch fetch from {self._requester.url} returned {num_returned} shards for {len(wanted)} requested "
                f"({named(wanted)})"
            )


def _missing_ids(text: str) -> frozenset[str]:
    try:
        missing = json.loads(text)["missing_shard_ids"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    return frozenset(key for key in missing if isinstance(key, str)) if isinstance(missing, list) else frozenset()
