"""The protocol of a backend, and how any backend becomes a source of readers for the cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from gpu_cache import Promise, ShardReader, ShardSource, TensorReader
from gpu_cache.process import OwnThread
from gpu_cache.rpc.shard import (
    ShardAnswerError,
    ShardTimeoutError,
    ShardUnreachableError,
    TensorShardInfo,
    answer_error,
)
from gpu_cache.transfer.tensor_reader import is_list

ResultT = TypeVar("ResultT")


class BoundedCall(Generic[ResultT]):
    """One call on a thread of its own, waited for until a deadline.

    Nothing can end a call that hangs: its thread stays until the call returns, and then drops the result. At exit the
    process waits for it a moment, and then ends without it.

    Args:
        work: The function to call.
        who: The party that it asks, for messages.
        timeout_s: Longest wait, in seconds from now on.
    Thread-safety: `result` once; `cancel` from any thread.
    """

    def __init__(self, work: Callable[[], ResultT], who: str, timeout_s: float) -> None:
        self._work, self._who, self._timeout_s = work, who, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._outcome: Future[ResultT] = Future()

    def result(self) -> ResultT:
        """Make the call, and return what it returns.

        Raises:
            ShardTimeoutError: It had not returned in time.
            ShardUnreachableError: It was given up.
            BaseException: Any exception that it raised.
        """
        OwnThread(self._run, "areal-call").start()
        concurrent.futures.wait([self._outcome], max(0.0, self._deadline - time.monotonic()))
        self._give_up(
            ShardTimeoutError(f"Failed to fetch shards from {self._who}: no answer in {self._timeout_s:.1f} s")
        )
        return self._outcome.result()

    def cancel(self) -> None:
        """End the wait. Idempotent."""
        self._give_up(ShardUnreachableError(f"Failed to fetch shards from {self._who}: the fetch was given up"))

    def _give_up(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):  # it has returned
            self._outcome.set_exception(error)

    def _run(self) -> None:
        try:
            result = self._work()
        except BaseException as error:  # top of a thread
            self._give_up(error)
            return
        with contextlib.suppress(InvalidStateError):  # too late
            self._outcome.set_result(result)


@runtime_checkable
class RTensorBackend(Protocol):
    """Upstream's backend interface; a user's own class with these three methods works with the cache."""

    def fetch(self, shards: list[TensorShardInfo]) -> list[torch.Tensor]:
        """The tensors of shards, in order."""

    def store(self, tensor: torch.Tensor) -> Any:
        """Keep a tensor and return the id of its shard."""

    async def delete(self, node_addr: str, shard_ids: list[Any]) -> Any:
        """Forget shards at their owner."""


@runtime_checkable
class StreamingBackend(Protocol):
    """A backend that can deliver bytes into buffers of the cache's choosing."""

    def source(self, shards: Mapping[Hashable, TensorShardInfo], expected: Mapping[Hashable, Promise]) -> ShardSource:
        """A source for these shards, of which it opens some or all.

        Args:
            shards: The place of each.
            expected: The promise of each handle, where known.
        """


# Takes keys and how long that may take, in seconds; returns a tensor or an exception for each, in order.
Load = Callable[[Sequence[Hashable], float], Sequence[torch.Tensor | Exception]]


class CallSource:
    """A source over one blocking call that returns tensors.

    Args:
        node: Where the tensors come from, for messages and `clear_node`.
        load: The call.
        promises: Promised dtypes and shapes; the reader refuses other shards before it copies their bytes.
        may_hang: Whether the call may last longer than it may take. Then a thread of its own makes it.
    """

    def __init__(self, node: str, load: Load, promises: Mapping[Hashable, Promise], *, may_hang: bool = True) -> None:
        self._node, self._load, self._promises, self._may_hang = node, load, promises, may_hang

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        """One reader; its call is given up after `timeout_s`."""
        load = partial(self._loaded, keys, timeout_s)
        if not self._may_hang:
            return [TensorReader(self._node, keys, load)]
        call = BoundedCall(load, self._node, timeout_s)
        return [TensorReader(self._node, keys, call.result, call.cancel)]

    def _loaded(self, keys: Sequence[Hashable], timeout_s: float) -> Sequence[torch.Tensor | Exception]:
        loaded = self._load(keys, timeout_s)
        if not is_list(loaded) or len(loaded) != len(keys):
            return loaded  # the reader says so
        return [self._as_promised(key, one) for key, one in zip(keys, loaded, strict=True)]

    def _as_promised(self, key: Hashable, one: object) -> torch.Tensor | Exception:
        """The shard in host memory, where the cache takes it from; or why it is no use. The others are."""
        if isinstance(one, Exception):
            return one
        if not isinstance(one, torch.Tensor):
            kind = type(one).__name__
            return ShardAnswerError(f"Failed to fetch shard {key} from {self._node}: a Tensor is expected, not {kind}")
        promise = self._promises.get(key)
        if promise is not None and (one.dtype, one.shape) != promise[:2]:
            return answer_error(key, promise, (one.dtype, one.shape, promise[2]))
        return one if one.is_cpu else one.detach().cpu()
