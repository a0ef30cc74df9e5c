"""A written shard that is fetched again while others ask for it, clear it, fail or close the cache."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from gpu_cache import CacheClosedError, FetchError
from gpu_cache.device.host import HostDevice
from gpu_cache.transfer.fetch import Fetch
from tests.support.interleave_actors import PATIENCE_S, in_background
from tests.support.interleave_stage import GATES, NODE, SHARDS, Stage, WaitingSource, eventually
from tests.support.sources import DictSource, same_bytes
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("quick_collections")


def written(stage: Stage) -> torch.Tensor:
    """A shard that a caller holds and wrote into."""
    (tensor,) = stage.cache.get_many(["a"], DictSource(SHARDS, NODE))
    return tensor.zero_()


def check_books(stage: Stage, **expected: int) -> None:
    stats = dict(stage.cache.buffer_stats())
    assert stats["requested"] == stats["hits"] + stats["joined"] + stats["misses"]
    assert stats["requested_bytes"] == stats["hit_bytes"] + stats["joined_bytes"] + stats["miss_bytes"]
    assert {name: stats[name] for name in expected} == expected


@pytest.mark.parametrize("gate", GATES)
def test_a_second_caller_waits_for_the_first_ones_refetch(stage: Stage, gate: str) -> None:
    old = written(stage)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at(gate)
    assert "a" not in stage.cache
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource({})))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    stage.open_gates()
    (mine,), (yours,) = first.result(PATIENCE_S), second.result(PATIENCE_S)
    assert mine.data_ptr() == yours.data_ptr() != old.data_ptr()
    assert same_bytes(mine, SHARDS["a"])
    assert len(stage.source.readers) == 1
    check_books(stage, misses=2, joined=1, mutations=1, num_entries=1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("clear", ["keys", "all", "node"])
def test_a_shard_cleared_during_its_refetch_does_not_come_back(stage: Stage, gate: str, clear: str) -> None:
    old = written(stage)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at(gate)
    if clear == "node":
        stage.cache.clear_node(NODE)
    else:
        stage.cache.clear(["a"] if clear == "keys" else None)
    stage.open_gates()
    assert same_bytes(first.result(PATIENCE_S)[0], SHARDS["a"])
    assert "a" not in stage.cache
    assert stage.cache._index.is_empty
    assert not old.any()
    check_books(stage, misses=2, mutations=1, num_entries=0)


@pytest.mark.parametrize("gate", [*GATES, "before the end"])
@pytest.mark.parametrize("is_cleared", [False, True])
def test_a_broken_refetch_fails_its_call_and_joiners_retry(stage: Stage, gate: str, is_cleared: bool) -> None:
    old = written(stage)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at(gate)
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource(SHARDS, NODE)))
    eventually(lambda: stage.cache.buffer_stats()["joined"] or stage.cache.buffer_stats()["hits"])
    if is_cleared:
        stage.cache.clear(["a"])
    reader.break_off()
    has_arrived = gate == "before the end"
    if has_arrived:
        assert same_bytes(first.result(PATIENCE_S)[0], SHARDS["a"])
    else:
        assert "cached copies of 'a' were dropped, as a reader wrote into them" in str(first.exception(PATIENCE_S))
    assert same_bytes(second.result(PATIENCE_S)[0], SHARDS["a"])
    assert not old.any()
    assert ("a" in stage.cache) != is_cleared
    check_books(stage, mutations=1, fetch_errors=int(not has_arrived))


@pytest.mark.parametrize("gate", GATES)
def test_a_cache_that_is_closed_meanwhile_says_so(gate: str) -> None:
    stage = Stage(HostDevice())
    old = written(stage)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at(gate)
    closing = threading.Thread(target=stage.cache.close)
    closing.start()
    eventually(lambda: stage.cache._index.is_closed)
    stage.open_gates()
    closing.join(PATIENCE_S)
    with pytest.raises(CacheClosedError):
        first.result(PATIENCE_S)
    assert not old.any()
    assert stage.cache._index.is_empty


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt()])
def test_an_interrupted_call_leaves_the_shard_to_others(stage: Stage, error: BaseException) -> None:
    written(stage)
    slow = WaitingSource(stage.source)
    slow.error = error
    first = in_background(lambda: stage.cache.get_many(["a"], slow))
    assert slow.has_arrived.wait(PATIENCE_S)
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource(SHARDS, NODE)))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    slow.go.set()
    assert first.exception(PATIENCE_S) is error
    assert same_bytes(second.result(PATIENCE_S)[0], SHARDS["a"])
    check_books(stage, mutations=1, num_entries=1)


def test_a_call_that_waits_for_the_old_copy_gets_it_and_caches_nothing(stage: Stage) -> None:
    """Both fetched it together. One wrote, and asked again, before the other had taken what came."""
    fetching = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at("before a read")
    claim = stage.cache._index.claim(["a"])
    stage.open_gates()
    (old,) = fetching.result(PATIENCE_S)
    old.zero_()
    (fresh,) = stage.cache.get_many(["a"], DictSource(SHARDS, NODE))
    late = stage.cache._index.lend({"a": claim.joined["a"].copy})["a"]
    stage.cache._index.release(claim.joined.values())
    assert late.data_ptr() == old.data_ptr()
    assert same_bytes(fresh, SHARDS["a"])
    assert same_bytes(stage.cache.get_many(["a"], DictSource({}))[0], SHARDS["a"])
    check_books(stage, mutations=1, num_entries=1, hits=1, misses=2, joined=1)


def test_a_caller_with_less_patience_gives_up_alone(stage: Stage) -> None:
    written(stage)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at("before a read")
    with pytest.raises(FetchError, match="not here within"):
        stage.cache.get_many(["a"], stage.source, timeout_s=0.05)
    stage.open_gates()
    assert same_bytes(first.result(PATIENCE_S)[0], SHARDS["a"])
    check_books(stage, mutations=1)


def test_a_call_that_fails_in_part_still_warns_of_writes(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    written(stage)
    with pytest.raises(FetchError):
        stage.cache.get_many(["a", "zz"], DictSource(SHARDS, NODE))
    check_books(stage, mutations=1)
    assert "shard 'a'" in caplog.text


def test_many_threads_that_read_and_write_all_get_the_original() -> None:
    stage = Stage(HostDevice())
    source = DictSource(SHARDS, NODE)
    wrong: list[int] = []

    def read(number: int) -> None:
        for turn in range(60):
            key = "ab"[(number + turn) % 2]
            (tensor,) = stage.cache.get_many([key], source)
            # Another thread may write into it at any time, but only zeros.
            if not bool(((tensor == SHARDS[key]) | (tensor == 0)).all()):
                wrong.append(turn)
            if turn % 3 == 0:
                tensor.zero_()

    run_threads([lambda number=number: read(number) for number in range(4)])  # type: ignore[misc]
    assert not wrong
    for key in "ab":
        assert same_bytes(stage.cache.get_many([key], source)[0], SHARDS[key])
    check_books(stage, num_entries=2)
    gc.collect()
    stage.check_nothing_lost()


@pytest.mark.parametrize("late", ["claims", "joins"])
@pytest.mark.parametrize("is_over", [False, True], ids=["in time", "too late"])
def test_a_caller_gets_no_bytes_that_another_caller_of_the_fetch_wrote(
    stage: Stage, late: str, is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_waiting, has_written, wait = threading.Event(), threading.Event(), Fetch.wait

    def wait_until_written(fetch: Fetch) -> None:
        is_late = not is_waiting.is_set() and bool(fetch.claim.joined if late == "joins" else fetch.claim.claimed)
        if is_late:
            is_waiting.set()
        wait(fetch)
        if is_late:
            assert has_written.wait(PATIENCE_S)
            fetch.deadline = 0.0 if is_over else fetch.deadline

    monkeypatch.setattr(Fetch, "wait", wait_until_written)
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at("before a read")
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource(SHARDS, NODE)))
    eventually(lambda: stage.cache.buffer_stats()["joined"] and is_waiting.is_set())
    stage.open_gates()
    prompt, slow = (first, second) if late == "joins" else (second, first)
    (held,) = prompt.result(PATIENCE_S)
    held.zero_()
    has_written.set()
    if is_over:
        with pytest.raises(FetchError, match=r"not here within 60 s"):
            slow.result(PATIENCE_S)
    else:
        eventually(lambda: stage.open_gates() or slow.done())  # it fetches once more, by another reader
        (tensor,) = slow.result(PATIENCE_S)
        assert same_bytes(tensor, SHARDS["a"])
        assert tensor.data_ptr() != held.data_ptr()
