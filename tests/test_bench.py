"""The benchmark's rounds and rows, the thread beside, allocations. No test asserts how fast anything is."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parents[1] / "scripts"))

from bench.allocations import Allocated, AllocationWatch
from bench.beside import Beside, busy_python, busy_torch
from bench.exactness import BenchError
from bench.meter import Cost
from bench.rounds import Course, Plan, rows, run_rounds

from tests.support.bench_rows import KEYS, STATS, a_meter, a_path, cost


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """Each measurement begins with a collection: let it not look at what other tests left."""
    gc.freeze()
    yield
    gc.unfreeze()


def row_of(course: Course, *others: Course) -> dict[str, Any]:
    return rows("W1", 10, [course, *others])[0]


# Rounds.


@pytest.mark.parametrize(
    ("plan", "ticks", "expected"),
    [
        (Plan(most=3, least=1, seconds=100), [0, 1, 2, 3], 3),
        (Plan(most=9, least=1, seconds=10), [0, 4, 8, 12], 2),  # a third would end at 12
        (Plan(most=9, least=3, seconds=1), [0, 50, 100, 150], 3),
        (Plan(most=9, least=1, seconds=1), [0, 50], 1),
    ],
)
def test_rounds_end_when_the_next_would_take_too_long(plan: Plan, ticks: list[int], expected: int) -> None:
    # The clock is asked when the rounds begin, and before each that is not one of the least.
    clock = iter([ticks[0], *ticks[plan.least :]])
    assert list(plan.rounds(lambda: next(clock, 1e9))) == list(range(expected))


def test_each_path_is_checked_once_and_timed_once_a_round_in_turn() -> None:
    calls: list[str] = []
    paths = [
        a_path(name, run=lambda _, name=name: calls.append(name), check=lambda _, name=name: calls.append(f"{name}?"))
        for name in ("raw", "json", "cold")
    ]
    courses = run_rounds(paths, Plan(2, 2, 0), a_meter(), lambda name: None)
    assert calls == ["raw", "raw?", "json", "json?", "cold", "cold?", "raw", "json", "cold", "json", "cold", "raw"]
    assert [len(course.costs) for course in courses] == [2, 2, 2]


def test_a_path_is_prepared_before_and_finished_after_each_run() -> None:
    calls: list[object] = []
    path = a_path(prepare=lambda: "prepared", run=calls.append, finish=lambda: calls.append("finished"))
    run_rounds([path], Plan(1, 1, 0), a_meter(), lambda name: None)
    assert calls == ["prepared", "finished"] * 2


def test_a_path_that_brings_wrong_bits_ends_the_run() -> None:
    def check(batch: object) -> None:
        raise BenchError(f"not {batch}")

    with pytest.raises(BenchError, match="not batch"):
        run_rounds([a_path(check=check)], Plan(1, 1, 0), a_meter(), lambda name: None)


# Rows.


def test_a_row_has_the_keys_of_the_issue_and_medians_scaled_to_the_workload() -> None:
    half = Course(a_path(nbytes=5, num_shards=1), 3, [cost(1), cost(4), cost(2)])
    found = row_of(half)
    assert found.keys() > KEYS
    assert (found["seconds"], found["seconds_min"], found["seconds_max"], found["num_rounds"]) == (4, 2, 8, 3)
    assert found["gb_per_s"] == pytest.approx(2.5e-9)
    assert found["us_per_shard"] == 2e6
    assert (found["cpu_s_per_gb_client"], found["cpu_s_per_gb_server"]) == (1 / 5e-9, 2 / 5e-9)
    assert (found["rss_growth_bytes"], found["measured_bytes"]) == (3, 5)


def test_ratios_compare_within_a_round() -> None:
    cold = Course(a_path(), 0, [cost(2), cost(20), cost(200)])
    raw = Course(a_path("raw"), 0, [cost(1), cost(10), cost(10)])
    json = Course(a_path("json"), 0, [cost(8), cost(80), cost(800)])
    found = row_of(cold, raw, json)
    assert (found["ratio_raw"], found["ratio_json"]) == (0.5, 4)
    assert (found["ratio_pinned"], found["ratio_upstream"]) == (None, None)


def test_what_means_nothing_is_none() -> None:
    clear = Course(a_path("clear", is_transfer=False, is_reading=False), 0, [cost(1)])
    found = row_of(clear, Course(a_path("raw"), 0, [cost(1)]))
    assert (found["gb_per_s"], found["ratio_raw"], found["lost_percent"], found["device_growth_bytes"]) == (None,) * 4


def test_first_and_later_reads_are_compared_with_upstreams_first_and_later_ones() -> None:
    others = [Course(a_path("upstream_cold"), 0, [cost(6)]), Course(a_path("upstream_second"), 0, [cost(4)])]
    assert row_of(Course(a_path(), 0, [cost(2)]), *others)["ratio_upstream"] == 3
    assert row_of(Course(a_path("warm", is_transfer=False), 0, [cost(2)]), *others)["ratio_upstream"] == 2


def test_allocations_are_added_up_and_memory_is_the_most_of_any_round() -> None:
    costs = [Cost(1, 1, 1, Allocated(count, growth)) for count, growth in [(2, 10), (0, 30), (1, 20)]]
    found = row_of(Course(a_path(), 0, costs))
    assert (found["num_allocations"], found["device_growth_bytes"]) == (3, 30)


# The thread beside.


@pytest.mark.parametrize("work", [busy_python, lambda: busy_torch("cpu")])
def test_the_thread_beside_goes_on_during_a_call_and_its_loss_is_in_the_row(work: Any) -> None:
    beside = work()
    made: list[int] = []

    def run(_: object) -> None:
        began = beside.look().num_steps
        while beside.look().num_steps == began:
            threading.Event().wait(0.001)
        made.append(beside.look().num_steps - began)

    (course,) = run_rounds([a_path(run=run, beside=beside)], Plan(1, 1, 0), a_meter(), lambda name: None)
    assert len(made) == 2
    assert min(made) > 0
    assert row_of(course)["lost_percent"] <= 100
    assert course.costs[0].client_cpu_s >= 0
    assert not any(thread.name == "bench-beside" for thread in threading.enumerate())


def test_a_step_that_fails_is_reported() -> None:
    steps = iter(range(1))
    with pytest.raises(BenchError, match="StopIteration"):
        a_meter().timed(lambda: None, Beside(lambda: next(steps)))


# Allocations.


class FakeAccelerator:
    """Says what torch.accelerator would."""

    def __init__(self) -> None:
        self.num_blocks, self.bytes, self.peak = 5, 1000, 4000

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        assert str(device) == "cuda:0"
        self.peak = self.bytes

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        return {
            "allocation.all.allocated": self.num_blocks,
            "allocated_bytes.all.current": self.bytes,
            "allocated_bytes.all.peak": self.peak,
        }


def test_blocks_of_the_device_and_its_peak_are_counted() -> None:
    fake = FakeAccelerator()
    watch = AllocationWatch(lambda: STATS, "cuda:0", fake)
    watch.begin()
    assert watch.end() == Allocated(0, 0)
    watch.begin()
    fake.num_blocks, fake.peak = 8, 1300
    assert watch.end() == Allocated(3, 300)


def test_a_pool_or_a_ring_that_grew_counts_on_every_device() -> None:
    stats = dict(STATS)
    watch = AllocationWatch(lambda: dict(stats), "cpu")
    watch.begin()
    stats["pinned_capacity_bytes"] += 1
    assert watch.end() == Allocated(1, None)
