"""The budget of bytes on their way: who waits for whom, and that nothing of it is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gpu_cache import CacheClosedError, CacheConfig, FetchError, FetchTimeoutError, ShardReader, ShardSpec, TensorCache
from gpu_cache.device.host import HostDevice
from gpu_cache.pool.slab import SlabPool
from gpu_cache.transfer import inflight
from gpu_cache.transfer.fetch import ReaderTask
from gpu_cache.transfer.inflight import InflightBudget, Turn
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, gated
from tests.support.threads import run_threads

LONG_S = 60.0


@pytest.fixture(autouse=True)
def no_owner_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a test takes: its readers cannot tell what they received."""
    monkeypatch.setattr(inflight, "_STALLED_S", 1000.0)


class Holder:
    """A thread that asks for bytes, and holds them until a test lets it go."""

    def __init__(self, budget: InflightBudget, nbytes: int, timeout_s: float = LONG_S) -> None:
        self.turn, self.has_it = Turn("n:1"), threading.Event()
        self._let_go = threading.Event()
        waiting = len(budget._queue)
        self.done: Future[Any] = in_background(lambda: self._hold(budget, nbytes, time.monotonic() + timeout_s))
        eventually(lambda: self.has_it.is_set() or self.done.done() or len(budget._queue) > waiting)

    def _hold(self, budget: InflightBudget, nbytes: int, deadline: float) -> None:
        with budget.granted(nbytes, self.turn, deadline):
            self.has_it.set()
            assert self._let_go.wait(LONG_S)

    def let_go(self) -> None:
        self._let_go.set()
        self.done.result(LONG_S)


def has_it(*holders: Holder) -> list[bool]:
    return [holder.has_it.is_set() for holder in holders]


def test_a_reader_that_fits_beside_the_others_does_not_wait() -> None:
    budget = InflightBudget(10)
    holders = [Holder(budget, nbytes) for nbytes in (4, 3, 3)]
    assert all(holder.has_it.wait(LONG_S) for holder in holders)
    assert budget.stats()["inflight_bytes"] == 10
    for holder in holders:
        holder.let_go()
    assert budget.stats()["inflight_bytes"] == 0


def test_a_reader_whose_node_cannot_be_counted_leaves_the_queue() -> None:
    budget = InflightBudget(10)
    holder = Holder(budget, 4)
    assert holder.has_it.wait(LONG_S)
    with pytest.raises(TypeError, match="unhashable"), budget.granted(1, Turn([]), time.monotonic()):  # type: ignore[arg-type]
        pass
    assert repr(budget) == "InflightBudget(4 of 10 bytes, 0 waiting)"
    holder.let_go()


def test_no_reader_overtakes_one_that_waits() -> None:
    budget = InflightBudget(10)
    first, large, small = Holder(budget, 6), Holder(budget, 10), Holder(budget, 2)
    assert has_it(first, large, small) == [True, False, False], "the small one would fit"
    first.let_go()
    assert large.has_it.wait(LONG_S)
    assert has_it(small) == [False]
    large.let_go()
    assert small.has_it.wait(LONG_S)
    small.let_go()
    assert budget.stats()["inflight_wait_seconds"] > 0


def test_one_release_may_serve_several_waiters() -> None:
    budget = InflightBudget(10)
    first, *others = [Holder(budget, nbytes) for nbytes in (10, 3, 3, 3, 3)]
    assert not any(has_it(*others))
    first.let_go()
    eventually(lambda: has_it(*others) == [True, True, True, False])
    for holder in others:
        holder.let_go()


def test_a_request_larger_than_the_budget_is_granted_alone() -> None:
    budget = InflightBudget(10)
    first, huge, after = Holder(budget, 1), Holder(budget, 1000), Holder(budget, 1)
    assert has_it(huge, after) == [False, False]
    first.let_go()
    assert huge.has_it.wait(LONG_S)
    assert has_it(after) == [False]
    huge.let_go()
    after.let_go()


