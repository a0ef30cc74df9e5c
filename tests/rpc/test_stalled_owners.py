"""Owners that stop sending keep nothing from the readers of others: neither a place in the budget nor a buffer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gpu_cache import CacheConfig, FetchTimeoutError, TensorCache, TransferError
from gpu_cache.device.host import HostDevice
from gpu_cache.rpc import runtime
from gpu_cache.rpc.rtensor import RTensor
from gpu_cache.transfer import inflight
from gpu_cache.transfer.inflight import InflightBudget, Stalls, Turn
from gpu_cache.transfer.staging import StagingRing
from tests.support.areal_fixtures import fault_servers, remote
from tests.support.fault_server import Exchange, frame, frames_of, reply, whole
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import eventually

LONG_S = 60.0
NUM_STALLED = 16
# Of 2 windows of 256 KiB where it is received straight into the pool, of 8 buffers of 64 KiB where it is staged.
LARGE = torch.arange(1 << 16)
SMALL = torch.ones(1000)


@pytest.fixture(params=["into the pool", "through staging"])
def cache(request: pytest.FixtureRequest) -> TensorCache:
    """As many windows as there are stalled owners use up the budget; half of them use up the staging buffers."""
    config = CacheConfig(
        device="cpu", staging_slots=8, staging_slot_bytes="64KiB", run_bytes="64KiB", fetch_timeout_s=600,
        max_inflight_bytes=NUM_STALLED * (256 << 10),
    )  # fmt: skip
    current = runtime.configure(config)
    if request.param == "through staging":
        current.cache = TensorCache(config, device=HostDevice(stages=True))
    return current.cache


def beginning(every_s: float | None) -> Callable[[Exchange], None]:
    """Send the headers and some of the body, and then a byte now and then, or nothing."""

    def step(exchange: Exchange) -> None:
        answer = reply(frame({exchange.asked.shard_ids[0]: LARGE}))
        exchange.send(answer[:20_000])
        for position in range(20_000, len(answer)):
            exchange.wait(every_s)
            exchange.send(answer[position : position + 1])

    return step


@contextlib.contextmanager
def stalled_owners(cache: TensorCache, every_s: float | None) -> Iterator[list[Future[int]]]:
    """Fetches from owners that begin to send and then send too little."""
    with fault_servers() as serve:
        servers = [serve(beginning(every_s)) for _ in range(NUM_STALLED)]
        handles = [[remote(server.address, f"large-{server.port}", LARGE)] for server in servers]
        yield [RTensor.prefetch(one) for one in handles]
        cache.close()


@pytest.mark.parametrize("every_s", [None, 0.01], ids=["silent", "dripping"])
def test_sixteen_stalled_owners_leave_a_healthy_one_its_turn(cache: TensorCache, every_s: float | None) -> None:
    with fault_servers() as serve, stalled_owners(cache, every_s) as fetches:
        healthy = serve(whole(frames_of({"small": SMALL})))
        assert cache._engine is not None
        budget = cache._engine.transfer.inflight
        eventually(lambda: len(budget._held) == NUM_STALLED)
        (found,) = RTensor.localize([remote(healthy.address, "small", SMALL)], timeout_s=LONG_S)
        assert torch.equal(found, SMALL)
        assert not any(fetch.done() for fetch in fetches), "they go on waiting for theirs"


class Counter:
    """A reader's bytes and the time, both as a test says."""

    def __init__(self) -> None:
        self.now, self.received = 0.0, 0
        self.turn = Turn("n:1", lambda: self.received)
        self.stalls = Stalls(lambda: self.now)

    def is_stalled(self, at: float, received: int) -> bool:
        self.now, self.received = at, received
        return self.turn in self.stalls.look({self.turn: 0.0})


def test_a_reader_is_stalled_when_no_bytes_came_for_a_second_since_it_was_first_looked_at() -> None:
    counter = Counter()
    looks = [(5.0, 100, False), (5.9, 100, False), (6.1, 100, True), (6.2, 1 << 20, False), (7.1, 1 << 20, False),
             (7.3, 1 << 20, True)]  # fmt: skip
    for at, received, is_stalled in looks:
        assert counter.is_stalled(at, received) == is_stalled, at


def test_a_few_bytes_are_no_progress() -> None:
    counter = Counter()
    assert [counter.is_stalled(second / 2, 100 * second) for second in range(5)] == [False, False, True, True, True]


def test_a_new_connection_counts_from_zero() -> None:
    counter = Counter()
    assert not counter.is_stalled(0.0, 1 << 30)
    assert not counter.is_stalled(0.9, 1 << 20)
    assert not counter.is_stalled(1.8, 1 << 20)


