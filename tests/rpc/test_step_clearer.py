"""Step after step is cleared, over real sockets, with owners dead, silent or hanging."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gpu_cache import FetchError
from gpu_cache.rpc import runtime
from gpu_cache.rpc.clearing import ClearReport, SizedId, StepClearer
from gpu_cache.rpc.client.http import HttpRTensorBackend
from gpu_cache.rpc.rtensor import RTensor, fetch_buffer_stats, set_backend
from gpu_cache.rpc.server import main as rpc_server
from gpu_cache.rpc.server.main import ServerHandle
from tests.support.areal_fixtures import (
    DONE,
    THREE,
    end_step,
    handles,
    with_settings,
)
from tests.support.fake_owner import FakeOwner
from tests.support.fault_server import FaultServer, hanging_up, silent, whole

pytestmark = pytest.mark.usefixtures("hasty_backend")


@pytest.fixture
def opened() -> Iterator[threading.Event]:
    """A gate that opens in the end, so that no consumer hangs for ever."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_shards_of_a_dead_owner_go_along_with_the_next_step(server: ServerHandle, owner: FakeOwner) -> None:
    """It comes back at its address with what it had, as after a partition."""
    for shard_id in ("old", "new"):
        owner.store[shard_id] = THREE
    port = int(server.address.split(":")[1])
    server.stop()
    report = end_step(handles(server.address, "old"))
    assert [(failure.who, failure.shard_ids, failure.nbytes) for failure in report.failures] == [
        (server.address, ["old"], 12)
    ]
    assert (report.given_up, runtime.current().clearer.num_owed) == ([], 1)
    with rpc_server.start(port=port, owner=owner):
        report = end_step(handles(server.address, "new"))
    assert report.is_complete
    assert (report.num_shards, report.num_retried) == (1, 1)
    assert report.owners[server.address]["cleared_count"] == 2
    assert (len(owner.store), owner.evicted) == (0, ["new", "old"])
    assert repr(runtime.current().clearer) == "StepClearer(0 shards owed, 0 given up)"