def test_a_waiter_that_gives_up_says_so_in_numbers_and_lets_the_next_one_by() -> None:
    budget = InflightBudget(10)
    first, late, after = Holder(budget, 6), Holder(budget, 1000, timeout_s=0.1), Holder(budget, 4)
    error = late.done.exception(LONG_S)
    assert isinstance(error, FetchTimeoutError)
    assert "1,000 bytes waited" in str(error)
    assert "6 of at most 10 were being received" in str(error)
    assert "n:1" in str(error)
    assert "GPU_CACHE_MAX_INFLIGHT_BYTES" in str(error)
    assert after.has_it.wait(LONG_S)
    first.let_go()
    after.let_go()


def test_an_abandoned_waiter_leaves_the_queue() -> None:
    budget = InflightBudget(10)
    first, given_up, after = Holder(budget, 6), Holder(budget, 5), Holder(budget, 4)
    given_up.turn.is_given_up = True
    budget.wake()
    assert "given up" in str(given_up.done.exception(LONG_S))
    assert after.has_it.wait(LONG_S)
    first.let_go()
    after.let_go()


def test_closing_ends_every_wait() -> None:
    budget = InflightBudget(10)
    first, *others = [Holder(budget, 10) for _ in range(3)]
    budget.close()
    assert all(isinstance(holder.done.exception(LONG_S), CacheClosedError) for holder in others)
    first.let_go()
    with pytest.raises(CacheClosedError), budget.granted(1, Turn("n:1"), time.monotonic() + LONG_S):
        pass
    assert "0 of 10 bytes, 0 waiting" in repr(budget)


def test_threads_never_hold_more_than_the_budget() -> None:
    budget, held, most = InflightBudget(100), [0], [0]
    lock = threading.Lock()

    def work(seed: int) -> None:
        for number in range(60):
            nbytes = (seed * 31 + number * 17) % 60 + 1
            with budget.granted(nbytes, Turn("n:1"), time.monotonic() + LONG_S):
                with lock:
                    held[0] += nbytes
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= nbytes

    run_threads([lambda seed=seed: work(seed) for seed in range(8)])  # type: ignore[misc]
    assert 0 < most[0] <= 100
    assert budget.stats()["inflight_bytes"] == 0


# Settings of a cache: a window is 64 KiB, and one window may be on its way.
CONFIG = CacheConfig(
    slab_bytes="4MiB", pool_bytes="16MiB", staging_slots=4, staging_slot_bytes="64KiB", run_bytes="64KiB",
    max_inflight_bytes="64KiB",
)  # fmt: skip
LARGE: Mapping[Hashable, torch.Tensor] = {"large": torch.arange(1 << 20) % 251}  # 8 MiB: 128 windows
SMALL: Mapping[Hashable, torch.Tensor] = {f"s{number}": torch.full((500,), number) for number in range(3)}


@pytest.fixture
def cache() -> TensorCache:
    return TensorCache(CONFIG, device=HostDevice(stages=True))


class Logged:
    """A source whose readers note each read."""

    def __init__(self, inner: DictSource, log: list[str]) -> None:
        self._inner, self._log = inner, log

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        for reader in self._inner.open(keys, timeout_s):
            yield self._noting(reader)

    def _noting(self, reader: ShardReader) -> ShardReader:
        read_into = reader.read_into

        def noted(buffers: Sequence[memoryview]) -> None:
            self._log.append(reader.node)
            read_into(buffers)

        reader.read_into = noted  # type: ignore[method-assign]
        return reader


def waiting(cache: TensorCache) -> int:
    assert cache._engine is not None
    return len(cache._engine.transfer.inflight._queue)


