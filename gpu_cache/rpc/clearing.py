"""Clears a step's shards at owners and consumers; a failure of one keeps no other from being cleared."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from gpu_cache.config import seconds
from gpu_cache.errors import GpuCacheError, named_error
from gpu_cache.process import OwnThread
from gpu_cache.rpc.shard import ShardClearError
from gpu_cache.rpc.wire.records import MAX_IDS

logger = logging.getLogger(__name__)

Consumer = Callable[[list[Any]], Any]
ClearNode = Callable[[str, list[Any]], Awaitable[Any]]

# The longest wait for one owner or consumer. A request to an owner over HTTP ends after 10 s by itself.
DEFAULT_TIMEOUT_S = 30.0
_NAMED_SHARDS = 8  # how many that are given up a message names


class ClearsTogether(threading.local):
    """Clears that begin in one turn of an event loop, as those of one `asyncio.gather`. They are of one step."""

    def __init__(self) -> None:
        self._begun: list[list[Any]] = []

    async def join(self, shard_ids: list[Any]) -> list[Any]:
        """Wait for those that begin in this turn.

        Returns:
            The ids, and behind them those of the others, unless all are too many for one request.
        """
        begun = self._begun
        begun.append(shard_ids)
        try:
            await asyncio.sleep(0)
        finally:
            if self._begun is begun:
                self._begun = []
        others = [shard_id for other in begun if other is not shard_ids for shard_id in other]
        together = [*shard_ids, *others]
        return shard_ids if len(together) > MAX_IDS else together


class SizedId(NamedTuple):
    """A shard to clear: its id, and its bytes as its handle describes them."""

    shard_id: Any
    nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class ClearFailure:
    """An owner or consumer that could not be told to clear, and the shards that it may still hold."""

    who: str  # an owner's address, or a consumer's `__qualname__`
    shard_ids: list[Any]
    error: BaseException
    nbytes: int = 0

    def __repr__(self) -> str:
        return f"ClearFailure({self.who!r}, {len(self.shard_ids):,} shards, {self.nbytes:,} bytes, {self.error!r})"


@dataclasses.dataclass(frozen=True)
class ClearReport:
    """The outcome of a step's clear.

    Attributes:
        num_shards: Distinct shards that were to be cleared.
        owners: Each reached owner's statistics after the clear, by address.
        num_consumers: Consumers that were told.
        failures: The shards that were not cleared, by consumer or owner, and why.
        num_retried: Shards of the step before that were named to an owner or consumer once more.
        given_up: Failures that were the second for their shards. These shards are not named again.
    """

    num_shards: int
    owners: dict[str, Any]
    num_consumers: int
    failures: list[ClearFailure]
    num_retried: int = 0
    given_up: list[ClearFailure] = dataclasses.field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every owner and consumer was told."""
        return not self.failures


class _Debt:
    """Shards that one owner or consumer is to clear, each once: of this step, and those that it failed to clear."""

    def __init__(self, fresh: Iterable[SizedId], old: Iterable[SizedId]) -> None:
        self.fresh = {_key(one.shard_id): one for one in fresh}
        self.old = {_key(one.shard_id): one for one in old}
        for key in self.old:
            self.fresh.pop(key, None)  # it failed before, and stays failed in this step

    @property
    def shard_ids(self) -> list[Any]:
        return [one.shard_id for one in (*self.fresh.values(), *self.old.values())]

    def left_by(self, error: BaseException) -> tuple[list[SizedId], list[SizedId]]:
        """Shards still owed after a failure: of this step, and of steps before."""
        if not isinstance(error, ShardClearError):
            return list(self.fresh.values()), list(self.old.values())
        left = {_key(shard_id) for shard_id in error.shard_ids}
        fresh, old = ([owed[key] for key in owed if key in left] for owed in (self.fresh, self.old))
        return fresh, old


@dataclasses.dataclass(eq=False)
class _Target:
    """Shards to tell one party of: a consumer, or the owner at the address `who`."""

    who: str
    debt: _Debt
    consumer: Consumer | None = None
    is_in_call: bool = False  # whether the consumer is being called

    async def clear(self, clear_node: ClearNode, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if self.consumer is None:
                    return await clear_node(self.who, self.debt.shard_ids)
                answer = await in_own_thread(self._call, self.consumer)
                return await answer if inspect.isawaitable(answer) else answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"no answer within {timeout_s:g} s") from error

    def _call(self, consumer: Consumer) -> Any:
        self.is_in_call = True
        try:
            return consumer(self.debt.shard_ids)
        finally:
            self.is_in_call = False


