"""One reader, drained into the index."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch

from gpu_cache.errors import CacheClosedError, FetchError
from gpu_cache.index.entry import Entry, Promise, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Copy
from gpu_cache.pool.completion import Completion
from gpu_cache.process import OwnThread
from gpu_cache.ranges import FETCH, profiled
from gpu_cache.source import ShardReader, ShardSpec
from gpu_cache.transfer.inflight import Turn
from gpu_cache.transfer.tensor_reader import TensorReader
from gpu_cache.transfer.transfer import Transfer


class MeteredReader:
    """Another `ShardReader`, and how long each of its parts took.

    Args:
        inner: Does the work.
        on_answer: Told the node, and the seconds from the request for a part to its last byte; not of one that failed.
    """

    def __init__(
        self,
        inner: ShardReader,
        on_answer: Callable[[str, float], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner, self._on_answer, self._now = inner, on_answer, now
        self._began: float | None = None  # the part under way; None between two, and after a failure
        self._ended = 0.0  # its latest read

    @property
    def node(self) -> str:
        return self._inner.node

    @property
    def keys(self) -> Sequence[Hashable]:
        return self._inner.keys

    @property
    def failures(self) -> Mapping[Hashable, Exception]:
        return self._inner.failures

    @property
    def num_received(self) -> int | None:
        return getattr(self._inner, "num_received", None)

    def next_specs(self) -> Sequence[ShardSpec] | None:
        """Pass it on; the part before it is complete."""
        self._tell()
        began = self._now()
        with profiled(FETCH):
            specs = self._inner.next_specs()
        if specs is not None:
            self._began, self._ended = began, self._now()
        return specs

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Pass it on."""
        began, self._began = self._began, None
        with profiled(FETCH):
            self._inner.read_into(buffers)
        self._began, self._ended = began, self._now()

    def cancel(self) -> None:
        """Pass it on."""
        self._inner.cancel()

    def close(self) -> None:
        """Pass it on; the last part is complete, unless it failed."""
        self._tell()
        self._inner.close()

    def _tell(self) -> None:
        began, self._began = self._began, None
        if began is not None:
            self._on_answer(self.node, self._ended - began)


logger = logging.getLogger(__name__)