def test_a_small_request_beside_a_large_one_waits_for_one_window_of_it(cache: TensorCache) -> None:
    log: list[str] = []
    large, small = DictSource(LARGE, "large:1"), DictSource(SMALL, "small:1")
    (readers, got) = gated(large, gate_after=2), []
    fetching = in_background(lambda: got.extend(cache.get_many(["large"], Logged(large, log))))
    eventually(lambda: readers and readers[0].has_arrived.is_set())
    small_fetch = in_background(lambda: got.extend(cache.get_many(list(SMALL), Logged(small, log))))
    eventually(lambda: waiting(cache) == 1)
    assert cache._engine is not None
    assert cache._engine.pool.accounts()["pending"] == 8 << 20, "no room is taken for what has yet to wait"
    readers[0].gate.set()
    fetching.result(LONG_S)
    small_fetch.result(LONG_S)
    assert log[3] == "small:1", "right behind the window that was under way"
    assert log.count("large:1") == 128
    assert all(torch.equal(tensor, (LARGE | SMALL)[key]) for key, tensor in zip(["large"], got[-1:], strict=True))
    stats = cache.buffer_stats()
    assert stats["inflight_bytes"] == 0
    assert stats["inflight_wait_seconds"] > 0


@contextlib.contextmanager
def one_that_holds_all(cache: TensorCache) -> Iterator[Callable[[], None]]:
    """A fetch that holds the whole budget until it is let go."""
    source = DictSource(LARGE, "large:1")
    readers = gated(source)
    holding = in_background(lambda: cache.get_many(["large"], source))
    eventually(lambda: readers and readers[0].has_arrived.is_set())

    def let_go() -> None:
        readers[0].gate.set()
        with contextlib.suppress(FetchError, CacheClosedError):
            holding.result(LONG_S)

    yield let_go
    let_go()


def test_a_waiter_gives_up_in_time_and_leaves_nothing(cache: TensorCache) -> None:
    with one_that_holds_all(cache) as let_go:
        with pytest.raises(FetchError) as caught:
            cache.get_many(list(SMALL), DictSource(SMALL), timeout_s=0.1)
        assert all(isinstance(error, FetchTimeoutError) for error in caught.value.failures.values())
        eventually(lambda: waiting(cache) == 0)
        eventually(lambda: len(cache._tasks) == 1)
        let_go()
        assert torch.equal(cache.get_many(["s2"], DictSource(SMALL))[0], SMALL["s2"])


def test_closing_ends_the_wait_for_a_turn(cache: TensorCache) -> None:
    with one_that_holds_all(cache) as let_go:
        small = in_background(lambda: cache.get_many(list(SMALL), DictSource(SMALL)))
        eventually(lambda: waiting(cache) == 1)
        closing = in_background(cache.close)
        assert isinstance(small.exception(LONG_S), CacheClosedError)
        eventually(lambda: waiting(cache) == 0)
        assert not closing.done(), "it waits for the read that is under way, not for who had not begun"
        let_go()
        closing.result(LONG_S)


class Broken:
    """A reader of one shard of 64 KiB that fails at its read, or whose bytes no caller wants."""

    node, keys, failures = "broken:1", ("s9",), dict[Hashable, Exception]()

    def __init__(self, error: BaseException | None) -> None:
        self._error, self._parts = error, [[ShardSpec("s9", torch.uint8, (1 << 16,))]]

    def next_specs(self) -> Sequence[ShardSpec] | None:
        return self._parts.pop() if self._parts else None

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


class Only:
    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        return [self._reader]


def failing(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("injected")


FAILURES: dict[str, tuple[BaseException | None, Any, str]] = {
    "the read": (ConnectionResetError("injected"), None, ""),
    "the room": (None, SlabPool, "take"),
    "the tensors": (None, SlabPool, "carve"),
    "the landing": (None, ReaderTask, "land"),
    "an interrupt": (KeyboardInterrupt("injected"), None, ""),
}


@pytest.mark.parametrize(("error", "owner", "name"), FAILURES.values(), ids=FAILURES)
def test_no_failure_keeps_bytes_of_the_budget(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, owner: Any, name: str
) -> None:
    with monkeypatch.context() as patched:
        if owner is not None:
            patched.setattr(owner, name, failing)
        with pytest.raises(FetchError, match="injected"):
            cache.get_many(["s9"], Only(Broken(error)))
    assert cache.buffer_stats()["inflight_bytes"] == 0
    assert torch.equal(cache.get_many(["large"], DictSource(LARGE))[0], LARGE["large"])
