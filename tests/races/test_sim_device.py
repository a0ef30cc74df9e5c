from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_cache.device.protocol import Arena, Device, Pinned
from tests.support.sim_clock import GRANULE, POISON, join
from tests.support.sim_device import SimDevice
from tests.support.sim_observer import WatchedLock
from tests.support.sim_program import few_objects
from tests.support.sim_streams import SimStream
from tests.support.threads import run_threads

NBYTES = 4 * GRANULE
SEEDS = range(20)
ONES = np.ones(NBYTES, dtype=np.uint8)


class Bench:
    """A device with one arena, one slot full of ones, a copy stream and two consumers."""

    def __init__(self, seed: int) -> None:
        self.device = SimDevice(seed)
        self.arena: Arena = self.device.arena(NBYTES)
        self.slot: Pinned = self.device.pinned(NBYTES)
        self.copies: SimStream = self.device.new_stream()
        self.reader, self.other = self.device.pooled[:2]
        self.slot.tensor.fill_(1)

    def copy(self) -> None:
        self.device.copy_all([(self.arena.tensor, self.slot.tensor)], self.copies)

    def read(self, stream: SimStream | None = None) -> None:
        self.device.kernel(stream or self.reader, self.arena.tensor, ONES)

    def finish(self) -> list[str]:
        self.device.finish()
        return self.device.faults


@pytest.fixture(params=range(6))
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_it_is_a_device() -> None:
    device: Device = SimDevice()
    assert [name for name in vars(Device) if not name.startswith("_") and not hasattr(device, name)] == []
    assert len(device.fence_streams()) == 4
    assert device.new_stream() not in device.fence_streams(), "the copy stream is the cache's to fence"


def test_clocks_join_to_the_later_of_each_actor() -> None:
    known = {"a": 3, "b": 1}
    join(known, {"b": 2, "c": 5, "a": 1})
    assert known == {"a": 3, "b": 2, "c": 5}


def test_memory_starts_as_poison(bench: Bench) -> None:
    assert bool((bench.arena.tensor == POISON).all())
    assert bool((bench.device.pinned(10).tensor == POISON).all())


def test_a_kernel_that_waits_for_nothing_races_with_the_copy(bench: Bench) -> None:
    bench.copy()
    bench.read()
    assert any("race" in fault for fault in bench.finish()), "in whichever order the two ran"


def test_a_wait_on_the_stream_orders_a_kernel(bench: Bench) -> None:
    bench.copy()
    bench.device.wait(bench.reader, bench.device.record(bench.copies))
    bench.read()
    assert bench.finish() == []


def test_a_wait_on_one_stream_does_nothing_for_another(bench: Bench) -> None:
    bench.copy()
    bench.device.wait(bench.reader, bench.device.record(bench.copies))
    bench.read(bench.other)
    assert any("race" in fault for fault in bench.finish())


def test_order_passes_on_from_stream_to_stream(bench: Bench) -> None:
    bench.copy()
    bench.device.wait(bench.reader, bench.device.record(bench.copies))
    bench.device.wait(bench.other, bench.device.record(bench.reader))
    bench.read(bench.other)
    assert bench.finish() == []


def test_an_event_recorded_before_the_copy_orders_nothing(bench: Bench) -> None:
    event = bench.device.record(bench.copies)
    bench.copy()
    bench.device.wait(bench.reader, event)
    bench.read()
    assert any("race" in fault for fault in bench.finish())


def test_work_that_the_host_saw_done_is_done_for_every_stream(bench: Bench) -> None:
    bench.copy()
    bench.device.synchronize(bench.device.record(bench.copies))
    bench.read()
    bench.read(bench.other)
    assert bench.finish() == []


def test_a_query_orders_once_it_says_yes(bench: Bench) -> None:
    bench.copy()
    event = bench.device.record(bench.copies)
    while not bench.device.query(event):
        pass
    bench.read()
    assert bench.finish() == []


def test_a_query_may_say_no_for_long() -> None:
    def patience(seed: int) -> int:
        bench = Bench(seed)
        bench.copy()
        event = bench.device.record(bench.copies)
        return next(tries for tries in range(10_000) if bench.device.query(event))

    assert {patience(seed) == 0 for seed in SEEDS} == {True, False}


def test_a_copy_reads_its_source_when_it_runs() -> None:
    found = set()
    for seed in SEEDS:
        bench = Bench(seed)
        bench.copy()
        bench.slot.tensor.fill_(2)
        bench.device.finish()
        found.add(int(bench.arena.tensor[0]))
    assert found == {1, 2}


def test_refilling_a_slot_under_its_copy_is_a_race(bench: Bench) -> None:
    bench.copy()
    bench.device.host_write(bench.slot.tensor, "a refill")
    assert any("race" in fault and "slot" in fault for fault in bench.finish())


def test_refilling_a_slot_after_its_copy_is_none(bench: Bench) -> None:
    bench.copy()
    bench.device.synchronize(bench.device.record(bench.copies))
    bench.device.host_write(bench.slot.tensor, "a refill")
    assert bench.finish() == []


def test_reuse_is_a_race_until_the_readers_stream_was_waited_for(bench: Bench) -> None:
    bench.copy()
    bench.device.synchronize(bench.device.record(bench.copies))
    bench.read()
    bench.device.synchronize(bench.device.record(bench.other))
    bench.device.host_write(bench.arena.tensor, "the give-back")
    assert any("race" in fault for fault in bench.finish())