def test_shards_that_fail_twice_are_reported_with_ids_and_bytes_and_forgotten(
    serve: Callable[..., FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(hanging_up)
    first = [f"shard-{number}" for number in range(20)]
    assert end_step(handles(server.address, *first)).given_up == []
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    report = end_step(handles(server.address, "next"))
    assert [(failure.who, failure.shard_ids, failure.nbytes) for failure in report.given_up] == [
        (server.address, first, 240)
    ]
    assert report.failures[0].shard_ids == ["next", *first]
    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert error.startswith(f"20 shards stay at {server.address}, 240 bytes, after two tries")
    assert "'shard-7', ...)" in error
    assert "shard-8" not in error
    clearer = runtime.current().clearer
    assert (clearer.num_given_up, clearer.given_up_bytes, clearer.num_retried, clearer.num_owed) == (20, 240, 20, 1)
    server.script = [whole(DONE)]
    assert end_step(handles(server.address, "third")).is_complete
    assert server.wanted[-1] == ["third", "next"], "in one request"
    assert end_step(handles(server.address, "fourth")).is_complete
    assert server.wanted[-1] == ["fourth"]


def test_owed_shards_are_asked_for_without_a_step_too(serve: Callable[..., FaultServer]) -> None:
    server, told = serve(hanging_up, hanging_up, hanging_up, whole(DONE)), []
    end_step(handles(server.address, "a"))
    report = end_step([], told.append)
    assert (report.num_shards, report.num_retried, report.is_complete, told) == (0, 1, True, [])
    assert server.wanted[-1] == ["a"]
    assert end_step([]).owners == {}


def test_an_id_that_fails_in_two_steps_of_its_own_has_failed_twice(serve: Callable[..., FaultServer]) -> None:
    server = serve(hanging_up)
    for _ in range(2):
        report = end_step(handles(server.address, "a"))
    assert [failure.shard_ids for failure in report.given_up] == [["a"]]
    assert runtime.current().clearer.num_owed == 0


def test_a_dead_owner_keeps_neither_the_others_nor_the_consumers(server: ServerHandle, owner: FakeOwner) -> None:
    owner.store["a"] = THREE
    told: list[Any] = []
    RTensor.localize(handles(server.address, "a"))
    report = end_step([handles("127.0.0.1:1", "gone"), handles(server.address, "a")], told.extend)
    assert [failure.who for failure in report.failures] == ["127.0.0.1:1"]
    assert (len(owner.store), sorted(told), fetch_buffer_stats()) == (0, ["a", "gone"], {"num_entries": 0})


@pytest.mark.parametrize("limited_by", ["backend", "clearer"])
def test_an_owner_that_never_answers_is_given_up(
    server: ServerHandle, owner: FakeOwner, serve: Callable[..., FaultServer], limited_by: str
) -> None:
    if limited_by == "clearer":
        set_backend(with_settings(HttpRTensorBackend(), delete_timeout_s=60.0))
    owner.store["a"] = THREE
    mute, timeout_s = serve(silent), 30.0 if limited_by == "backend" else 1.0
    report = end_step([handles(mute.address, "b"), handles(server.address, "a")], clearer=StepClearer(timeout_s))
    (failure,) = report.failures
    assert (failure.who, failure.shard_ids) == (mute.address, ["b"])
    expected = "TimeoutError" if limited_by == "backend" else "no answer within 1 s"
    assert expected in str(failure.error)
    assert len(owner.store) == 0
    runtime.current().backend.close()  # type: ignore[attr-defined]


def test_a_consumer_that_fails_is_told_again_with_the_next_steps(
    serve: Callable[..., FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(whole(DONE))

    class Engine:
        def __init__(self) -> None:
            self.told: list[list[Any]] = []
            self.is_dead = False

        def clear(self, shard_ids: list[Any]) -> None:
            self.told.append(shard_ids)
            if self.is_dead:
                raise OSError("gone")

    sick, well = Engine(), Engine()
    sick.is_dead = True
    report = end_step(handles(server.address, "a", "b"), sick.clear, well.clear)
    assert (report.num_consumers, report.failures[0].nbytes) == (1, 24)
    assert report.failures[0].who.endswith("Engine.clear")
    sick.is_dead = False
    assert end_step(handles(server.address, "c"), sick.clear, well.clear).num_consumers == 2
    assert sick.told == [["a", "b"], ["c", "a", "b"]], "a bound method is known again"
    assert well.told == [["a", "b"], ["c"]]


def test_a_consumer_that_is_not_among_the_next_steps_is_told_once_more_alone(
    serve: Callable[..., FaultServer], caplog: pytest.LogCaptureFixture
) -> None:
    server, told = serve(whole(DONE)), []

    def dead(shard_ids: list[Any]) -> None:
        told.append(shard_ids)
        raise OSError("gone")

    end_step(handles(server.address, "a"), dead)
    others: list[Any] = []
    report = end_step(handles(server.address, "b"), others.extend)
    assert (told, others) == ([["a"], ["a"]], ["b"])
    assert (report.num_consumers, [failure.shard_ids for failure in report.given_up]) == (1, [["a"]])
    assert "1 shards stay at " in caplog.text
    end_step(handles(server.address, "c"), others.extend)
    assert len(told) == 2


def test_a_consumer_that_hangs_is_given_up_and_not_called_while_it_does(
    serve: Callable[..., FaultServer], opened: threading.Event
) -> None:
    server, clearer, told, others = serve(whole(DONE)), StepClearer(timeout_s=1.0), [], []

    def hangs(shard_ids: list[Any]) -> None:
        told.append(shard_ids)
        opened.wait(60)

    report = end_step(handles(server.address, "a"), hangs, others.extend, clearer=clearer)
    assert (str(report.failures[0].error), others) == ("no answer within 1 s", ["a"])
    for shard_id in "bc":  # each call would leave another thread
        report = end_step(handles(server.address, shard_id), hangs, others.extend, clearer=clearer)
        assert "has not returned from an earlier clear" in str(report.failures[0].error)
    assert (told, others, clearer.num_given_up, clearer.num_owed) == ([["a"]], ["a", "b", "c"], 2, 1)
    opened.set()
    while any(thread.name == "areal-clear" for thread in threading.enumerate()):
        opened.wait()
    assert end_step(handles(server.address, "d"), hangs, clearer=clearer).is_complete
    assert told[1:] == [["d", "c"]]


def test_an_answer_that_never_comes_is_given_up(serve: Callable[..., FaultServer]) -> None:
    server, cancelled = serve(whole(DONE)), []

    async def hangs(shard_ids: list[Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(shard_ids)

    report = end_step(handles(server.address, "a"), hangs, clearer=StepClearer(timeout_s=0.5))
    assert str(report.failures[0].error) == "no answer within 0.5 s"
    assert cancelled == [["a"]]


def test_a_time_out_of_the_consumers_own_is_quoted(serve: Callable[..., FaultServer]) -> None:
    def impatient(shard_ids: list[Any]) -> None:
        raise TimeoutError("its own")

    report = end_step(handles(serve(whole(DONE)).address, "a"), impatient)
    assert str(report.failures[0].error) == "its own"


def test_any_exception_of_a_consumer_is_a_failure(serve: Callable[..., FaultServer]) -> None:
    address = serve(whole(DONE)).address
    for error in (StopIteration("x"), SystemExit(3), KeyboardInterrupt()):

        def raising(shard_ids: list[Any], error: BaseException = error) -> None:
            raise error

        report = end_step(handles(address, "a"), raising, clearer=StepClearer())
        assert not report.is_complete, error


def test_a_clear_that_is_cancelled_is_made_up_for_by_the_next(opened: threading.Event) -> None:
    told: list[tuple[str, list[Any]]] = []
    clearer = StepClearer()

    async def scenario() -> ClearReport:
        is_under_way = asyncio.Event()

        async def mute(node_addr: str, shard_ids: list[Any]) -> None:
            is_under_way.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(clearer.clear({"a:1": [SizedId("x", 5)]}, mute, []))
        await is_under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clearer.num_owed == 1

        async def clear_node(node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
            told.append((node_addr, shard_ids))
            return {}

        return await clearer.clear({"b:1": [SizedId("y", 5)]}, clear_node)

    assert asyncio.run(scenario()).is_complete
    assert sorted(told) == [("a:1", ["x"]), ("b:1", ["y"])]


def test_one_of_two_clears_at_once_takes_the_owed_shards() -> None:
    told: list[list[Any]] = []
    clearer = StepClearer()

    async def scenario() -> None:
        async def dead(node_addr: str, shard_ids: list[Any]) -> None:
            raise FetchError("dead")

        await clearer.clear({"a:1": [SizedId("x", 5)]}, dead)

        async def alive(node_addr: str, shard_ids: list[Any]) -> dict[str, Any]:
            told.append(shard_ids)
            await asyncio.sleep(0)
            return {}

        await asyncio.gather(*(clearer.clear({"a:1": [SizedId(name)]}, alive) for name in "yz"))

    asyncio.run(scenario())
    assert sorted(shard_id for owned in told for shard_id in owned) == ["x", "y", "z"]


def test_controllers_may_have_a_clearer_each(serve: Callable[..., FaultServer]) -> None:
    server, own = serve(*[hanging_up] * 3, whole(DONE)), StepClearer()
    end_step(handles(server.address, "a"), clearer=own)
    assert (own.num_owed, runtime.current().clearer.num_owed) == (1, 0)
    assert end_step(handles(server.address, "b")).num_retried == 0
    assert server.wanted[-1] == ["b"]


def test_a_process_ends_although_a_consumer_hangs() -> None:
    program = """
import asyncio, threading
from gpu_cache.rpc.clearing import SizedId, StepClearer

async def clear_node(node_addr, shard_ids):
    return {}

clear = StepClearer(timeout_s=0.2).clear({"a:1": [SizedId("x")]}, clear_node, [lambda ids: threading.Event().wait()])
print(asyncio.run(clear).failures[0].error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "no answer within 0.2 s\n"), done.stderr
