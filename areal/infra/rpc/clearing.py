"""Clearing a step's shards at everybody who may hold them, where nobody's failure keeps the others' memory."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Consumer = Callable[[list[Any]], Any]
ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True)
class ClearFailure:
    """Somebody who could not be told to clear, and what it may still hold."""

    who: str  # an owner's address, or a consumer's name
    shard_ids: list[Any]
    error: BaseException


@dataclasses.dataclass(frozen=True)
class ClearReport:
    """What the end of a step cleared.

    Attributes:
        num_shards: Distinct shards that were to be cleared.
        owners: Each reached owner's statistics after the clear, by address.
        num_consumers: Consumers that were told.
        failures: What could not be cleared, by whom, and why.
    """

    num_shards: int
    owners: dict[str, Any]
    num_consumers: int
    failures: list[ClearFailure]

    @property
    def is_complete(self) -> bool:
        """Whether everybody was told."""
        return not self.failures


async def clear_all(
    shards: Mapping[str, list[Any]],
    clear_node: Callable[[str, list[Any]], Awaitable[Any]],
    consumers: Iterable[Consumer],
) -> ClearReport:
    """Clear shards at their owners and at all consumers, concurrently.

    Args:
        shards: Ids by address of their owner.
        clear_node: Clears one owner's, here and there.
        consumers: Called with all ids, each on a thread of its own; may return an awaitable.
    """
    ids = [shard_id for owned in shards.values() for shard_id in owned]
    told = list(consumers) if ids else []
    names = [*shards, *(getattr(consumer, "__qualname__", repr(consumer)) for consumer in told)]
    held = [*shards.values(), *([ids] * len(told))]
    results = await asyncio.gather(
        *(clear_node(node_addr, owned) for node_addr, owned in shards.items()),
        *(_tell(consumer, ids) for consumer in told),
        return_exceptions=True,
    )
    failures = [
        ClearFailure(who, list(kept), result)
        for who, kept, result in zip(names, held, results, strict=True)
        if isinstance(result, BaseException)
    ]
    for failure in failures:
        logger.warning("%d shards may stay at %s: %s", len(failure.shard_ids), failure.who, failure.error)
    owners = {
        who: result for who, result in zip(shards, results, strict=False) if not isinstance(result, BaseException)
    }
    num_told = sum(not isinstance(result, BaseException) for result in results[len(shards) :])
    return ClearReport(len(ids), owners, num_told, failures)


async def in_own_thread(work: Callable[..., ResultT], *args: Any) -> ResultT:
    """Await a blocking call. The few threads of `asyncio.to_thread` could all be waiting for somebody who is dead."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="areal-clear")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *args)
    finally:
        executor.shutdown(wait=False)


async def _tell(consumer: Consumer, shard_ids: list[Any]) -> None:
    result = await in_own_thread(consumer, list(shard_ids))
    if inspect.isawaitable(result):
        await result
