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
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.mutation import REMEDY
from gpu_cache.pool.completion import Completion
from gpu_cache.ranges import WAIT, profiled
from gpu_cache.source import ShardSource
from gpu_cache.transfer.engine import Engine, LazyEngine
from gpu_cache.transfer.parked_reader import ParkedReader
from gpu_cache.transfer.task import MeteredReader, ReaderTask
from gpu_cache.transfer.transfer import Transfer

logger = logging.getLogger(__name__)


class Fetch:
    """What one call asked for: hits in hand, shards it claimed and fetches, shards it joined.

    Args:
        index: Where shards are looked up and land.
        engines: What moves them.
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
        index: ShardIndex,
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
        self.claim = Claim(expected=expected or {})
        self.deadline = time.monotonic() + timeout_s
        self.tasks: list[ReaderTask] = []
        self._index, self._engines, self._timeout_s = index, engines, timeout_s
        self._may_overflow, self._keep = may_overflow, keep
        self._hands_out, self._holding, self._prefer = hands_out, holding, prefer
        self._on_host = False  # so it is, and there is a host tier

    @property
    def _left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    @property
    def _num_wanted(self) -> int:
        claim = self.claim
        return len(claim.hits) + len(claim.claimed) + len(claim.joined) + len(claim.refused)

    @property
    def has_lost_joins(self) -> bool:
        """Whether another call that this one relied on failed: asking anew may help."""
        return any(entry.error is not None for entry in self.claim.joined.values())

    @property
    def has_strays(self) -> bool:
        """Whether shards wanted on the device came to the host tier, for another call: asking anew copies them."""
        return bool(self._strays())

    def begin(self, keys: Sequence[Hashable], source: ShardSource) -> Engine:
        """Look keys up and start to fetch what is missing; whatever interrupts this, no key stays claimed.

        Raises:
            TransferError: During CUDA graph capture, where nothing can be fetched.
        """
        while True:
            engine = self._engines.open()
            transfer = engine.transfer_to(self._prefer)
            self._on_host = transfer.parks
            if engine.device.is_capturing():
                self._refuse_misses(keys)
            engine.drain()
            try:
                wanted = dict.fromkeys(keys)
                for held in self.claim.hits:
                    del wanted[held]
                self._index.claim(wanted, self.claim, self.deadline, hands_out=self._hands_out, on_host=self._on_host)
                if self._keep:
                    self._index.keep(wanted, self.claim)
                if self._holding is not None and self.claim.claimed:
                    claimed = self.claim.claimed.values()
                    self._index.adopt(self._holding, [entry for entry in claimed if entry.is_new])
                if self._engines.is_current(engine):
                    self._start(source, transfer)
                    if self.claim.claimed and self._index.is_closed:
                        self.cancel(CacheClosedError())
                    return engine
                self.cancel(FetchError("Failed to fetch shards: another device was chosen meanwhile"))
            except BaseException as error:
                self.cancel(error)
                raise
            self.finish()

    def complete(self, keys: Sequence[Hashable], source: ShardSource, *, may_lack: bool = False) -> Engine:
        """Begin, and wait for every shard; retry shards whose other fetch failed, or landed in the other tier.

        With `may_lack` some may fail: the log tells which, and `hand_out` lacks them.
        """
        engine: Engine | None = None
        while True:
            try:
                engine = self.begin(keys, source)
                self.wait()
                if not self.has_strays:
                    return engine
                if time.monotonic() >= self.deadline:
                    late = self._late()
                    raise combined(dict.fromkeys(self._strays(), late), len(keys))
            except FetchError as error:
                may_help = self.has_lost_joins or (may_lack and self.has_strays)
                if not may_help or time.monotonic() >= self.deadline:
                    if not may_lack or not error.failures or engine is None:
                        raise
                    logger.warning("going on without shards: %s", str(error))  # whose frames hold blocks
                    return engine
            self.keep_arrived()

    def _start(self, source: ShardSource, transfer: Transfer) -> None:
        """Open readers for the claimed shards, and drain each in a thread of its own."""
        live = self._engines.tasks
        left = dict(self.claim.claimed)
        try:
            if parked := {
                key: left.pop(key) for key, entry in self.claim.claimed.items() if entry.resident is not None
            }:
                self.tasks.append(ReaderTask(ParkedReader(parked), parked, self._index))
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
            self._index.abort([entry for entry in self.claim.joined.values() if entry.deadline <= now], late)
        if failures := self._failures():
            raise self._combined(failures)

    def hand_out(self) -> dict[Hashable, torch.Tensor]:
        """A tensor of every shard, by key; after `wait`."""
        others = self._others()
        places = [(entry.key, entry.place if self._on_host else entry) for entry in self._entries()]
        arrived = {key: place for key, place in places if place.base is not None and key not in others}
        return {**self.claim.hits, **self._index.lend(arrived)} if arrived else dict(self.claim.hits)

    def host_completions(self) -> Iterable[Completion]:
        """Of the copies to the host tier that shards handed out there depend on, each once."""
        return self.claim.host_completions

    def completions(self) -> Iterable[Completion]:
        """Of the copies to the device that the other shards depend on, each once."""
        return self.claim.completions | dict.fromkeys(
            entry.completion for entry in self._entries() if entry.completion is not None
        )

    def keep_arrived(self) -> None:
        """Let go of what failed; the next `begin` looks only that up. After `wait`."""
        before = self.claim
        kept = Claim(
            self.hand_out(),
            dict.fromkeys(self.completions()),
            before.host_completions,
            num_removals=before.num_removals,
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
        claim, self.claim, self.tasks = self.claim, Claim(), []
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
        if missing := self._index.missing(keys, self.claim.expected, on_host=self._on_host):
            why = " (it was written to in place since it came)" if missing[0] in self._index else ""
            if not self._index.missing(missing[:1], on_host=self._on_host):
                why = " (another owner's shard of that id is cached)"
            if not self._on_host and self._index.is_parked(missing[0]):
                why = " (it is in the host tier)"
            raise TransferError(f"cannot fetch {missing[0]!r}{why} ({len(missing)} in all) during CUDA graph capture")

    def _has_timed_out(self, pending: list[Future[Any]]) -> bool:
        with profiled(WAIT):
            return bool(concurrent.futures.wait(pending, self._left_s).not_done)

    def _late(self) -> FetchTimeoutError:
        waited_for = {task.reader.node: None for task in self.tasks if not task.done.done()}
        nodes = f" from {listed(waited_for)}" if waited_for else ""
        return FetchTimeoutError(f"Failed to fetch shards{nodes}: not here within {self._timeout_s:.1f} s")

    def _pending(self) -> list[Future[Any]]:
        flights = [entry.flight for entry in self.claim.joined.values() if entry.flight is not None]
        return [*flights, *(task.done for task in self.tasks)]

    def _entries(self) -> Iterable[Entry]:
        return (*self.claim.claimed.values(), *self.claim.joined.values())

    def _strays(self) -> list[Hashable]:
        return [] if self._on_host else [entry.key for entry in self._entries() if entry.parked is not None]

    def _others(self) -> dict[Hashable, Promise]:
        """What is cached, or was fetched for another call, and is not what this one expects, by key."""
        if not self.claim.expected:
            return {}
        arrived = ((key, entry) for key, entry in self.claim.joined.items() if entry.has_arrived)
        others = {key: entry.promise for key, entry in arrived if not entry.is_tensor_of(self.claim.expected.get(key))}
        return {**self.claim.refused, **{key: found for key, found in others.items() if found is not None}}

    def _failures(self) -> dict[Hashable, BaseException]:
        expected = self.claim.expected
        failures: dict[Hashable, BaseException] = {
            key: self._index.broken(key, expected[key], found) for key, found in self._others().items()
        }
        if lacking := [entry for entry in self._entries() if not entry.has_arrived]:
            late = self._late()
            failures.update((entry.key, entry.error or late) for entry in lacking)
        return failures

    def _combined(self, failures: dict[Hashable, BaseException]) -> Exception:
        """One error for the call; says of which shards a cached copy was dropped."""
        mutated = [key for key in failures if key in self.claim.mutated]
        why = f"; cached copies of {names_of(mutated)} were dropped, as a reader wrote into them: {REMEDY}"
        return combined(failures, self._num_wanted, why if mutated else "")
