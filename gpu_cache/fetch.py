"""Fetches under way: one thread for each reader, and what one call waits for."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from gpu_cache.engine import Engine
from gpu_cache.entry import Claim, Entry, Landing
from gpu_cache.errors import CacheClosedError, FetchError, TransferError
from gpu_cache.index import ShardIndex
from gpu_cache.lease import aliases_of
from gpu_cache.source import ShardReader, ShardSource, ShardSpec
from gpu_cache.transfer import Completion, Transfer

logger = logging.getLogger(__name__)

_NAMED_SHARDS = 3  # how many failed shards a message names


class ReaderTask:
    """Drains one reader into the index. It alone publishes or aborts the entries it was given.

    Thread-safety: `cancel` from any thread; `run` once.
    """

    def __init__(self, reader: ShardReader, entries: Mapping[Hashable, Entry], index: ShardIndex) -> None:
        self.reader, self.entries = reader, entries
        self.done: Future[None] = Future()  # when the reader is closed and every entry is settled
        self._index = index
        self._announced: set[Hashable] = set()
        index.came_from(entries.values(), reader.node)
        self._owner = threading.Lock()  # taken for good by whoever ends the task

    def run(self, transfer: Transfer, deadline: float, *, may_overflow: bool = True) -> None:
        """Drain to the end. Never raises: each entry not delivered gets the reason."""
        if not self.take_over():
            return  # given up before it began
        error: BaseException | None = None
        try:
            transfer.drain(self.reader, self, deadline, may_overflow=may_overflow)
        except BaseException as caught:  # top of a thread: the waiters re-raise it
            traceback.clear_frames(caught.__traceback__)  # whoever keeps the error must not keep blocks
            error = caught
        self.end(error)

    def take_over(self) -> bool:
        """Whether the caller is the first, and is to end it."""
        return self._owner.acquire(blocking=False)

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
        try:
            self.reader.cancel()
        except Exception:
            logger.exception("cutting the connection to %s failed", self.reader.node)

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Refuse shards that were not asked for, or that come twice."""
        keys = {spec.key for spec in specs}
        if len(keys) == len(specs) and keys <= self.entries.keys() and keys.isdisjoint(self._announced):
            self._announced |= keys
            return
        for spec in specs:
            if spec.key not in self.entries or spec.key in self._announced:
                how = "twice" if spec.key in self._announced else "without being asked for it"
                raise FetchError(f"Failed to fetch shards from {self.reader.node}: it sent shard {spec.key!r} {how}")
            self._announced.add(spec.key)

    def land(self, landings: list[Landing], completion: Completion | None, *, is_overflow: bool) -> None:
        """Index what arrived; hand it only to the waiting if the pool had no room for it."""
        pairs = [(self.entries[landing.key], landing) for landing in landings]
        take = self._index.deliver if is_overflow else self._index.publish
        take(pairs, self.reader.node, completion)

    def _abort_rest(self, error: BaseException | None) -> None:
        node, failures = self.reader.node, self.reader.failures
        for key, entry in self.entries.items():
            if not entry.is_settled:
                cause = failures.get(key) or error or FetchError(f"Failed to fetch shard {key!r}: {node} left it out")
                self._index.abort([entry], cause)