def test_reuse_after_the_readers_event_is_none(bench: Bench) -> None:
    bench.copy()
    bench.device.synchronize(bench.device.record(bench.copies))
    bench.read()
    bench.device.synchronize(bench.device.record(bench.reader))
    bench.device.host_write(bench.arena.tensor, "the give-back")
    bench.device.release_arena(bench.arena)
    assert bench.finish() == []


def test_two_readers_do_not_race_and_neighbours_do_not_either(bench: Bench) -> None:
    tensor = bench.arena.tensor
    poison = np.full(GRANULE, POISON, dtype=np.uint8)
    bench.device.kernel(bench.reader, tensor[:GRANULE], poison)
    bench.device.kernel(bench.other, tensor[:GRANULE], poison)
    bench.device.copy_all([(tensor[GRANULE:], bench.slot.tensor[GRANULE:])], bench.copies)
    assert bench.finish() == []


def test_wrong_bytes_are_told_even_where_the_order_is_right(bench: Bench) -> None:
    bench.device.kernel(bench.reader, bench.arena.tensor, ONES, "the reader")
    assert [fault.split(":")[0] for fault in bench.finish()] == ["wrong bytes"]


def test_released_memory_is_not_for_use(bench: Bench) -> None:
    tensor = bench.arena.tensor
    bench.device.release_arena(bench.arena)
    bench.device.kernel(bench.reader, tensor, np.full(NBYTES, POISON, dtype=np.uint8))
    assert any("use after release" in fault for fault in bench.finish())
    assert torch.numel(bench.arena.tensor) == 0


def test_waiting_runs_no_more_than_it_must() -> None:
    left = set()
    for seed in SEEDS:
        bench = Bench(seed)
        bench.copy()
        event = bench.device.record(bench.copies)
        bench.device.wait(bench.reader, event)
        crossing = bench.device.record(bench.reader)
        for _ in range(5):
            bench.copy()
        bench.device.synchronize(crossing)
        left.add(len(bench.copies.queue))
    assert max(left) == 5


def test_the_current_stream_is_each_threads_own() -> None:
    device = SimDevice()
    with device.stream(device.pooled[2]):
        assert device.current_stream() is device.pooled[2]
        seen: list[SimStream] = []
        run_threads([lambda: seen.append(device.current_stream())])
    assert seen == [device.pooled[0]] == [device.current_stream()]


def test_equal_seeds_run_equally() -> None:
    def story(seed: int) -> list[str]:
        bench = Bench(seed)
        for _ in range(10):
            bench.copy()
            bench.read()
            bench.read(bench.other)
        return bench.finish()

    assert story(7) == story(7)
    assert len({tuple(story(seed)) for seed in SEEDS}) > 5


def test_threads_may_call_it_at_once() -> None:
    bench = Bench(3)

    def work() -> None:
        stream = bench.device.new_stream()
        arena = bench.device.arena(NBYTES)
        for _ in range(50):
            bench.device.copy_all([(arena.tensor, bench.slot.tensor)], stream)
            bench.device.kernel(stream, arena.tensor, ONES)
            bench.device.synchronize(bench.device.record(stream))

    run_threads([work] * 4)
    assert bench.finish() == []


@pytest.mark.parametrize(
    ("what", "error"), [("arena", torch.OutOfMemoryError), ("slot", OSError), ("copy", RuntimeError)]
)
def test_it_refuses_as_often_as_it_is_told(bench: Bench, what: str, error: type[Exception]) -> None:
    calls = {"arena": lambda: bench.device.arena(512), "slot": lambda: bench.device.pinned(512), "copy": bench.copy}
    arena_bytes = bench.device.arena_bytes
    bench.device.refuse(what, 2)
    for _ in range(2):
        with pytest.raises(error, match=what):
            calls[what]()
    assert (bench.device.num_refused, bench.device.arena_bytes) == (2, arena_bytes)
    calls[what]()
    assert bench.finish() == []


def test_a_captured_stream_is_not_for_use_nor_is_any_to_its_thread(bench: Bench) -> None:
    event = bench.device.record(bench.other)
    bench.device.captured = bench.reader
    assert bench.device.is_any_capturing([bench.reader])
    assert not bench.device.is_any_capturing([bench.other])
    bench.device.record(bench.other)
    assert bench.device.is_capturing(), "the reader is the default stream, and so the current one"
    with bench.device.stream(bench.other):
        bench.device.query(event)
        num_faults = len(bench.device.faults)
        bench.device.record(bench.reader)
    assert "use under capture" in bench.device.faults[0]
    assert (num_faults, len(bench.device.faults)) == (1, 2)


def test_an_adversary_without_a_seed_runs_only_awaited_work(bench: Bench) -> None:
    bench.device.adversary.begin()
    bench.copy()
    event = bench.device.record(bench.copies)
    assert not any(bench.device.query(event) for _ in range(100))
    bench.device.synchronize(event)
    assert bench.device.query(event)


def test_garbage_is_collected_at_the_moment_of_choice_inside_a_critical_section(bench: Bench) -> None:
    class Node:
        def __del__(self) -> None:
            died_inside.append(lock._lock.locked())

    died_inside: list[bool] = []
    lock = WatchedLock(bench.device.adversary.moment)
    with few_objects():
        cycle = Node()
        cycle.itself = cycle  # type: ignore[attr-defined]
        del cycle
        bench.device.adversary.begin(collect_at=2)
        with lock:
            assert died_inside == []
    assert died_inside == [True]
