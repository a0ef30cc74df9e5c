"""One call: shards in hand, on their way, and to be fetched. A thread drains each reader; the caller's may, too."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from gpu_cache.config import Prefer
from gpu_cache.device.modes import WAIT, profiled
from gpu_cache.errors import (
    CacheClosedError,
    FetchError,
    FetchTimeoutError,
    TransferError,
    combined,
    failure_reason,
    frameless,
    listed,
    named_error,
    names_of,
)
from gpu_cache.index.entry import Claim, Entry, Holding, Promise, State
from gpu_cache.index.mutation import REMEDY
from gpu_cache.pool.block import Copy
from gpu_cache.pool.completion import Completion
from gpu_cache.process import OwnThread, no_collections, no_interrupts, note_drainer
from gpu_cache.source import ShardReader, ShardSource, ShardSpec, opened
from gpu_cache.transfer.engine import Engine, LazyEngine
from gpu_cache.transfer.host_tier import HostTier, ResidentReader
from gpu_cache.transfer.inflight import Turn
from gpu_cache.transfer.tensor_reader import TensorReader

logger = logging.getLogger(__name__)


class ReaderTask:
    """Drains one reader into the index. It alone publishes the entries that it was given.

    Args:
        reader: Delivers the shards.
        entries: The entries of its shards, by key.
        level: The level that they go to.
        deadline: By `time.monotonic()`; see `Transfer.drain`.
        live: Holds the task until the draining thread is done with torch.
        may_overflow: Whether shards that find no room may be placed outside the pool.
    Thread-safety: `cancel` from any thread; `run` once.
    """

    def __init__(
        self,
        reader: ShardReader,
        entries: Mapping[Hashable, Entry],
        level: Engine | HostTier,
        deadline: float,
        live: set[ReaderTask],
        *,
        may_overflow: bool = True,
    ) -> None:
        self.reader, self.entries = reader, entries
        self.node = reader.node  # asked once: a reader may ask its connection, which it closes
        self.done: Future[None] = Future()  # when the reader is closed and every entry is settled
        self._index, self._level, self._live = level.index, level, live
        self._is_fetch = any(entry.is_fetch for entry in entries.values())
        self._deadline, self._may_overflow = deadline, may_overflow
        self._announced: set[Hashable] = set()
        self._began: float | None = None  # when the answer under way was asked for; None: it is not timed
        self._ended = 0.0  # when its latest bytes came
        self._turn = Turn(self.node, partial(getattr, reader, "num_received", None))
        self._index.came_from(entries.values(), self.node)
        self._owner = threading.Lock()  # taken for good by the thread that ends the task
        self._thread: OwnThread | None = None  # once it runs in one of its own
        self._drained_by = 0  # the thread's id
        live.add(self)

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = OwnThread(self.run, "gpu-cache-fetch")
        self._thread.start()

    def run(self) -> None:
        """Drain to the end. Never raises: each entry that was not delivered gets the reason."""
        if not self.take_over():
            return  # given up before it began
        self._drained_by = threading.get_ident()
        if self._is_fetch:
            self._index.note_fetch(self.node, begins=True)
        try:
            error = self._drain()
            while isinstance(error, FetchError) and error.may_go_on and time.monotonic() < self._deadline:
                self._announced = {key for key in self._announced if self.entries[key].copy is not None}
                error = self._drain()
            self.end(error)
        finally:
            if self._is_fetch:
                self._index.note_fetch(self.node, begins=False)
            self._live.discard(self)  # last: from here on `close` waits for the thread no more

    def take_over(self) -> bool:
        """Whether the caller is the first to take it over, and so must end it."""
        return self._owner.acquire(blocking=False)

    def wait(self, deadline: float) -> None:
        """Wait until its thread has ended or is done with it. Does not wait if the caller is that thread."""
        if self._drained_by != threading.get_ident():
            _all_done([self.done], deadline)
        if self._thread is not None:
            self._thread.wait(deadline)

    def end(self, error: BaseException | None) -> None:
        """Close the reader, and settle the entries that it did not deliver."""
        try:
            self.reader.close()
        except BaseException:  # top of a thread: whatever it is, the waiters must be woken
            logger.exception("closing the connection to %s failed", self.node)
        try:
            self._abort_rest(error)
        except BaseException as caught:  # the reader's account of its failures
            self._index.abort(self.entries.values(), caught)
        self.entries = {}  # a caller that waits for `done` may count on it: from here no block is held
        if self._index.is_closed:  # the reaper may have found nothing to wait for, and ended
            _finish(self._level)
        # At exit `close` waits for this: a thread that Python ends amid torch's code would abort the process.
        self.done.set_result(None)

    def cancel(self, error: BaseException) -> None:
        """Give up on missing shards. The draining thread gives its range back once its read has returned."""
        self._index.abort(self.entries.values(), error)
        self._turn.is_given_up = True
        self._level.transfer.inflight.wake()
        try:
            self.reader.cancel()
        except Exception:
            logger.exception("cutting the connection to %s failed", self.node)

    def expect(self, specs: Sequence[ShardSpec]) -> None:
        """Refuse shards that were not asked for, or that come twice, and all of them once the cache is closed.

        Shards of another dtype or shape than promised fail alone; their bytes are read, and go to no caller.
        """
        if self._index.is_closed:
            raise CacheClosedError
        self._note_answer()
        self._began, self._ended = self._ended, time.monotonic()
        entries, announced = self.entries, self._announced
        for spec in specs:
            entry = entries.get(spec.key)
            if entry is None or spec.key in announced:
                how = "without being asked for it" if entry is None else "twice"
                raise FetchError(f"Failed to fetch shards from {self.node}: it sent shard {spec.key!r} {how}")
            announced.add(spec.key)
            promise = entry.promise
            if promise is not None and (spec.dtype is not promise[0] or spec.shape != promise[1]):
                error = self._index.broken(spec.key, promise, (spec.dtype, spec.shape, promise[2]))
                self._index.abort([entry], error)

    def land(self, landings: list[Copy], completion: Completion | None, *, is_overflow: bool) -> None:
        """Index arrived shards; or hand them to waiting calls alone, if the pool had no room."""
        self._ended = time.monotonic()
        entries = self.entries
        # Without thousands of tuples, which would set off a collection here.
        pairs = zip([entries[landing.key] for landing in landings], landings, strict=True)
        take = self._index.deliver if is_overflow else self._index.publish
        take(pairs, self.node, completion)

    def _drain(self) -> BaseException | None:
        self._began, self._ended = None, time.monotonic()
        handled = sys.exception()
        try:
            self._level.transfer.drain(
                self.reader, self, self._deadline, may_overflow=self._may_overflow, turn=self._turn
            )
            self._note_answer()
        except BaseException as caught:  # top of a thread: the waiters re-raise it
            return frameless(caught, handled)
        return None

    def _abort_rest(self, error: BaseException | None) -> None:
        """Settle what was not delivered. Not in `end`, whose frame would keep the last entry beyond `done`."""
        node, failures = self.node, self.reader.failures
        for key, entry in self.entries.items():
            if not entry.is_settled:
                cause: Any = (
                    failures.get(key) or error or FetchError(f"Failed to fetch shard {key!r}: {node} left it out")
                )
                if not isinstance(cause, BaseException):  # a reader's own words
                    cause = FetchError(f"Failed to fetch shard {key!r} from {node}: {cause}")
                self._index.abort([entry], cause)

    def _note_answer(self) -> None:
        """Count an answer that is complete, with the seconds from its request to its last bytes."""
        if self._began is not None and self._is_fetch:
            transport = getattr(self.reader, "transport", "")
            self._index.note_answer(self.node, self._ended - self._began, transport)


def _entries_of(reader: ShardReader, left: dict[Hashable, Entry]) -> dict[Hashable, Entry]:
    """Take the entries of a reader's shards out of those that are left."""
    entries: dict[Hashable, Entry] = {}
    for key in reader.keys:
        if key not in left:
            raise FetchError(f"Failed to fetch shards: {reader.node} offers {names_of([key])} unasked, or twice")
        entries[key] = left.pop(key)
    return entries