class Fetch:
    """What one call asked for: hits in hand, shards it claimed and fetches, shards it joined.

    Thread-safety: used by the call's thread; `cancel` from any.
    """

    def __init__(self, index: ShardIndex, timeout_s: float, *, may_overflow: bool = True) -> None:
        self.claim = Claim()
        self.deadline = time.monotonic() + timeout_s
        self.tasks: list[ReaderTask] = []
        self._index, self._timeout_s, self._may_overflow = index, timeout_s, may_overflow

    @property
    def has_lost_joins(self) -> bool:
        """Whether another call that this one relied on failed: asking anew may help."""
        return any(entry.error is not None for entry in self.claim.joined.values())

    def begin(
        self,
        open_engine: Callable[[], Engine],
        is_current: Callable[[Engine], bool],
        keys: Sequence[Hashable],
        source: ShardSource,
        live: set[ReaderTask],
    ) -> Engine:
        """Look keys up and start to fetch what is missing; whatever interrupts this, no key stays claimed.

        Raises:
            TransferError: During CUDA graph capture, where nothing can be fetched.
        """
        while True:
            engine = open_engine()
            if engine.device.is_capturing() and (missing := self._index.missing(keys)):
                raise TransferError(f"cannot fetch {missing[0]!r} ({len(missing)} in all) during CUDA graph capture")
            engine.drain()
            try:
                wanted = dict.fromkeys(keys)
                for held in self.claim.hits:
                    del wanted[held]
                self._index.claim(wanted, self.claim, self.deadline)
                if is_current(engine):
                    self.start(source, engine.transfer, live)
                    if self.claim.claimed and self._index.is_closed:
                        self.cancel(CacheClosedError())
                    return engine
                self.cancel(FetchError("Failed to fetch shards: another device was chosen meanwhile"))
            except BaseException as error:
                self.cancel(error)
                raise
            self.finish()

    def start(self, source: ShardSource, transfer: Transfer, live: set[ReaderTask]) -> None:
        """Open readers for the claimed shards and drain each in a thread of its own; `live` has those under way."""
        left = dict(self.claim.claimed)
        try:
            for reader in source.open(list(left), self._timeout_s) if left else ():
                if foreign := [key for key in reader.keys if key not in left]:
                    raise FetchError(
                        f"Failed to fetch shards: {reader.node} offers {_names(foreign)} unasked, or twice"
                    )
                self.tasks.append(ReaderTask(reader, {key: left.pop(key) for key in reader.keys}, self._index))
            for task in self.tasks:
                live.add(task)
                threading.Thread(
                    target=self._drain, args=(task, transfer, live), name="gpu-cache-fetch", daemon=True
                ).start()
        except BaseException as error:
            self.cancel(error)
            for task in self.tasks:
                if task.take_over():
                    live.discard(task)
                    task.end(error)
            raise
        self._index.abort(left.values(), FetchError(f"Failed to fetch shards {_names(left)}: no source offers them"))

    def wait(self) -> None:
        """Block until every shard is here.

        Raises:
            FetchError: Some are not, for the reasons in `failures`; the others are cached.
            CacheClosedError: The cache was closed meanwhile.
        """
        pending = self._pending()
        if pending and concurrent.futures.wait(pending, max(0.0, self.deadline - time.monotonic())).not_done:
            late = FetchError(f"Failed to fetch shards: not here within {self._timeout_s:.1f} s")
            self.cancel(late)
            now = time.monotonic()  # a claim that nobody waits for, as of a prefetch, is given up by who joined it
            self._index.abort([entry for entry in self.claim.joined.values() if entry.deadline <= now], late)
        if failures := self._failures():
            raise _combined(failures, len(failures) + self._num_arrived())

    def hand_out(self) -> dict[Hashable, torch.Tensor]:
        """An alias of every shard, by key; after `wait`."""
        arrived = {entry.key: entry.base for entry in self._entries() if entry.base is not None}
        return {**self.claim.hits, **dict(zip(arrived, aliases_of(arrived.values()), strict=True))}

    def completions(self) -> Iterable[Completion]:
        """Of the copies that the shards depend on, each once."""
        return self.claim.completions | dict.fromkeys(
            entry.completion for entry in self._entries() if entry.completion is not None
        )

    def keep_arrived(self) -> None:
        """Let go of what failed; the next `begin` looks only that up. After `wait`."""
        kept = Claim(self.hand_out(), dict.fromkeys(self.completions()), num_removals=self.claim.num_removals)
        self.finish()
        self.claim = kept

    def finish(self) -> int:
        """Let go of everything, so that nobody who keeps the fetch or an error of it keeps blocks.

        Returns:
            How many shards were not cached when it began.
        """
        claim, self.claim, self.tasks = self.claim, Claim(), []
        self._index.release(claim.claimed.values())
        return len(claim.claimed) + len(claim.joined)

    def when_done(self, then: Callable[[BaseException | None], None]) -> None:
        """Call `then` once, with what went wrong if anything, when every shard is here or given up."""
        waiting = self._pending()
        left = list(range(len(waiting)))

        def all_done() -> None:
            failures = self._failures()
            then(_combined(failures, len(failures) + self._num_arrived()) if failures else None)

        def one_done(_: object) -> None:
            if left.pop() == 0:  # one step: just one of several at once is the last
                all_done()

        if not waiting:
            all_done()
        for future in waiting:
            future.add_done_callback(one_done)

    def cancel(self, error: BaseException) -> None:
        """Give up on every claimed shard that has not arrived."""
        for task in self.tasks:
            task.cancel(error)
        self._index.abort(self.claim.claimed.values(), error)

    def _drain(self, task: ReaderTask, transfer: Transfer, live: set[ReaderTask]) -> None:
        self._index.fetch_started()
        try:
            task.run(transfer, self.deadline, may_overflow=self._may_overflow)
        finally:
            self._index.fetch_stopped()
            live.discard(task)

    def _pending(self) -> list[Future[Any]]:
        flights = [entry.flight for entry in self.claim.joined.values() if entry.flight is not None]
        return [*flights, *(task.done for task in self.tasks)]

    def _entries(self) -> Iterable[Entry]:
        return (*self.claim.claimed.values(), *self.claim.joined.values())

    def _num_arrived(self) -> int:
        return len(self.claim.hits) + sum(entry.base is not None for entry in self._entries())

    def _failures(self) -> dict[Hashable, BaseException]:
        late = FetchError(f"Failed to fetch shards: not here within {self._timeout_s:.1f} s")
        return {entry.key: entry.error or late for entry in self._entries() if entry.base is None}


def _combined(failures: dict[Hashable, BaseException], num_requested: int) -> Exception:
    """One error for a call: the first cause's words, then which shards it lacks."""
    cause = next(iter(failures.values()))
    if isinstance(cause, CacheClosedError):
        return cause
    kinds = {type(error).__name__ for error in failures.values()} - {type(cause).__name__}
    other = f"; also {', '.join(sorted(kinds))}, see .failures" if kinds else ""
    error = FetchError(
        f"{cause} [{len(failures)} of {num_requested} shards failed: {_names(failures)}; the others are cached{other}]",
        failures,
    )
    error.__cause__ = cause
    return error


def _names(keys: Iterable[Hashable]) -> str:
    listed = [repr(key) for key in keys]
    return ", ".join(listed[:_NAMED_SHARDS]) + (", ..." if len(listed) > _NAMED_SHARDS else "")