def test_a_reader_that_cannot_tell_is_stalled_after_a_second() -> None:
    turn, stalls = Turn("n:1"), Stalls(lambda: 100.0)
    assert stalls.look({turn: 99.5}) == set()
    assert stalls.look({turn: 98.5}) == {turn}


def test_no_turn_is_kept_alive() -> None:
    counter = Counter()
    counter.is_stalled(0.0, 1)
    counter.turn = Turn("n:2")
    assert len(counter.stalls._marks) == 0


class Holder:
    """A reader that asks for bytes of a budget, and holds them until it is told to let go."""

    def __init__(self, budget: InflightBudget, node: str, nbytes: int, *, is_stalled: bool = False) -> None:
        self.has_it, self._let_go = threading.Event(), threading.Event()
        self.is_stalled, self._received = is_stalled, 0
        self.turn = Turn(node, self._num_received)
        self.done: Future[Any] = in_background(lambda: self._hold(budget, nbytes))
        eventually(lambda: self.has_it.is_set() or self.turn in budget._queue)

    def _hold(self, budget: InflightBudget, nbytes: int) -> None:
        with budget.granted(nbytes, self.turn, time.monotonic() + LONG_S):
            self.has_it.set()
            assert self._let_go.wait(LONG_S)

    def _num_received(self) -> int:
        """Many more at each look, unless it is stalled."""
        self._received += 0 if self.is_stalled else 1 << 30
        return self._received

    def let_go(self) -> None:
        self._let_go.set()
        self.done.result(LONG_S)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "LOOK_S", 0.005)
    monkeypatch.setattr(inflight, "_STALLED_S", 0.05)


@pytest.mark.usefixtures("soon")
def test_bytes_of_a_stalled_reader_count_for_its_own_node_only() -> None:
    budget = InflightBudget(10)
    stalled = Holder(budget, "a:1", 10, is_stalled=True)
    same, other = Holder(budget, "a:1", 1), Holder(budget, "b:1", 10)
    assert other.has_it.wait(LONG_S)
    assert not same.has_it.is_set()
    assert budget.stats()["inflight_bytes"] == 20, "it says what is on its way"
    for holder in (stalled, other, same):
        holder.let_go()
    assert budget.stats()["inflight_bytes"] == 0


@pytest.mark.usefixtures("soon")
def test_a_time_out_names_the_node_whose_bytes_do_not_come() -> None:
    budget = InflightBudget(10)
    stalled = Holder(budget, "a:1", 10, is_stalled=True)
    late = time.monotonic() + 0.5
    told = "10 of at most 10 were being received, and next to nothing came from a:1; raise max_inflight_bytes"
    with pytest.raises(FetchTimeoutError, match=told), budget.granted(1, Turn("a:1"), late):
        pass
    stalled.let_go()


@pytest.mark.usefixtures("soon")
def test_a_reader_that_goes_on_counts_again() -> None:
    budget = InflightBudget(10)
    first = Holder(budget, "a:1", 10, is_stalled=True)
    second = Holder(budget, "b:1", 10)
    assert second.has_it.wait(LONG_S)
    first.is_stalled = False
    third = Holder(budget, "c:1", 1)
    eventually(lambda: not budget._stalled)
    assert not third.has_it.is_set()
    for holder in (first, second, third):
        holder.let_go()


def test_a_node_that_holds_less_goes_first_however_many_of_another_wait() -> None:
    budget = InflightBudget(10)
    first, second, *more = [Holder(budget, "a:1", 5) for _ in range(5)]
    late = Holder(budget, "b:1", 5)
    assert not late.has_it.is_set()
    first.let_go()
    assert late.has_it.wait(LONG_S)
    assert not any(holder.has_it.is_set() for holder in more)
    for holder in (second, late, *more):
        holder.let_go()


@pytest.mark.usefixtures("soon")
def test_a_buffer_that_a_stalled_reader_holds_is_made_up_for_until_it_comes_back() -> None:
    ring = StagingRing(HostDevice(stages=True), CacheConfig(staging_slots=1, staging_slot_bytes="4KiB", run_bytes=512))
    stalled = ring.acquire(LONG_S, Turn("a:1"))
    time.sleep(0.06)
    other = ring.acquire(LONG_S, Turn("b:1"))
    with pytest.raises(TransferError, match="no staging buffer came free"):
        ring.acquire(0.02, Turn("b:1"))
    ring.release(other)
    assert ring.acquire(LONG_S, Turn("b:1")) is other, "kept as long as it is needed"
    ring.release(other)
    ring.release(stalled)
    assert ring.stats()["pinned_capacity_bytes"] == 4096
    ring.close()
