"""The index's figures: by source, by size, by clears survived, and by reasons of failed fetches."""

from __future__ import annotations

import pytest
import torch

from gpu_cache.errors import CacheClosedError, CacheFullError, FetchError, TransferError, failure_reason
from gpu_cache.index.entry import Claim, Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.index.ledger import BusyClock, Sources, Tally, capped
from gpu_cache.pool.block import Copy
from gpu_cache.report.schema import OTHER_SOURCES, SOURCE_DURATION_EDGES_S
from tests.support.clocks import Clock


@pytest.fixture
def index(clock: Clock) -> ShardIndex:
    return ShardIndex(lambda base, num_loans: False, clock)


def fetch(index: ShardIndex, *keys: str, node: str = "n:1", nbytes: int = 8) -> list[Entry]:
    entries = list(index.claim(keys).claimed.values())
    index.came_from(entries, node)
    landed = [(entry, Copy(entry.key, torch.zeros(nbytes, dtype=torch.uint8), None, nbytes)) for entry in entries]
    index.publish(landed, node, None)
    index.release(entries)
    return entries


def step(index: ShardIndex, number: int) -> None:
    """Fetch a shard and clear it."""
    fetch(index, f"step-{number}")
    index.remove([f"step-{number}"])


def test_a_source_has_figures_of_its_own(index: ShardIndex, clock: Clock) -> None:
    index.note_fetch("n:1", begins=True)
    clock.now += 2
    fetch(index, "a", "b")
    index.note_answer("n:1", 0.003)
    index.note_fetch("n:1", begins=False)
    clock.now += 3
    fetch(index, "c", node="n:2", nbytes=100)
    index.remove(["b"])
    clock.now += 1
    found = index.report()["sources"]
    assert list(found) == ["n:1", "n:2"]
    one = found["n:1"]
    assert (one["entries"], one["resident_bytes"], one["oldest_entry_age_seconds"]) == (1, 512, 4.0)
    assert (one["fetch_bytes"], one["fetch_busy_seconds"], one["fetch_errors"]) == (16, 2.0, 0)
    assert one["fetch_durations"][SOURCE_DURATION_EDGES_S.index(0.005)] == sum(one["fetch_durations"]) == 1
    assert (found["n:2"]["resident_bytes"], found["n:2"]["oldest_entry_age_seconds"]) == (512, 1.0)
    index.remove(["a"])
    emptied = index.report()["sources"]["n:1"]
    assert (emptied["entries"], emptied["resident_bytes"], emptied["oldest_entry_age_seconds"]) == (0, 0, 0.0)


def test_a_put_shard_counts_as_local(index: ShardIndex) -> None:
    entry = index.reserve("a")
    assert entry is not None
    index.publish([(entry, Copy("a", torch.zeros(4), None, 16))], "", None)
    assert index.report()["sources"]["local"]["entries"] == 1
    assert index.report()["sources"]["local"]["fetch_bytes"] == 0
    assert index.oldest(1)[0].source == "local"


def test_sources_beyond_a_limit_are_one(clock: Clock) -> None:
    sources = Sources(clock)
    for number in range(400):
        sources[f"n:{number}"].fetch_bytes += 1
    found = sources.stats()
    assert len(found) == 257
    assert found[OTHER_SOURCES]["fetch_bytes"] == 144
    assert sources.name("n:399") == OTHER_SOURCES
    assert sources.name("n:0") == "n:0"


def test_failures_are_counted_by_source_and_reason(index: ShardIndex) -> None:
    entries = list(index.claim("abc").claimed.values())
    index.came_from(entries, "n:1")
    index.abort(entries[:2], TimeoutError())
    index.abort(entries, ConnectionResetError())
    one = index.report()["sources"]["n:1"]
    assert (one["fetch_errors"], one["fetch_errors_by_reason"]) == (3, {"timeout": 2, "connection": 1})
    assert index.stats()["fetch_errors"] == 3


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


def a_ring() -> Exception:
    first, second = FetchError("a"), FetchError("b")
    first.__cause__, second.__cause__ = second, first
    return first


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "timeout"),
        (BrokenPipeError(), "connection"),
        (EOFError(), "connection"),
        (ValueError("a frame"), "answer"),
        (FetchError("?"), "other"),
        (CacheClosedError(), "other"),
        (caused(FetchError("gave up"), ConnectionRefusedError()), "connection"),
        (caused(FetchError("x"), caused(FetchError("y"), TimeoutError())), "timeout"),
        (a_ring(), "other"),
        (CacheFullError(4096, 0, 1024), "local"),
        (TransferError("not staged"), "local"),
    ],
)
def test_a_failed_fetch_has_one_reason(error: Exception, reason: str) -> None:
    assert failure_reason(error) == reason


def test_survivors_by_clears_survived(index: ShardIndex) -> None:
    fetch(index, "old", nbytes=1050)
    step(index, 0)
    fetch(index, "young", nbytes=7)
    step(index, 1)
    found = index.report()
    assert found["survivors"] == [[1, 1, 512], [2, 1, 1536]], "alignment included"
    assert (found["outlived_entries"], found["outlived_bytes"], found["outlived_max_clears"]) == (1, 1536, 2)
    assert [one.key for one in index.oldest(9, is_outlived=True)] == ["old"]
    assert [one.key for one in index.oldest(9)] == ["old", "young"]
    assert index.oldest(1)[0].clears_survived == 2
    assert (index.oldest(1)[0].dtype, index.oldest(1)[0].shape) == (torch.uint8, (1050,))
    for number in range(2, 30):
        step(index, number)
    assert index.report()["survivors"] == [[16, 2, 2048]]


def test_a_kept_shard_is_no_leak(index: ShardIndex) -> None:
    fetch(index, "cached", "leaks")
    index.keep(["cached", "unknown"], Claim())
    found = index.claim(["coming"])
    claimed = list(found.claimed.values())
    index.keep(["coming"], found)
    index.publish([(claimed[0], Copy("coming", torch.zeros(2), None, 8))], "n:1", None)
    for number in range(3):
        step(index, number)
    assert index.report()["survivors"] == [[3, 1, 512]]
    assert [one.key for one in index.oldest(9, is_outlived=True)] == ["leaks"]
    index.remove(["cached", "coming", "leaks"])
    assert index.report()["survivors"] == []
    assert index.stats()["outlived_bytes"] == 0


def test_sizes_of_cached_shards_are_counted(index: ShardIndex) -> None:
    fetch(index, "a", "b", nbytes=4096)
    fetch(index, "c", nbytes=4097)
    sizes = index.report()["histograms"]["entry_size_bytes"]
    assert sizes["counts"][:3] == [2, 1, 0]
    assert sizes["sum"] == 3 * 4096 + 1


def test_a_value_on_an_edge_is_below_it_and_one_above_the_last_counts_too() -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        tally.observe(value)
    assert tally.histogram() == {"counts": [2, 2, 1], "sum": 7.5}


def test_the_last_row_of_survivors_sums_up_older_ones() -> None:
    assert capped([[20, 1, 10], [0, 9, 9], [3, 2, 5], [16, 1, 1]], 16) == [[3, 2, 5], [16, 2, 11]]


def test_busy_seconds_count_overlaps_once(clock: Clock) -> None:
    busy, began = BusyClock(clock), clock.now
    for at, begins in ((1.0, True), (2.0, True), (4.0, False)):
        clock.now = began + at
        busy.note(begins=begins)
    clock.now = began + 5.0
    assert busy.seconds == 4.0
    clock.now = began + 6.0
    busy.note(begins=False)
    clock.now = began + 100.0
    assert busy.seconds == 5.0
