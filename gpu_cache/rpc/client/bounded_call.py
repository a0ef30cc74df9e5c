"""A blocking call that may never return, and somebody who does not wait for it for ever."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Generic, TypeVar

from gpu_cache.process import OwnThread
from gpu_cache.rpc.shard import ShardTimeoutError, ShardUnreachableError

ResultT = TypeVar("ResultT")


class BoundedCall(Generic[ResultT]):
    """One call on a thread of its own, waited for until a deadline.

    Nothing can end a call of somebody else's code that hangs: its thread stays until it returns, and what it returns
    then is dropped there. At exit the process waits for it a moment, and then ends without it.

    Args:
        work: What to call.
        who: Whom it asks, for messages.
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
            BaseException: Whatever it raised.
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
