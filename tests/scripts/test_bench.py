"""The benchmark's rounds and rows, the thread beside, memory traffic. No test asserts how fast anything is."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch

sys.path.insert(0, str(FilePath(__file__).resolve().parents[2] / "scripts"))

from bench.allocations import Allocated, AllocationWatch, MemoryTraffic
from bench.beside import PYTHON, TORCH, Beside
from bench.exactness import BenchError
from bench.meter import Cost
from bench.paths import Path, selected, variants
from bench.rounds import Course, Plan, rows, run_rounds, skipped_row

from gpu_cache.device.host import HostDevice
from tests.support.bench_rows import KEYS, a_meter, a_path, cost


def row_of(course: Course, *others: Course) -> dict[str, Any]:
    return rows("rollout", 10, [course, *others])[0]


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
        a_path(name, run=lambda _, name=name: calls.append(name), check=lambda name, _: calls.append(f"{name}?"))
        for name in ("raw", "json", "cold")
    ]
    courses = run_rounds(paths, Plan(2, 2, 0), a_meter(), lambda name: None)
    assert calls == ["raw", "raw?", "json", "json?", "cold", "cold?", "raw", "json", "cold", "json", "cold", "raw"]
    assert [len(course.costs) for course in courses] == [2, 2, 2]


def test_bytes_of_a_path_beside_a_thread_are_checked_in_the_first_round() -> None:
    calls: list[str] = []
    settings = {"run": lambda _: calls.append("run"), "check": lambda name, _: calls.append(name)}
    run_rounds(variants([a_path(**settings)], "cpu")[1:2], Plan(2, 2, 0), a_meter(), lambda name: None)
    assert calls == ["run", "cold+python", "run"]


def test_a_path_is_prepared_before_and_finished_after_each_run() -> None:
    calls: list[object] = []
    path = a_path(prepare=lambda: "prepared", run=calls.append, finish=lambda: calls.append("finished"))
    run_rounds([path], Plan(1, 1, 0), a_meter(), lambda name: None)
    assert calls == ["prepared", "finished"] * 2


def test_a_path_that_brings_wrong_bits_ends_the_run() -> None:
    def check(path: str, batch: object) -> None:
        raise BenchError(f"{path}: not {batch}")

    with pytest.raises(BenchError, match="cold: not batch"):
        run_rounds([a_path(check=check)], Plan(1, 1, 0), a_meter(), lambda name: None)


def test_a_path_that_cannot_run_is_left_out_and_its_row_says_why() -> None:
    path = Path.unavailable("areal/own_hits", "not here")
    assert variants([path], "cpu") == [path]
    assert run_rounds([path], Plan(1, 1, 0), a_meter(), lambda name: None) == []
    row = skipped_row("rollout", path)
    assert row.keys() == row_of(Course(a_path(), 0, [cost(1)])).keys()
    assert {key: value for key, value in row.items() if value is not None} == {
        "workload": "rollout", "path": "areal/own_hits", "skipped": "not here"
    }  # fmt: skip


def test_rows_are_chosen_by_pattern() -> None:
    paths = variants([a_path("defaults/cold"), a_path("tuned/cold")], "cpu")
    assert [path.name for path in selected(paths, ["defaults/*n", "tuned/cold"])] == [
        "defaults/cold+python", "tuned/cold"
    ]  # fmt: skip


# Rows.


def test_a_row_has_the_keys_of_the_issue_and_medians_scaled_to_the_workload() -> None:
    half = Course(a_path(nbytes=5, num_shards=1), 3, [cost(1), cost(4), cost(2)])
    found = row_of(half)
    assert found.keys() >= KEYS
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


def test_a_figure_without_meaning_is_none() -> None:
    clear = Course(a_path("clear", is_transfer=False, is_reading=False), 0, [cost(1)])
    found = row_of(clear, Course(a_path("raw"), 0, [cost(1)]))
    assert (found["gb_per_s"], found["ratio_raw"], found["lost_percent"], found["device_growth_bytes"]) == (None,) * 4


def test_first_and_later_reads_are_compared_with_upstreams_first_and_later_ones() -> None:
    others = [Course(a_path("upstream_cold"), 0, [cost(6)]), Course(a_path("upstream_second"), 0, [cost(4)])]
    assert row_of(Course(a_path(), 0, [cost(2)]), *others)["ratio_upstream"] == 3
    assert row_of(Course(a_path("warm", is_transfer=False), 0, [cost(2)]), *others)["ratio_upstream"] == 2


def test_allocations_are_added_up_and_memory_is_the_most_of_any_round() -> None:
    costs = [Cost(1, 1, 1, Allocated(*counted)) for counted in [(2, 10, 3, 5), (0, 30, 0, 9), (1, 20, 1, 7)]]
    found = row_of(Course(a_path(), 0, costs))
    assert (found["num_allocations"], found["device_growth_bytes"]) == (3, 30)
    assert (found["num_slabs"], found["page_faults"]) == (4, 7)


def test_a_busy_row_is_compared_with_the_quiet_one_of_the_same_round() -> None:
    quiet, python = (Course(path, 0, []) for path in variants([a_path("defaults/warm")], "cpu")[:2])
    quiet.costs += [cost(1), cost(10)]
    python.costs += [cost(4, lost=0.5, stall_s=0.002), cost(20, lost=0.7, stall_s=0.004)]
    found = row_of(python, quiet)
    assert (found["times_quiet"], found["lost_percent"], found["stall_ms"]) == (3, 60, 3)
    assert row_of(quiet, python)["times_quiet"] is None


def test_hits_are_compared_with_the_reference_beside_the_same_thread() -> None:
    names = ["defaults/hits+torch", "defaults/warm+torch", "areal/hits+torch", "areal/hits"]
    courses = [Course(a_path(name), 0, [cost(seconds)]) for name, seconds in zip(names, (6, 6, 3, 1), strict=True)]
    assert [row["times_reference"] for row in rows("rollout", 10, courses)] == [2, None, None, None]
    courses.append(Course(a_path("areal/own_hits+torch"), 0, [cost(12)]))
    assert [row["times_reference"] for row in rows("rollout", 10, courses)] == [0.5, None, None, None, 4]


# The thread beside.


@pytest.mark.parametrize("kind", [PYTHON, TORCH])
def test_the_thread_beside_goes_on_during_a_call_and_its_loss_is_in_the_row(kind: str) -> None:
    path = a_path(run=lambda _: time.sleep(0.2)).besides(kind, "cpu")
    (course,) = run_rounds([path], Plan(1, 1, 0), a_meter(), lambda name: None)
    found = row_of(course)
    assert found["lost_percent"] < 100, "it made no step"
    assert found["stall_ms"] < 200
    assert course.costs[0].client_cpu_s >= 0
    assert not any(thread.name == "bench-beside" for thread in threading.enumerate())


def test_a_gap_counts_from_where_the_span_begins_and_before_it_has_ended() -> None:
    goes_on, is_at_work = threading.Event(), threading.Event()
    steps = iter([lambda: None, is_at_work.set, goes_on.wait])  # type: ignore[var-annotated]
    with Beside(lambda: next(steps, lambda: None)()) as beside:
        is_at_work.wait()
        time.sleep(0.2)  # before the span
        span = beside.over(0.01)
        goes_on.set()
    assert 0.01 <= span.longest_s < 0.2
    assert span.rate == 0


def test_a_thread_that_has_no_turn_loses_nothing() -> None:
    goes_on = threading.Event()
    steps = iter([lambda: None, goes_on.wait])  # type: ignore[var-annotated]
    threading.Timer(0.3, goes_on.set).start()
    cost, result = a_meter().timed(lambda: "result", Beside(lambda: next(steps, lambda: None)()))
    assert (result, cost.lost) == ("result", 0)


def test_a_step_that_fails_is_reported() -> None:
    steps = iter(range(1))
    with pytest.raises(BenchError, match="StopIteration"):
        a_meter().timed(lambda: None, Beside(lambda: next(steps)))


# Memory traffic.


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
    watch = AllocationWatch(MemoryTraffic(), "cuda:0", fake)
    watch.begin()
    found = watch.end()
    assert (found.count, found.device_bytes, found.num_slabs) == (0, 0, 0)
    watch.begin()
    fake.num_blocks, fake.peak = 8, 1300
    found = watch.end()
    assert (found.count, found.device_bytes, found.num_slabs) == (3, 300, 0)


def test_slabs_that_come_and_go_within_a_call_are_counted_with_their_page_faults() -> None:
    original = HostDevice.arena
    with MemoryTraffic() as traffic:
        watch, device = AllocationWatch(traffic, "cpu"), HostDevice()
        watch.begin()
        arena = device.arena(64 * mmap.PAGESIZE)
        arena.tensor.fill_(1)
        device.release_arena(arena)
        device.pinned(1)
        found = watch.end()
    assert (found.count, found.num_slabs, found.device_bytes) == (2, 2, None)
    assert found.page_faults > 0
    assert HostDevice.arena is original
