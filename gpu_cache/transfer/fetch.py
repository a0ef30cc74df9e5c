"""What one call asked for: shards in hand, on their way, and to be fetched by a thread for each reader."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from gpu_cache.config import Prefer
from gpu_cache.errors import CacheClosedError, FetchError, FetchTimeoutError, TransferError, combined, listed, names_of
from gpu_cache.index.entry import Claim, Entry, Holding, Promise
from gpu_cache.index.mutation import REMEDY
from gpu_cache.pool.completion import Completion
from gpu_cache.ranges import WAIT, profiled
from gpu_cache.source import ShardSource
from gpu_cache.transfer.engine import Engine, LazyEngine
from gpu_cache.transfer.host_tier import ResidentReader
from gpu_cache.transfer.task import MeteredReader, ReaderTask
from gpu_cache.transfer.transfer import Transfer

logger = logging.getLogger(__name__)


class Fetch:
    """What one call asked for: hits in hand, shards it claimed and fetches, shards it joined.

    Args:
        engines: Where shards are looked up, and what moves them.
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
        self._engines, self._timeout_s = engines, timeout_s
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
        live = self._engines.tasks
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
                task.start(transfer, self.deadline, live, may_overflow=self._may_overflow)
        except BaseException as error:
            self.cancel(error)
            for task in self.tasks:
                if task.take_over():
                    live.discard(task)
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
