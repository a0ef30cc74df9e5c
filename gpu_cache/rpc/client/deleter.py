"""Deleting shards at one owner, where an id that it refuses keeps none of the others."""

from __future__ import annotations

import json
from typing import Any

from gpu_cache.rpc.client.connection import AddressError, HttpAnswer
from gpu_cache.rpc.client.requester import Requester, kind_of_status, named, shortened
from gpu_cache.rpc.shard import ShardAnswerError, ShardClearError, ShardFetchError, ShardUnreachableError

# Refused for what was asked, so that asking for less may help; others are refused for who asks, or where.
_STATUS_OF_CONTENT = {400, 413, 422, 500}
# Requests of one clear. One bad id among 4,096 takes 13. The limit ends it for an owner that refuses everything.
_MAX_REFUSALS = 64


class RefusedError(ValueError):
    """The owner refused a request to delete.

    Attributes:
        may_be_one_id: Whether asking for fewer may help.
        kind: The class of the error that a caller gets.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind_of_status(status)
        self.may_be_one_id = status in _STATUS_OF_CONTENT


class HttpDeleter:
    """One clear at one owner, in as few requests as it takes. One thread.

    Args:
        requester: Asks the owner's route for clears; its deadline is that of the whole clear.
    """

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self._statistics: dict[str, Any] = {}
        self._kept: list[Any] = []
        self._error: Exception | None = None  # the first one
        self._num_refusals = 0

    def delete(self, shard_ids: list[Any]) -> dict[str, Any]:
        """Delete all that can be, and return the owner's statistics.

        Raises:
            ShardClearError: Some could not; says which. Its cause tells by its type what the first failure was.
        """
        sayable: list[Any] = []
        for shard_id in shard_ids:
            (sayable if _is_json(shard_id) else self._kept).append(shard_id)
        if self._kept:
            self._error = TypeError(f"JSON cannot express {_kinds(self._kept)}")
        groups = [sayable] if sayable or not self._kept else []
        while groups:
            self._delete_next(groups)
        error, self._error = self._error, None  # its traceback has us: no cycle
        if error is not None:
            raise self._combined(error, len(shard_ids)) from _typed(error)
        return self._statistics

    def _delete_next(self, groups: list[list[Any]]) -> None:
        """Ask for the last of the groups; one that is refused leaves its halves in its place."""
        group = groups.pop()
        try:
            self._note(self._requester.send(group, self._statistics_of))
        except RefusedError as error:
            self._num_refusals += 1
            middle = len(group) // 2
            if middle and error.may_be_one_id and self._num_refusals < _MAX_REFUSALS:
                groups += [group[middle:], group[:middle]]
            else:
                self._keep(group, error)
        except (ShardFetchError, ValueError, RecursionError) as error:  # unreachable, or no owner: so for the rest
            self._keep([shard_id for left in (group, *reversed(groups)) for shard_id in left], error)
            groups.clear()

    def _note(self, statistics: dict[str, Any]) -> None:
        self._requester.num_faults = 0
        before, count = self._statistics.get("cleared_count"), statistics.get("cleared_count")
        self._statistics = dict(statistics)
        if isinstance(before, int) and isinstance(count, int):
            self._statistics["cleared_count"] = before + count

    def _statistics_of(self, answer: HttpAnswer) -> dict[str, Any]:
        """Read the owner's statistics after a clear."""
        text = self._requester.text_of(answer)
        if answer.status != 200:
            raise RefusedError(answer.status, self._requester.refusal_of(answer.status, text))
        statistics = json.loads(text)
        if not isinstance(statistics, dict):
            raise ValueError(f"{answer.status} body={shortened(text)}")
        return statistics

    def _keep(self, group: list[Any], error: Exception) -> None:
        self._kept += group
        if self._error is None or isinstance(error, ShardFetchError):
            self._error = error

    def _combined(self, error: Exception, num_asked: int) -> ShardClearError:
        kept, what = self._kept, "shards"
        if len(kept) < num_asked:
            what = f"{len(kept):,} of {num_asked:,} shards"
        elif isinstance(error, ShardFetchError):
            return ShardClearError(str(error), kept)  # it has said all there is
        text = f"Failed to clear {what} at {self._requester.url}: {error} ({named(kept)})"
        return ShardClearError(text, kept, self._statistics)


def _typed(error: Exception) -> Exception:
    """The error in the words of a fetch: refused, unreachable, too slow, no use."""
    if isinstance(error, ShardFetchError | TypeError):
        return error
    kind: type[ShardFetchError] = ShardUnreachableError if isinstance(error, AddressError) else ShardAnswerError
    typed = (error.kind if isinstance(error, RefusedError) else kind)(str(error))
    typed.__cause__ = error
    return typed


def _is_json(shard_id: Any) -> bool:
    """Whether an owner can be told of it."""
    if type(shard_id) is str:
        return True
    try:
        json.dumps(shard_id)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _kinds(shard_ids: list[Any]) -> str:
    return ", ".join(sorted({type(shard_id).__name__ for shard_id in shard_ids}))