class ReaderTask:
    """Drains one reader into the index. It alone publishes or aborts the entries it was given.

    Thread-safety: `cancel` from any thread; `run` once.
    """

    def __init__(self, reader: ShardReader, entries: Mapping[Hashable, Entry], index: ShardIndex) -> None:
        self.reader, self.entries = reader, entries
        self.done: Future[None] = Future()  # when the reader is closed and every entry is settled
        self._index = index
        self._announced: set[Hashable] = set()
        self._turn = Turn(reader.node, partial(getattr, reader, "num_received", None))
        self._transfer: Transfer | None = None  # once it runs
        index.came_from(entries.values(), reader.node)
        self._owner = threading.Lock()  # taken for good by whoever ends the task
        self._thread: OwnThread | None = None  # once it runs in one of its own
        self._drained_by = 0  # which thread

    def start(self, transfer: Transfer, deadline: float, live: set[ReaderTask], *, may_overflow: bool = True) -> None:
        """Run in a thread of its own; `live` has the task until that thread is done with torch."""
        live.add(self)
        self._thread = OwnThread(partial(self._run_noted, transfer, deadline, live, may_overflow), "gpu-cache-fetch")
        self._thread.start()

    def run(self, transfer: Transfer, deadline: float, *, may_overflow: bool = True) -> None:
        """Drain to the end. Never raises: each entry not delivered gets the reason."""
        if not self.take_over():
            return  # given up before it began
        self._transfer, self._drained_by = transfer, threading.get_ident()
        error = self._drain(transfer, deadline, may_overflow)
        while isinstance(error, FetchError) and error.may_go_on:
            self._announced = {key for key in self._announced if self.entries[key].copy is not None}
            error = self._drain(transfer, deadline, may_overflow)
        self.end(error)

    def take_over(self) -> bool:
        """Whether the caller is the first, and is to end it."""
        return self._owner.acquire(blocking=False)

    def wait(self, deadline: float) -> None:
        """Wait until its thread has ended, or has no more to do with it; not if that thread is the caller."""
        if self._drained_by != threading.get_ident():
            concurrent.futures.wait([self.done], max(0.0, deadline - time.monotonic()))
        if self._thread is not None:
            self._thread.wait(deadline)

    def end(self, error: BaseException | None) -> None:
        """Close the reader and settle what it has not delivered."""
        try:
            self.reader.close()
        except BaseException:  # top of a thread: whatever it is, the waiters must be woken
            logger.exception("closing the connection to %s failed", self.reader.node)
        try:
            self._abort_rest(error)
        except BaseException as caught:  # the reader's account of its failures
            self._index.abort(self.entries.values(), caught)
        self.entries = {}  # who waits for `done` may count on no block being held from here
        self.done.set_result(None)

    def cancel(self, error: BaseException) -> None:
        """Give up on what has not arrived; the draining thread gives its range back when its read has returned."""
        self._index.abort(self.entries.values(), error)
        self._turn.is_given_up = True  # looked at after _transfer was set: from then on it is woken
        if self._transfer is not None:
            self._transfer.inflight.wake()
        try:
            self.reader.cancel()
        except Exception:
            logger.exception("cutting the connection to %s failed", self.reader.node)

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Refuse shards that were not asked for, or that come twice, and any once the cache is closed.

        Those of another dtype or shape than promised fail alone; their bytes are read, and go to no reader.
        """
        if self._index.is_closed:
            raise CacheClosedError
        keys = {spec.key for spec in specs}
        if len(keys) != len(specs) or not keys <= self.entries.keys() or not keys.isdisjoint(self._announced):
            self._refuse_unwanted(specs)
        self._announced |= keys
        for spec in specs:
            promise = self.entries[spec.key].promise
            if promise is not None and (spec.dtype is not promise[0] or spec.shape != promise[1]):
                self._refuse(spec, promise)

    def _refuse(self, spec: ShardSpec, promise: Promise) -> None:
        error = self._index.broken(spec.key, promise, (spec.dtype, spec.shape, promise[2]))
        self._index.abort([self.entries[spec.key]], error)

    def _refuse_unwanted(self, specs: Sequence[ShardSpec]) -> None:
        for spec in specs:
            if spec.key not in self.entries or spec.key in self._announced:
                how = "twice" if spec.key in self._announced else "without being asked for it"
                raise FetchError(f"Failed to fetch shards from {self.reader.node}: it sent shard {spec.key!r} {how}")
            self._announced.add(spec.key)

    def land(self, landings: list[Copy], completion: Completion | None, *, is_overflow: bool) -> None:
        """Index what arrived; hand it only to the waiting if the pool had no room for it."""
        pairs = [(self.entries[landing.key], landing) for landing in landings]
        take = self._index.deliver if is_overflow else self._index.publish
        take(pairs, self.reader.node, completion)

    def _run_noted(self, transfer: Transfer, deadline: float, live: set[ReaderTask], may_overflow: bool) -> None:
        node, is_fetch = self.reader.node, not any(entry.flight.is_copy for entry in self.entries.values())
        if is_fetch:
            self._index.note_fetch(node, begins=True)
        try:
            self.run(transfer, deadline, may_overflow=may_overflow)
        finally:
            if is_fetch:
                self._index.note_fetch(node, begins=False)
            if self._index.is_closed:  # the reaper may have found nothing to wait for, and ended
                _finish(transfer)
            live.discard(self)  # last: from here on `close` waits for the thread no more

    def _drain(self, transfer: Transfer, deadline: float, may_overflow: bool) -> BaseException | None:
        try:
            transfer.drain(self.reader, self, deadline, may_overflow=may_overflow, turn=self._turn)
        except BaseException as caught:  # top of a thread: the waiters re-raise it
            traceback.clear_frames(caught.__traceback__)  # whoever keeps the error must not keep blocks
            return caught
        return None

    def _abort_rest(self, error: BaseException | None) -> None:
        node, failures = self.reader.node, self.reader.failures
        for key, entry in self.entries.items():
            if not entry.is_settled:
                cause = failures.get(key) or error or FetchError(f"Failed to fetch shard {key!r}: {node} left it out")
                self._index.abort([entry], cause)


def _finish(transfer: Transfer) -> None:
    try:
        transfer.finish()
    except Exception:  # top of a thread
        logger.exception("giving back the memory of a closed cache failed")


def put_one(
    entry: Entry,
    tensor: torch.Tensor,
    node: str,
    index: ShardIndex,
    transfer: Transfer,
    deadline: float,
    live: set[ReaderTask],
) -> bool:
    """Copy a host tensor into the pool for an entry that was reserved; whether it is cached now.

    Raises:
        Exception: Why it could not be; nothing was changed.
    """
    task = ReaderTask(TensorReader(node, [entry.key], lambda: [tensor]), {entry.key: entry}, index)
    live.add(task)
    task.run(transfer, deadline, may_overflow=False)
    live.discard(task)
    index.release([entry])
    if entry.error is None:
        return entry.state is State.READY
    try:
        raise entry.error
    finally:
        del entry, task  # else error and frame would keep each other, and the caller's tensors, alive
