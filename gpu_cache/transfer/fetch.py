"""One call: shards in hand, on their way, and to be fetched by a thread for each reader, which drains it."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from gpu_cache.config import Prefer
from gpu_cache.device.modes import FETCH, WAIT, profiled
from gpu_cache.errors import CacheClosedError, FetchError, FetchTimeoutError, TransferError, combined, listed, names_of
from gpu_cache.index.entry import Claim, Entry, Holding, Promise, State
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import REMEDY
from gpu_cache.pool.block import Copy
from gpu_cache.pool.completion import Completion
from gpu_cache.process import OwnThread
from gpu_cache.source import ShardReader, ShardSource, ShardSpec
from gpu_cache.transfer.engine import Engine, LazyEngine
from gpu_cache.transfer.host_tier import ResidentReader
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


logger = logging.getLogger(__name__)


class Fetch:
    """What one call asked for: hits in hand, shards it claimed and fetches, shards it joined.

    Args:
        engines: Where shards are looked up, and what moves them.
        live: Has the tasks that are under way.
        timeout_s: Longest wait, in seconds.
        may_overflow: Whether shards that find no room may be placed outside the pool.
        keep: Whether they are meant to outlive clears.
        hands_out: Whether the caller gets the tensors, so that shards that a reader wrote into are fetched again.
        holding: Of the scope that the call is made in.
        prefer: "host": what is not on the device goes to the host tier, and is handed out there.
        expected: What the shards should be, where known.
    Thread-safety: used by the call's thread; `cancel` from any.
    """

    def __init__(
        self,
        engines: LazyEngine,
        live: set[ReaderTask],
        timeout_s: float,
        *,
        may_overflow: bool = True,
        keep: bool = False,
        hands_out: bool = True,
        holding: Holding | None = None,
        prefer: Prefer = "device",
        expected: Mapping[Hashable, Promise] | None = None,
    ) -> None:
        self.deadline = time.monotonic() + timeout_s
        self.claim = Claim(deadline=self.deadline, expected=expected or {})
        self.tasks: list[ReaderTask] = []
        self._engines, self._live, self._timeout_s = engines, live, timeout_s
        self._index = engines.index  # of the level that shards are to come to, once that is known
        self._may_overflow, self._keep = may_overflow, keep
        self._hands_out, self._holding, self._prefer = hands_out, holding, prefer
        self._withheld: list[Hashable] = []  # arrived, and written into by another reader before this call had them

    @property
    def _left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    @property
    def _num_wanted(self) -> int:
        claim = self.claim
        return len(claim.hits) + len(claim.claimed) + len(claim.joined) + len(claim.refused)

    @property
    def has_lost_joins(self) -> bool:
        """Whether another call that this one relied on failed: a retry may help."""
        return any(entry.error is not None for entry in self._of_others())

    def begin(self, keys: Sequence[Hashable], source: ShardSource) -> Engine:
        """Look keys up and start to fetch what is missing; whatever interrupts this, no key stays claimed.

        Raises:
            TransferError: During CUDA graph capture, where nothing can be fetched.
        """
        while True:
            engine = self._engines.open()
            level = engine.level(self._prefer)
            self._index = level.index
            if engine.device.is_capturing():
                self._refuse_misses(keys)
            engine.drain()
            try:
                wanted = dict.fromkeys(keys)
                for held in self.claim.hits:
                    del wanted[held]
                self._index.claim(wanted, self.claim, hands_out=self._hands_out)
                if self._keep:
                    self._index.keep(wanted, self.claim)
                if self._holding is not None and self.claim.claimed:
                    claimed = self.claim.claimed.values()
                    self._index.adopt(self._holding, [entry for entry in claimed if entry.is_fetch])
                if self._engines.is_current(engine):
                    self._start(source, level.transfer)
                    if self.claim.claimed and self._index.is_closed:
                        self.cancel(CacheClosedError())
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
                self._withheld = self._written()
                if not self._withheld:
                    return engine
                if time.monotonic() >= self.deadline:
                    raise self._combined(dict.fromkeys(self._withheld, self._late()))
            except FetchError as error:
                if not self.has_lost_joins or time.monotonic() >= self.deadline:
                    if not may_lack or not error.failures or engine is None:
                        raise
                    logger.warning("going on without shards: %s", str(error))  # whose frames hold blocks
                    return engine
            self.keep_arrived()

    def _start(self, source: ShardSource, transfer: Transfer) -> None:
        """Open readers for the claimed shards, the first for what is below, and drain each in a thread of its own."""
        left = dict(self.claim.claimed)
        try:
            if below := self.claim.below:
                copies = {key: left.pop(key) for key in below}
                self.tasks.append(ReaderTask(ResidentReader({}, below, self.deadline), copies, self._index))
            for reader in source.open(list(left), self._left_s) if left else ():
                if foreign := [key for key in reader.keys if key not in left]:
                    raise FetchError(
                        f"Failed to fetch shards: {reader.node} offers {names_of(foreign)} unasked, or twice"
                    )
                entries = {key: left.pop(key) for key in reader.keys}
                self.tasks.append(ReaderTask(MeteredReader(reader, self._index.note_answer), entries, self._index))
            for task in self.tasks:
                task.start(transfer, self.deadline, self._live, may_overflow=self._may_overflow)
        except BaseException as error:
            self.cancel(error)
            for task in self.tasks:
                if task.take_over():
                    self._live.discard(task)
                    task.end(error)
            raise
        if left:
            unoffered = FetchError(f"Failed to fetch shards {names_of(left)}: no source offers them")
            self._index.abort(left.values(), unoffered)

    def wait(self) -> None:
        """Block until every shard is here.

        Raises:
            FetchError: Some are not, for the reasons in `failures`; the others are cached.
            CacheClosedError: The cache was closed meanwhile.
        """
        if (pending := self._pending()) and self._has_timed_out(pending):
            late = self._late()
            self.cancel(late)
            now = time.monotonic()  # a claim that nobody waits for, as of a prefetch, is given up by who joined it
            self._index.abort([entry for entry in self._of_others() if entry.flight.deadline <= now], late)
        if failures := self._failures():
            raise self._combined(failures)

    def hand_out(self) -> dict[Hashable, torch.Tensor]:
        """A tensor of every shard that is as the caller expects, by key; after `wait`."""
        but = {*self._others(), *self._withheld}
        arrived = {entry.key: entry.copy for entry in self._entries() if entry.copy and entry.key not in but}
        return {**self.claim.hits, **self._index.lend(arrived)} if arrived else dict(self.claim.hits)

    def host_completions(self) -> Iterable[Completion]:
        """Of the copies to the host tier that shards handed out there depend on, each once."""
        return [completion for completion, is_low in self.claim.completions.items() if is_low]

    def completions(self) -> Iterable[Completion]:
        """Of the copies to the device that the other shards depend on, each once."""
        found = [completion for completion, is_low in self.claim.completions.items() if not is_low]
        found += [one for entry in self._entries() if entry.copy and (one := entry.copy.completion) is not None]
        return dict.fromkeys(found)

    def keep_arrived(self) -> None:
        """Let go of what failed; the next `begin` looks only that up. After `wait`."""
        before = self.claim
        kept = Claim(
            self.hand_out(),
            {**before.completions, **dict.fromkeys(self.completions(), False)},
            num_removals=before.num_removals,
            deadline=self.deadline,
            expected=before.expected,
            mutated=before.mutated,
        )
        self.finish()
        self.claim = kept

    def finish(self) -> int:
        """Let go of everything, so that nobody who keeps the fetch or an error of it keeps blocks.

        Returns:
            How many shards were not cached when it began.
        """
        claim, self.tasks = self.claim, []
        self.claim = Claim(deadline=self.deadline, expected=claim.expected)
        if claim.claimed or claim.joined:
            self._index.release((*claim.claimed.values(), *claim.joined.values()))
        return len(claim.claimed) + len(claim.joined)

    def promise(self) -> Future[int]:
        """A future of how many shards were not cached when it began; lets go of everything when they are here."""
        result: Future[int] = Future()
        result.set_running_or_notify_cancel()

        def tell(error: BaseException | None) -> None:
            num_missing = self.finish()
            if error is None:
                result.set_result(num_missing)
            else:
                result.set_exception(error)

        self.when_done(tell)
        return result

    def when_done(self, then: Callable[[BaseException | None], None]) -> None:
        """Call `then` once, with what went wrong if anything, when every shard is here or given up."""
        waiting = self._pending()
        left = list(range(len(waiting)))

        def all_done() -> None:
            failures = self._failures()
            then(self._combined(failures) if failures else None)

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

    def _has_timed_out(self, pending: list[Future[Any]]) -> bool:
        with profiled(WAIT):
            return bool(concurrent.futures.wait(pending, self._left_s).not_done)

    def _late(self) -> FetchTimeoutError:
        waited_for = {task.reader.node: None for task in self.tasks if task.reader.node and not task.done.done()}
        nodes = f" from {listed(waited_for)}" if waited_for else ""
        return FetchTimeoutError(f"Failed to fetch shards{nodes}: not here within {self._timeout_s:.1f} s")

    def _pending(self) -> list[Future[Any]]:
        flights = [one for entry in self.claim.joined.values() if (one := entry.flight.landed) is not None]
        return [*flights, *(task.done for task in self.tasks)]

    def _entries(self) -> Iterable[Entry]:
        return (*self.claim.claimed.values(), *self.claim.joined.values())

    def _of_others(self) -> Iterable[Entry]:
        """What another call is to bring, to here or to the level below."""
        return (*self.claim.joined.values(), *self.claim.below.values())

    def _others(self) -> dict[Hashable, Promise]:
        """What is cached, or was fetched for another call, and is not what this one expects, by key."""
        if not self.claim.expected:
            return {}
        arrived = [entry for entry in self._of_others() if entry.copy is not None]
        expected = self.claim.expected
        others = {one.key: one.promise for one in arrived if not one.is_tensor_of(expected.get(one.key))}
        return {**self.claim.refused, **{key: found for key, found in others.items() if found is not None}}

    def _written(self) -> list[Hashable]:
        """Shards that arrived, and that another caller of their fetch wrote into meanwhile."""
        if not self._index.looks_for_writes:
            return []
        return [entry.key for entry in self._entries() if entry.is_changed]

    def _failures(self) -> dict[Hashable, BaseException]:
        expected = self.claim.expected
        failures: dict[Hashable, BaseException] = {
            key: self._index.broken(key, expected[key], found) for key, found in self._others().items()
        }
        if lacking := [entry for entry in self._entries() if entry.copy is None]:
            late = self._late()
            failures.update((entry.key, entry.error or late) for entry in lacking)
        return failures

    def _combined(self, failures: dict[Hashable, BaseException]) -> Exception:
        """One error for the call; says of which shards a cached copy was dropped."""
        mutated = [key for key in failures if key in self.claim.mutated]
        why = f"; cached copies of {names_of(mutated)} were dropped, as a reader wrote into them: {REMEDY}"
        return combined(failures, self._num_wanted, why if mutated else "")