def _all_done(futures: Sequence[Future[Any]], deadline: float) -> bool:
    """Wait until all are done, or the deadline is over; whether they are.

    Ctrl-C raises while this waits for a lock of its own. `concurrent.futures.wait` may keep a lock of a future then:
    the thread that resolves it would wait without end.
    """
    landed = threading.Lock()
    landed.acquire()
    _when_done(futures, landed.release)
    return landed.acquire(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))


def _when_done(futures: Sequence[Future[Any]], then: Callable[[], object]) -> None:
    """Call `then` once all are done: in the thread that ends the last of them, or at once."""
    left = list(range(len(futures)))
    if not left:
        then()

    def one_done(_: object) -> None:
        if left.pop() == 0:  # atomic: of several threads just one is the last
            then()

    with no_interrupts:
        for future in futures:
            future.add_done_callback(one_done)


def _finish(level: Engine | HostTier) -> None:
    try:
        level.finish()
    except Exception:  # top of a thread
        logger.exception("giving back the memory of a closed cache failed")


def put_one(
    entry: Entry, tensor: torch.Tensor, node: str, level: Engine, deadline: float, live: set[ReaderTask]
) -> bool:
    """Copy a host tensor into the pool for a reserved entry; return whether it is cached now.

    Raises:
        Exception: Why it could not be; nothing was changed.
    """
    reader = TensorReader(node, [entry.key], lambda: [tensor])
    ReaderTask(reader, {entry.key: entry}, level, deadline, live, may_overflow=False).run()
    level.index.release([entry])
    if entry.error is None:
        return entry.state is State.READY
    try:
        raise entry.error
    finally:
        del entry, reader  # else error and frame would keep each other, and the caller's tensors, alive