class StepClearer:
    """Clears step after step at owners and consumers, and remembers for one step what could not be cleared.

    Shards that an owner failed to clear go along with the next step's request to it, once. If that fails too, the error
    is reported and counted, and the shards are forgotten: nothing piles up here for a dead owner.

    Args:
        timeout_s: Longest wait for one owner or consumer, in seconds. All are told at once, so no clear takes longer.
    Attributes:
        num_retried: Shards that were named once more.
        num_given_up: Shards that an owner or consumer failed to clear twice; counted for each of these.
        given_up_bytes: Their bytes, as their handles describe them.
    Thread-safety: any thread, any event loop.
    """

    def __init__(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.timeout_s = seconds(timeout_s, "timeout_s")
        # Guards every field below.
        self._lock = threading.Lock()
        self._owed_by_owners: dict[str, list[SizedId]] = {}
        self._owed_by_consumers: list[tuple[Consumer, list[SizedId]]] = []
        self._hanging: list[_Target] = []  # consumers that were given up, and have not returned yet
        self.num_retried = self.num_given_up = self.given_up_bytes = 0

    @property
    def num_owed(self) -> int:
        """Shards that go along with the next step's, counted for every party that failed to clear them."""
        with self._lock:
            return sum(map(len, (*self._owed_by_owners.values(), *(owed for _, owed in self._owed_by_consumers))))

    def __repr__(self) -> str:
        return f"StepClearer({self.num_owed:,} shards owed, {self.num_given_up:,} given up)"

    async def clear(
        self, shards: Mapping[str, Sequence[SizedId]], clear_node: ClearNode, consumers: Iterable[Consumer] = ()
    ) -> ClearReport:
        """Clear a step's shards, and what is owed of the step before, at owners and consumers, all at once.

        Args:
            shards: By address of their owner.
            clear_node: Clears one owner's, here and there.
            consumers: Called with all ids, each on a thread of its own; may return an awaitable. One that failed and
                is not among them this time is called once more all the same.
        Returns:
            The shards that were cleared, and those that could not be. A failure of an owner or consumer raises nothing.
        Raises:
            TypeError: A consumer cannot be called, or the consumers are no list. Nothing was cleared.
        """
        called = _callables(consumers)
        everything = [one for owned in shards.values() for one in owned]
        targets = self._targets(shards, called if everything else [], everything)
        try:
            told = (self._tell(target, clear_node) for target in targets)
            results = await asyncio.gather(*told, return_exceptions=True)
        except BaseException:  # given up by the caller, which does not know who was told
            for target in targets:
                self._remember(target, [*target.debt.fresh.values(), *target.debt.old.values()])
            raise
        return self._report(len(everything), list(zip(targets, results, strict=True)))

    async def _tell(self, target: _Target, clear_node: ClearNode) -> Any:
        """Tell one; but not one that hangs since an earlier clear: each call would leave a thread behind."""
        with self._lock:
            # A new list: one that was handed out is never changed.
            hanging = self._hanging = [one for one in self._hanging if one.is_in_call]
        if target.consumer is not None and any(one.consumer == target.consumer for one in hanging):
            raise TimeoutError("it has not returned from an earlier clear")
        try:
            return await target.clear(clear_node, self.timeout_s)
        finally:
            if target.is_in_call:
                with self._lock:
                    self._hanging = [*self._hanging, target]

    def _targets(
        self, shards: Mapping[str, Sequence[SizedId]], consumers: Sequence[Consumer], everything: Sequence[SizedId]
    ) -> list[_Target]:
        """The parties to tell, each with its shards; takes those owed from earlier steps."""
        with self._lock:
            by_owners, self._owed_by_owners = self._owed_by_owners, {}
            by_consumers, self._owed_by_consumers = self._owed_by_consumers, []
        targets = [
            _Target(node_addr, _Debt(shards.get(node_addr, ()), by_owners.get(node_addr, ())))
            for node_addr in dict.fromkeys((*shards, *by_owners))
        ]
        for consumer in consumers:
            # Equal, not only the same: each access makes a new bound method.
            known = next((owed for owed in by_consumers if owed[0] == consumer), None)
            if known is not None:
                by_consumers.remove(known)
            targets.append(_Target(_name(consumer), _Debt(everything, known[1] if known else ()), consumer))
        return targets + [_Target(_name(consumer), _Debt((), owed), consumer) for consumer, owed in by_consumers]

    def _report(self, num_shards: int, results: Sequence[tuple[_Target, Any]]) -> ClearReport:
        report = ClearReport(num_shards, {}, 0, [], sum(len(target.debt.old) for target, _ in results))
        num_told = 0
        for target, result in results:
            if isinstance(result, BaseException):
                self._note_failure(target, result, report)
                result = getattr(result, "statistics", None) or result
            if isinstance(result, BaseException):
                continue
            if target.consumer is None:
                report.owners[target.who] = result
            else:
                num_told += 1
        with self._lock:
            self.num_retried += report.num_retried
            self.num_given_up += sum(len(failure.shard_ids) for failure in report.given_up)
            self.given_up_bytes += sum(failure.nbytes for failure in report.given_up)
        return dataclasses.replace(report, num_consumers=num_told)

    def _note_failure(self, target: _Target, error: BaseException, report: ClearReport) -> None:
        fresh, old = target.debt.left_by(error)
        report.failures.append(_failure(target.who, [*fresh, *old], error))
        words = str(error) if isinstance(error, GpuCacheError) else named_error(error)
        if fresh:
            self._remember(target, fresh)
            text = "%d shards may stay at %s, %s bytes; it is told of them once more at the next clear: %s"
            logger.warning(text, len(fresh), target.who, f"{_nbytes(fresh):,}", words)
        if old:
            report.given_up.append(_failure(target.who, old, error))
            text = "%d shards stay at %s, %s bytes, after two tries, and are given up (%s): %s"
            logger.error(text, len(old), target.who, f"{_nbytes(old):,}", _named(old), words)

    def _remember(self, target: _Target, owed: list[SizedId]) -> None:
        with self._lock:
            if target.consumer is None:
                self._owed_by_owners.setdefault(target.who, []).extend(owed)
            elif owed:
                self._owed_by_consumers.append((target.consumer, owed))


def _key(shard_id: Any) -> Any:
    """The key for an id: itself, or its identity if it cannot be a key."""
    try:
        hash(shard_id)
    except TypeError:
        return ("unhashable", id(shard_id))
    return shard_id


def _callables(consumers: Iterable[Consumer]) -> list[Consumer]:
    if not isinstance(consumers, Iterable):
        raise TypeError(f"consumers is a {type(consumers).__name__}: a list of callables is expected")
    listed = list(consumers)
    for number, consumer in enumerate(listed):
        if not callable(consumer):
            raise TypeError(f"consumers[{number}] is a {type(consumer).__name__}: a callable is expected")
    return listed


def _name(consumer: Consumer) -> str:
    return getattr(consumer, "__qualname__", None) or repr(consumer)


def _failure(who: str, owed: Sequence[SizedId], error: BaseException) -> ClearFailure:
    return ClearFailure(who, [one.shard_id for one in owed], error, _nbytes(owed))


def _nbytes(owed: Iterable[SizedId]) -> int:
    return sum(one.nbytes for one in owed)


def _named(owed: Sequence[SizedId]) -> str:
    listed = ", ".join(repr(one.shard_id) for one in islice(owed, _NAMED_SHARDS))
    return listed + (", ..." if len(owed) > _NAMED_SHARDS else "")


ResultT = TypeVar("ResultT")


async def in_own_thread(work: Callable[..., ResultT], *args: Any) -> ResultT:
    """Await a blocking call on a thread of its own.

    The few threads of `asyncio.to_thread` could all be waiting for an owner that is dead. And the interpreter waits
    for those of an executor without end; for this one it waits a moment.
    """
    loop, has_ended, outcome = asyncio.get_running_loop(), asyncio.Event(), Future[ResultT]()

    def run() -> None:
        try:
            outcome.set_result(work(*args))
        except BaseException as error:
            # The one would end the caller's coroutine, and the others its loop.
            is_odd = isinstance(error, StopIteration) or not isinstance(error, Exception)
            outcome.set_exception(RuntimeError(f"{error!r} was raised") if is_odd else error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(has_ended.set)

    OwnThread(run, "areal-clear").start()
    await has_ended.wait()
    return outcome.result()
