"""The end of a step: all owners and consumers are told at once; one that fails keeps no other from it."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from typing import Any

import pytest

from gpu_cache import FetchError
from gpu_cache.rpc.clearing import ClearReport, SizedId, StepClearer

SHARDS: dict[str, list[Any]] = {"node-a:1": ["a", "b"], "node-b:1": ["c"]}


class Owners:
    """Notes what it is told to clear; the nodes named refuse."""

    def __init__(self, *refusing: str) -> None:
        self.told: list[tuple[str, list[Any]]] = []
        self._refusing = refusing

    async def clear_node(self, node_addr: str, shard_ids: list[Any]) -> dict[str, int]:
        self.told.append((node_addr, shard_ids))
        await asyncio.sleep(0)
        if node_addr in self._refusing:
            raise FetchError(f"Failed to clear shards at {node_addr}")
        return {"cleared_count": len(shard_ids)}


def sized(shards: dict[str, list[Any]]) -> dict[str, list[SizedId]]:
    return {node_addr: [SizedId(shard_id, 100) for shard_id in owned] for node_addr, owned in shards.items()}


def run(owners: Owners, *consumers: Any, shards: dict[str, list[Any]] = SHARDS) -> ClearReport:
    return asyncio.run(StepClearer().clear(sized(shards), owners.clear_node, consumers))


def test_owners_and_consumers_are_told() -> None:
    owners, told = Owners(), []
    report = run(owners, told.append, told.append)
    assert sorted(owners.told) == [("node-a:1", ["a", "b"]), ("node-b:1", ["c"])]
    assert told == [["a", "b", "c"]] * 2
    assert told[0] is not told[1]
    expected = ClearReport(3, {"node-a:1": {"cleared_count": 2}, "node-b:1": {"cleared_count": 1}}, 2, [])
    assert report == expected
    assert report.is_complete


def test_a_failing_consumer_is_reported_and_the_others_are_told(caplog: pytest.LogCaptureFixture) -> None:
    owners, told = Owners("node-a:1"), []

    def broken(shard_ids: list[Any]) -> None:
        raise OSError("gone")

    with caplog.at_level(logging.WARNING):
        report = run(owners, broken, told.append)
    assert told == [["a", "b", "c"]]
    assert report.owners == {"node-b:1": {"cleared_count": 1}}
    assert report.num_consumers == 1
    assert not report.is_complete
    owner, consumer = report.failures
    assert (owner.who, owner.shard_ids, type(owner.error)) == ("node-a:1", ["a", "b"], FetchError)
    assert (consumer.shard_ids, str(consumer.error)) == (["a", "b", "c"], "gone")
    assert consumer.who.endswith("broken")
    assert "2 shards may stay at node-a:1" in caplog.text
    assert "3 shards may stay at" in caplog.text
    assert "at the next clear: OSError: gone" in caplog.text


def test_a_report_says_how_many_shards_are_left_and_does_not_list_them() -> None:
    def broken(shard_ids: list[Any]) -> None:
        raise FetchError("gone", dict.fromkeys(shard_ids, OSError("gone")))

    report = run(Owners(), broken, shards={"node-a:1": [f"shard {number}" for number in range(1000)]})
    (failure,) = report.failures
    assert len(failure.shard_ids) == 1000
    assert f"{failure.who!r}, 1,000 shards, 100,000 bytes, FetchError('gone')" in repr(report)
    assert "shard 999" not in repr(report)


@pytest.mark.parametrize(
    ("consumers", "said"),
    [
        ([print, None], r"consumers\[1\] is a NoneType: a callable is expected"),
        (["critic"], r"consumers\[0\] is a str: a callable is expected"),
        (print, "consumers is a builtin_function_or_method: a list of callables is expected"),
    ],
)
def test_consumers_that_cannot_be_called_are_refused(consumers: Any, said: str) -> None:
    owners = Owners()
    with pytest.raises(TypeError, match=said):
        asyncio.run(StepClearer().clear(sized(SHARDS), owners.clear_node, consumers))
    assert owners.told == []


def test_a_consumer_may_answer_later() -> None:
    told: list[list[Any]] = []

    async def consumer(shard_ids: list[Any]) -> None:
        await asyncio.sleep(0)
        told.append(shard_ids)

    async def broken(shard_ids: list[Any]) -> None:
        raise OSError("gone")

    report = run(Owners(), consumer, functools.partial(broken))
    assert told == [["a", "b", "c"]]
    assert report.num_consumers == 1
    assert str(report.failures[0].error) == "gone"
    assert "partial" in report.failures[0].who


def test_every_consumer_has_a_thread_of_its_own() -> None:
    """None gets past the barrier before all have arrived; a loop's own threads would be too few."""
    barrier = threading.Barrier(60)
    report = run(Owners(), *[lambda shard_ids: barrier.wait(30)] * 60)
    assert report.num_consumers == 60
    assert report.is_complete


def test_owners_are_told_all_at_once() -> None:
    async def scenario() -> ClearReport:
        under_way: list[str] = []
        all_are = asyncio.Event()

        async def clear_node(node_addr: str, shard_ids: list[Any]) -> None:
            under_way.append(node_addr)
            if len(under_way) == 50:
                all_are.set()
            await asyncio.wait_for(all_are.wait(), 30)

        shards = sized({f"node-{number}:1": [number] for number in range(50)})
        return await StepClearer().clear(shards, clear_node)

    report = asyncio.run(scenario())
    assert len(report.owners) == 50


def test_no_shards_are_nothing_to_tell() -> None:
    owners, told = Owners(), []
    assert run(owners, told.append, shards={}) == ClearReport(0, {}, 0, [])
    assert (owners.told, told) == ([], [])


def test_a_consumer_may_change_its_list_of_ids() -> None:
    owners, told = Owners(), []
    report = run(owners, lambda shard_ids: shard_ids.clear(), told.append)
    assert told == [["a", "b", "c"]]
    assert report.is_complete
