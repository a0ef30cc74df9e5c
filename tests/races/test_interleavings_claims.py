"""Two threads that want one shard, stopped at exact places: one fetch, one block; who relied on the other goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch

from gpu_cache import FetchError
from gpu_cache.index.entry import Entry
from tests.support.interleave_actors import PATIENCE_S, in_background
from tests.support.interleave_stage import GATES, NODE, SHARDS, Stage, WaitingSource, eventually
from tests.support.sources import DictSource, same_bytes

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.mark.parametrize("gate", GATES)
def test_the_second_caller_waits_for_the_first_wherever_that_is(stage: Stage, gate: str) -> None:
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    stage.at(gate)
    second = in_background(lambda: stage.cache.get_many(["b", "a"], DictSource(SHARDS)))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    stage.open_gates()
    (mine,), (_, yours) = first.result(PATIENCE_S), second.result(PATIENCE_S)
    assert mine.data_ptr() == yours.data_ptr()
    assert same_bytes(mine, SHARDS["a"])
    assert len(stage.source.readers) == 1


class Queue:
    """A lock before which each thread stops at its first visit, until a test lets it in."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._let_in: dict[str, threading.Event] = {}

    def stop(self, name: str) -> None:
        """Stop the thread of this name."""
        self._let_in[name] = threading.Event()

    def let_in(self, name: str) -> None:
        self._let_in[name].set()

    def __enter__(self) -> None:
        if (event := self._let_in.get(threading.current_thread().name)) is not None:
            assert event.wait(PATIENCE_S)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_one_of_two_callers_at_once_fetches(stage: Stage, order: tuple[str, str]) -> None:
    stage.cache.put("warm", SHARDS["d"])
    stage.cache.clear()
    queue = stage.cache._index._lock = Queue(stage.cache._index._lock)  # type: ignore[assignment]
    got: dict[str, list[torch.Tensor]] = {}
    threads = [
        threading.Thread(
            target=lambda name=name: got.update({name: stage.cache.get_many(["a"], stage.source)}), name=name
        )
        for name in order
    ]
    for thread in threads:
        queue.stop(thread.name)
        thread.start()
    for thread, figure in zip(threads, ("misses", "joined"), strict=True):
        queue.let_in(thread.name)
        eventually(lambda figure=figure: stage.cache.buffer_stats()[figure] == 1)
    stage.reader()
    stage.open_gates()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(stage.source.readers) == 1
    assert got["one"][0].data_ptr() == got["two"][0].data_ptr()
    assert same_bytes(got["one"][0], SHARDS["a"])


def test_a_claim_whose_source_is_not_open_yet_can_be_waited_for_or_given_up(stage: Stage) -> None:
    slow = WaitingSource(stage.source)
    first = in_background(lambda: stage.cache.get_many(["a"], slow))
    assert slow.has_arrived.wait(PATIENCE_S)
    with pytest.raises(FetchError, match=r"not here within 0\.1 s"):
        stage.cache.get_many(["a"], stage.source, timeout_s=0.1)
    second = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    eventually(lambda: stage.cache.buffer_stats()["joined"] == 2)
    slow.go.set()
    stage.reader()
    stage.open_gates()
    assert first.result(PATIENCE_S)[0].data_ptr() == second.result(PATIENCE_S)[0].data_ptr()
    assert len(stage.source.readers) == 1


@pytest.mark.parametrize("error", [OSError("no route"), SystemExit(), KeyboardInterrupt()])
def test_a_joiner_of_a_claim_that_could_not_be_asked_for_asks_for_itself(stage: Stage, error: BaseException) -> None:
    slow = WaitingSource(stage.source)
    slow.error = error
    first = in_background(lambda: stage.cache.get_many(["a", "b"], slow))
    assert slow.has_arrived.wait(PATIENCE_S)
    second = in_background(lambda: stage.cache.get_many(["b"], DictSource(SHARDS)))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    slow.go.set()
    assert first.exception(PATIENCE_S) is error
    assert same_bytes(second.result(PATIENCE_S)[0], SHARDS["b"])
    assert stage.cache.keys() == ["b"]


def test_a_retry_does_not_bring_cleared_shards_back(stage: Stage) -> None:
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at("before a read")
    second = in_background(lambda: stage.cache.get_many(["a", "b"], DictSource(SHARDS)))
    eventually(lambda: "b" in stage.cache)
    stage.cache.clear(["a", "b"])
    reader.break_off()
    assert isinstance(first.exception(PATIENCE_S), FetchError)
    assert all(map(same_bytes, second.result(PATIENCE_S), [SHARDS["a"], SHARDS["b"]]))
    assert stage.cache.keys() == [], "cleared after both calls began"


def test_a_clear_between_the_failure_and_the_second_look_up_counts_too(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at("before a read")
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource(SHARDS)))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    index = stage.cache._index
    abort = index.abort

    def clear_before_the_waiting_wake(entries: Iterable[Entry], error: BaseException) -> None:
        monkeypatch.undo()
        index.remove_node(None)
        abort(entries, error)

    monkeypatch.setattr(index, "abort", clear_before_the_waiting_wake)
    reader.break_off()
    assert isinstance(first.exception(PATIENCE_S), FetchError)
    assert same_bytes(second.result(PATIENCE_S)[0], SHARDS["a"])
    assert stage.cache.keys() == []


def test_a_retry_keeps_shards_that_arrived(stage: Stage) -> None:
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at("before a read")
    own = DictSource(SHARDS)
    second = in_background(lambda: stage.cache.get_many(["a", "b"], own))
    eventually(lambda: "b" in stage.cache)
    stage.cache.clear(["b"])
    reader.break_off()
    assert isinstance(first.exception(PATIENCE_S), FetchError)
    assert all(map(same_bytes, second.result(PATIENCE_S), [SHARDS["a"], SHARDS["b"]]))
    assert own.asked == [["b"], ["a"]], "what arrived and was cleared is not asked for again"
    stats = stage.cache.buffer_stats()
    assert stats["requested"] == stats["hits"] + stats["joined"] + stats["misses"] == 4


def test_without_a_clear_a_retried_shard_is_cached(stage: Stage) -> None:
    first = in_background(lambda: stage.cache.get_many(["a"], stage.source))
    reader = stage.at("after a read")
    second = in_background(lambda: stage.cache.get_many(["a"], DictSource(SHARDS)))
    eventually(lambda: stage.cache.buffer_stats()["joined"])
    reader.break_off()
    assert f"{NODE} broke off after a read" in str(first.exception(PATIENCE_S))
    second.result(PATIENCE_S)
    assert stage.cache.keys() == ["a"]