class Fetch:
    """One call: hits in hand, shards that it claimed and fetches, shards that it joined.

    Args:
        engines: The cache's.
        live: Holds the tasks that are under way.
        timeout_s: Longest wait, in seconds.
        hands_out: Whether the caller gets the tensors. Then shards that a reader wrote into are fetched again, and
            shards that find no room may go outside the pool.
        keep: Whether the shards are meant to outlive clears.
        holding: The holding of the scope that the call is made in.
        prefer: "host": shards that are not on the device go to the host tier, and are handed out there.
        expected: Dtype, shape and owner of each shard, where known.
    Thread-safety: used by the call's thread; `cancel` from any.
    """

    def __init__(
        self,
        engines: LazyEngine,
        live: set[ReaderTask],
        timeout_s: float,
        *,
        hands_out: bool,
        keep: bool = False,
        holding: Holding | None = None,
        prefer: Prefer = "device",
        expected: Mapping[Hashable, Promise] | None = None,
    ) -> None:
        self.deadline = time.monotonic() + timeout_s
        self.claim = Claim(deadline=self.deadline, expected=expected or {})
        self.tasks: list[ReaderTask] = []
        self._engines, self._live, self._timeout_s = engines, live, timeout_s
        self._index = engines.index  # the device's; from `begin` on that of the level that shards come to
        self._keep, self._hands_out, self._holding, self._prefer = keep, hands_out, holding, prefer
        self._arrived: dict[Hashable, Copy] = {}  # those of the last `_sort`
        self._written: list[Hashable] = []  # another reader wrote into them before this call had them

    @property
    def has_lost_joins(self) -> bool:
        """Whether another call failed that this one relied on: a retry may help."""
        return any(entry.error is not None for entry in self._of_others())

    def begin(self, keys: Sequence[Hashable], source: ShardSource) -> Engine:
        """Look keys up and start to fetch the missing ones. Whatever interrupts this, no key stays claimed.

        Raises:
            TransferError: During CUDA graph capture, where nothing can be fetched.
            TypeError: The source opens something else than readers.
        """
        while True:
            engine = self._engines.open()
            level = engine if self._prefer == "device" else engine.host_level
            self._index = level.index
            try:
                if engine.device.is_capturing():
                    self._refuse_misses(keys)
                engine.drain()
                self._look_up(keys)
                if self._engines.kept() is engine:
                    self._start(source, level)
                    return engine
                self.cancel(FetchError("Failed to fetch shards: another device was chosen meanwhile"))
            except BaseException as error:
                self.cancel(error)
                raise
            self.finish()

    def complete(self, keys: Sequence[Hashable], source: ShardSource, *, may_lack: bool = False) -> Engine:
        """Begin, and wait for every shard; retry those whose other call failed, or that another reader wrote into.

        With `may_lack` some may fail: the log tells which, and `hand_out` lacks them.
        """
        engine: Engine | None = None
        while True:
            try:
                engine = self.begin(keys, source)
                self.wait()
                failures = self._sort()
                if self._written and time.monotonic() >= self.deadline:
                    failures |= dict.fromkeys(self._written, self._late())
                if failures:
                    raise self._combined(failures)
                if not self._written:
                    return engine
            except FetchError as error:
                may_help = self.has_lost_joins or (may_lack and self._written)
                if not may_help or time.monotonic() >= self.deadline:
                    if not may_lack or not (failures := error.failures) or engine is None:
                        raise
                    engine.lacks.tell(error, ((self._node_of(key), failure_reason(failures[key])) for key in failures))
                    return engine
            except BaseException as error:  # Ctrl-C, say: no later call is to wait for a read of this one
                self.cancel(FetchError(f"Failed to fetch shards: their call ended by {named_error(error)}"))
                raise
            self.keep_arrived()

    def wait(self) -> None:
        """Block until every shard is here or given up, at the latest until the deadline."""
        if not (self.tasks or self.claim.joined):
            return
        with profiled(WAIT):
            is_here = _all_done(self._pending(), self.deadline)
        if not is_here:
            late = self._late()
            self.cancel(late)
            now = time.monotonic()  # a joiner gives up late claims: their own calls, such as prefetches, may not wait
            self._index.abort([entry for entry in self._of_others() if entry.flight.deadline <= now], late)

    def hand_out(self) -> dict[Hashable, torch.Tensor]:
        """A tensor of every shard that is as the caller expects, by key. After `wait`."""
        with no_interrupts:
            return {**self.claim.hits, **self._index.lend(self._arrived)} if self._arrived else self.claim.hits

    def keep_arrived(self) -> None:
        """Let go of failed shards; the next `begin` looks up only those. After `wait`."""
        before = self.claim
        kept = Claim(
            self.hand_out(),
            before.completions,
            num_removals=before.num_removals,
            deadline=self.deadline,
            expected=before.expected,
            mutated=before.mutated,
        )
        self.finish()
        self.claim = kept

    def finish(self) -> int:
        """Let go of everything: a kept fetch, or an error of it, must not keep blocks.

        Returns:
            How many shards were not cached when it began.
        """
        with no_interrupts:
            no_collections.leave()  # whatever interrupted the call
            claim, self.tasks, self._arrived, self._written = self.claim, [], {}, []
            self.claim = Claim(deadline=self.deadline, expected=claim.expected)
            if claim.claimed or claim.joined:
                self._index.release((*claim.claimed.values(), *claim.joined.values()))
            return len(claim.claimed) + len(claim.joined)

    def promise(self) -> Future[int]:
        """A future of how many shards were not cached when it began. Lets go of everything once they are here."""
        result: Future[int] = Future()
        result.set_running_or_notify_cancel()

        def all_done() -> None:
            error: Exception | None = None
            try:
                if failures := self._sort():
                    error = self._combined(failures)
            except Exception as caught:  # of a key's `__repr__`, say: the future is waited for
                error = caught
            num_missing = self.finish()
            if error is None:
                result.set_result(num_missing)
            else:
                result.set_exception(error)

        _when_done(self._pending(), all_done)
        return result

    def cancel(self, error: BaseException) -> None:
        """Give up on every claimed shard that has not arrived."""
        with no_interrupts:
            for task in self.tasks:
                task.cancel(error)
            self._index.abort(self.claim.claimed.values(), error)

    def _look_up(self, keys: Sequence[Hashable]) -> None:
        """Claim the shards that are not in hand yet."""
        wanted = dict.fromkeys(keys)
        for held in self.claim.hits:
            del wanted[held]
        with no_interrupts:
            self._index.claim(wanted, self.claim, hands_out=self._hands_out)
            if self._keep:
                self._index.keep(wanted, self.claim)
            if self._holding is not None and self.claim.claimed:
                claimed = self.claim.claimed.values()
                self._index.adopt(self._holding, [entry for entry in claimed if entry.is_fetch])

    def _start(self, source: ShardSource, level: Engine | HostTier) -> None:
        """Open readers for the claimed shards, and drain each in a thread; the last one in this, if it may be."""
        left = dict(self.claim.claimed)
        try:
            for reader in self._readers(source):
                entries = _entries_of(reader, left)
                with no_interrupts:
                    self.tasks.append(
                        ReaderTask(reader, entries, level, self.deadline, self._live, may_overflow=self._hands_out)
                    )
            if left:
                unoffered = FetchError(f"Failed to fetch shards {names_of(left)}: no source offers them")
                self._index.abort(left.values(), unoffered)
            num_own = int(self._drains_last)
            with no_interrupts:
                for task in self.tasks[: len(self.tasks) - num_own]:
                    task.start()
            if self._index.is_closed:  # after the tasks are known to `close`
                self.cancel(CacheClosedError())
            for task in self.tasks[len(self.tasks) - num_own :]:
                note_drainer()
                task.run()
        except BaseException as error:
            with no_interrupts:
                self.cancel(error)
                for task in self.tasks:
                    if task.take_over():
                        self._live.discard(task)
                        task.end(error)
            raise

    @property
    def _drains_last(self) -> bool:
        """Whether the caller's thread drains the last reader: to start a thread takes longer than to read one shard.

        Not the main thread, where Ctrl-C could come between two steps; nor a reader that may outlast the deadline.
        """
        is_able = bool(self.tasks) and getattr(self.tasks[-1].reader, "ends_in_time", False)
        return is_able and self._hands_out and threading.get_ident() != threading.main_thread().ident

    def _readers(self, source: ShardSource) -> Iterator[ShardReader]:
        """Readers of the claimed shards; the first is of those of the level below."""
        below = self.claim.below
        if below:
            yield ResidentReader({}, below, self.deadline)
        if remote := [key for key in self.claim.claimed if key not in below]:
            yield from opened(source, remote, max(0.0, self.deadline - time.monotonic()))

    def _refuse_misses(self, keys: Sequence[Hashable]) -> None:
        if not (missing := self._index.missing(keys, self.claim.expected)):
            return
        key, why, below = missing[0], "", self._index.below
        if below is not None and below.has(key):
            why = " (it is in the host tier)"
        elif not self._index.missing([key]):
            why = " (another owner's shard of that id is cached)"
        elif key in self._index:
            why = " (it was written to in place since it came)"
        raise TransferError(f"cannot fetch {key!r}{why} ({len(missing)} in all) during CUDA graph capture")

    def _pending(self) -> list[Future[Any]]:
        landed = [entry.flight.landed for entry in self.claim.joined.values()]
        return [task.done for task in self.tasks] + [one for one in landed if one is not None]

    def _of_others(self) -> Iterable[Entry]:
        """Entries that another call is to bring, to here or to the level below."""
        return (*self.claim.joined.values(), *self.claim.below.values())

    def _sort(self) -> dict[Hashable, BaseException]:
        """Sort settled shards: arrived, written into by a reader meanwhile, failed or not as expected. After `wait`.

        Returns the errors of the last kind, by key.
        """
        claim, index, late = self.claim, self._index, None
        looks_for_writes = index.looks_for_writes
        failures: dict[Hashable, BaseException] = {}
        for key, found in claim.refused.items():
            failures[key] = index.broken(key, claim.expected[key], found)
        self._arrived, self._written = {}, []
        for entry in (*claim.claimed.values(), *claim.joined.values()):
            key, copy, promise = entry.key, entry.copy, entry.promise
            expected = claim.expected.get(key)
            if copy is None:
                failures[key] = entry.error or (late := late or self._late())
            elif promise is not expected and promise is not None and not entry.is_tensor_of(expected):
                assert expected is not None
                failures[key] = index.broken(key, expected, promise)
            elif looks_for_writes and copy.is_changed:
                self._written.append(key)
            else:
                self._arrived[key] = copy
                if copy.completion is not None:
                    claim.completions[copy.completion] = False
        return failures

    def _combined(self, failures: dict[Hashable, BaseException]) -> Exception:
        """One error for the call. It names the shards whose cached copy was dropped."""
        claim = self.claim
        mutated = [key for key in failures if key in claim.mutated]
        why = f"; cached copies of {names_of(mutated)} were dropped, as a reader wrote into them: {REMEDY}"
        num_wanted = len(claim.hits) + len(claim.claimed) + len(claim.joined) + len(claim.refused)
        return combined(failures, num_wanted, why if mutated else "", self._node_of(next(iter(failures))))

    def _node_of(self, key: Hashable) -> str:
        """The node that a shard was to come from; "" if none is known."""
        entry = self.claim.claimed.get(key) or self.claim.joined.get(key)
        return "" if entry is None else entry.node

    def _late(self) -> FetchTimeoutError:
        with no_interrupts:  # Ctrl-C amid `done` would keep the lock of a future
            waited_for = {task.node: None for task in self.tasks if task.node and not task.done.done()}
        nodes = f" from {listed(waited_for)}" if waited_for else ""
        return FetchTimeoutError(f"Failed to fetch shards{nodes}: not here within {self._timeout_s:g} s")
