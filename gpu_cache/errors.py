"""Errors of the cache. Each is built from numbers and names, formats its own message, and survives pickling."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

KeyT = TypeVar("KeyT")

_MAX_CAUSES = 8  # looked at behind an error; some chains are rings
_MAX_NAMED = 3  # shards in a message
LOCAL = "local"  # the reason of a failure that no node has to do with; counted as the cache's own


class GpuCacheError(Exception):
    """Base of every error that the cache raises on purpose."""


class CacheFullError(GpuCacheError, MemoryError):
    """There is no room: in the pool, even after evicting every entry that no reader holds, or on the device.

    Args:
        needed: Bytes asked for, after alignment.
        free: Bytes free in the pool, or on the device.
        capacity: The most bytes the pool may take (`CacheConfig.pool_bytes`).
        reserved: Bytes that the cache has taken from a device without room, in the pool and beside it; None: it is the
            pool that is full.
        setting: The setting that `capacity` is the value of.
        why: The obstacle and the remedy, if the pool knows a better one than clearing.
    """

    def __init__(
        self,
        needed: int,
        free: int,
        capacity: int,
        reserved: int | None = None,
        setting: str = "pool_bytes",
        why: str = "",
    ) -> None:
        super().__init__(needed, free, capacity, reserved, setting, why)
        self.needed, self.free, self.capacity, self.reserved = needed, free, capacity, reserved
        self.setting, self.why = setting, why

    def __str__(self) -> str:
        if self.reserved is None:
            why = self.why or f"raise {self.setting} (GPU_CACHE_{self.setting.upper()}) or clear shards"
            return f"need {self.needed:,} bytes, {self.free:,} free of {self.capacity:,}; {why}"
        return (
            f"need {self.needed:,} bytes, and the device is out of memory, with {self.free:,} free for its driver and "
            f"{self.reserved:,} taken by this cache, whose pool may have {self.capacity:,}; clear shards, or lower "
            "pool_bytes (GPU_CACHE_POOL_BYTES) or what else takes memory"
        )


class CacheClosedError(GpuCacheError):
    """The cache was closed, or belongs to the process that this one was forked from."""

    def __str__(self) -> str:
        return "the cache is closed, or belongs to the process that this one was forked from"


class FetchError(GpuCacheError, RuntimeError):
    """A shard did not arrive.

    Args:
        message: The failure in words, with shard, address and numbers.
        failures: Cause by shard key, for a call that asked for several shards. The others are cached.
    Attributes:
        reason: The word that it is counted under; "": that of its cause, see `failure_reason`.
        may_go_on: Whether a reader that raised it has more to deliver; see `ShardReader.read_into`.
    """

    reason = ""
    may_go_on = False

    def __init__(self, message: str, failures: Mapping[Hashable, BaseException] | None = None) -> None:
        super().__init__(message, failures)
        self.message = message
        self.failures: dict[Hashable, BaseException] = dict(failures or {})

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        """The message names some shards; there may be thousands."""
        return f"{type(self).__name__}({str(self)!r})"


class PromiseError(FetchError):
    """A shard has another dtype or shape than the caller expects. It stays cached, for callers that expect that.

    Args:
        key: The shard.
        promised: Dtype, shape and owner as expected.
        found: The shard's own.
    """

    reason = "answer"

    def __init__(self, key: Hashable, promised: tuple[Any, ...], found: tuple[Any, ...]) -> None:
        super().__init__(f"Failed to fetch shard {key!r}{broken_promise(promised, found)}")
        self.args = (key, promised, found)
        self.key, self.promised, self.found = key, promised, found


class FetchTimeoutError(FetchError):
    """A shard did not arrive in time. It may still be there."""

    reason = "timeout"


class TransferError(GpuCacheError):
    """Bytes could not be staged or copied to the device."""


class MutatedError(GpuCacheError):
    """A reader wrote into shards that were asked for; raised where `on_mutation` is "error".

    Args:
        keys: The shards.
    """

    def __init__(self, keys: Sequence[Hashable]) -> None:
        super().__init__(keys)
        self.keys = tuple(keys)

    def __str__(self) -> str:
        return (
            f"{len(self.keys)} cached shards were written to in place since they came: {names_of(self.keys)}; "
            "on_mutation (GPU_CACHE_ON_MUTATION) is 'error'. Clone a tensor before writing into it; clear the shards "
            "to fetch them again, or set on_mutation to 'refetch'"
        )


def failure_reason(error: BaseException) -> str:
    """The word that a failed fetch is counted under: that of the error, or of its cause."""
    one: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if one is None:
            break
        if reason := getattr(one, "reason", "") if isinstance(one, FetchError) else _reason_by_kind(one):
            return reason
        one = one.__cause__ or one.__context__
    return "other"


def _reason_by_kind(error: BaseException) -> str:
    kinds = {
        TimeoutError: "timeout", OSError: "connection", EOFError: "connection", ValueError: "answer",
        MemoryError: LOCAL, TransferError: LOCAL,
    }  # fmt: skip
    return next((reason for kind, reason in kinds.items() if isinstance(error, kind)), "")


def broken_promise(promised: tuple[Any, ...], found: tuple[Any, ...]) -> str:
    """The owner, the promised dtype and shape, and those that were found, for a message."""
    (dtype, shape, owner), (found_dtype, found_shape, _) = promised, found
    source = f" from {owner}" if owner else ""
    hint = "" if isinstance(shape, tuple) else "; a promised shape is a tuple"
    said = f"{source}: {dtype} of shape {list(shape)} is promised"
    return f"{said}, {found_dtype} of shape {list(found_shape)} was found{hint}"


def frameless(error: BaseException, handled: BaseException | None) -> BaseException:
    """Take the frames from an error and its causes: with their callers', they would keep tensors for as long as it.

    Never raises, whatever the error's class is like.

    Args:
        error: It was raised in this thread. If it is not of this package, it gets its traceback as a text.
        handled: The exception that this thread was handling before, and which is no cause of it.
    """
    if not isinstance(error, GpuCacheError):
        with contextlib.suppress(Exception):  # a class of users may refuse notes, and a frame its source text
            if (text := "".join(traceback.format_tb(error.__traceback__))) not in getattr(error, "__notes__", ()):
                error.add_note(text)
    left = [error]
    while left:
        one = left.pop()
        BaseException.__setattr__(one, "__traceback__", None)  # a frozen dataclass has another
        if one.__context__ is handled:
            BaseException.__setattr__(one, "__context__", None)
        causes = (one.__cause__, one.__context__)
        left += [cause for cause in causes if cause is not None and cause.__traceback__ is not None]
    return error


def combined(failures: dict[Hashable, BaseException], num_requested: int, why: str = "", node: str = "") -> Exception:
    """One error for a call: the first cause's words, then the shards that it lacks, and why it asked for them.

    Args:
        failures: The causes, by shard.
        num_requested: Shards that the call asked for.
        why: For the end of the message.
        node: The node of the first shard. An error that is not of this package names neither node nor shard.
    """
    cause = next(iter(failures.values()))
    if isinstance(cause, CacheClosedError):
        return cause
    text = str(cause)
    if not isinstance(cause, GpuCacheError):
        text = f"Failed to fetch shards{f' from {node}' if node else ''}: {named_error(cause)}"
    details = "; ".join(_details(failures, num_requested, text))
    error = FetchError(f"{text} [{details}{why}]" if details else f"{text}{why}", failures)
    error.__cause__ = cause
    return error


def named_error(error: BaseException) -> str:
    """The kind of an error, and its words, if it has any."""
    kind, text = type(error).__name__, str(error)
    return f"{kind}: {text}" if text else kind


def _details(failures: Mapping[Hashable, BaseException], num_requested: int, cause: str) -> list[str]:
    """Add to the first cause's words: how many shards failed, which ones, and the kinds of the other errors."""
    details = []
    is_all, is_named = len(failures) == num_requested, all(_names(cause, key) for key in failures)
    if not (is_all and is_named):
        details.append(f"{len(failures)} of {num_requested} shards failed: {names_of(failures)}")
    if not is_all:
        details.append("the others are cached")
    kinds = [type(error).__name__ for error in failures.values()]
    if other := sorted(set(kinds) - {kinds[0]}):
        details.append(f"also {', '.join(other)}, see .failures")
    return details


def _names(text: str, key: Hashable) -> bool:
    """Whether a message names a shard."""
    is_quoted = isinstance(key, str) and repr(key) in text
    return is_quoted or any(f"shard {key}{end}" in text for end in (" ", ":", ","))


def several(keys: Iterable[KeyT]) -> list[KeyT]:
    """List keys; a text is one key, and its letters are none.

    Raises:
        TypeError: A text, or bytes, is in the place of the keys.
    """
    if isinstance(keys, str | bytes):
        raise TypeError(f"{keys!r} is one key, where several are expected: put it into a list")
    return list(keys)


def names_of(keys: Iterable[Hashable]) -> str:
    """The first of some keys, for a message."""
    return listed([repr(key) for key in keys])


def listed(texts: Iterable[str]) -> str:
    """The first of some texts, for a message."""
    listed = list(texts)
    return ", ".join(listed[:_MAX_NAMED]) + (", ..." if len(listed) > _MAX_NAMED else "")
