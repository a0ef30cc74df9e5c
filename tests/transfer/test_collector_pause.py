"""Landings are not interrupted by cyclic collections, and leave the collector as they found it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from gpu_cache import CacheConfig, FetchError, ShardReader, TensorCache
from gpu_cache.process import CollectorPause, no_collections
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, GatedReader
from tests.support.threads import run_threads


@pytest.fixture(autouse=True, params=[True, False], ids=["on", "off"])
def is_on(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the process has the collector switched on."""
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def test_a_pause_leaves_the_collector_as_it_was(is_on: bool) -> None:
    pause = CollectorPause()
    with pause, pause:
        assert not gc.isenabled()
    assert gc.isenabled() == is_on
    with pytest.raises(KeyError), pause:
        raise KeyError
    assert gc.isenabled() == is_on


def test_the_last_of_several_threads_ends_the_pause(is_on: bool) -> None:
    pause, is_inside, may_leave = CollectorPause(), threading.Event(), threading.Event()

    def stay() -> None:
        with pause:
            is_inside.set()
            may_leave.wait(30)

    thread = threading.Thread(target=stay)
    thread.start()
    assert is_inside.wait(30)
    with pause:
        pass
    assert not gc.isenabled()
    may_leave.set()
    thread.join()
    assert gc.isenabled() == is_on


def test_many_threads_that_come_and_go_leave_the_collector_as_it_was(is_on: bool) -> None:
    pause = CollectorPause()

    def come_and_go() -> None:
        for _ in range(200):
            with pause:
                assert not gc.isenabled()

    run_threads([come_and_go] * 6)
    assert gc.isenabled() == is_on


def test_a_fetch_leaves_the_collector_as_it_was_also_if_it_fails(is_on: bool) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="1MiB", prealloc_bytes=0))
    cache.get_many(["a"], DictSource({"a": torch.arange(5)}))
    with pytest.raises(FetchError):
        cache.get_many(["b"], DictSource({}))
    assert gc.isenabled() == is_on


def test_what_an_exception_left_of_a_pause_ends_with_the_call(is_on: bool) -> None:
    pause = CollectorPause()
    pause.__enter__()
    pause.__enter__()
    pause.leave()
    assert gc.isenabled() == is_on
    pause.leave()
    pause.__exit__()
    assert gc.isenabled() == is_on


def test_code_of_users_runs_with_the_collector_as_it_was(is_on: bool) -> None:
    cache = TensorCache(CacheConfig(device="cpu", pool_bytes="1MiB", prealloc_bytes=0))
    source, readers, seen = DictSource({"a": torch.arange(5)}), list[GatedReader](), list[bool]()

    def gated(reader: ShardReader) -> ShardReader:
        seen.append(gc.isenabled())
        readers.append(GatedReader(reader))
        return readers[0]

    source.wrap = gated
    first, joined = cache.prefetch(["a"], source), cache.prefetch(["a"], source)
    joined.add_done_callback(lambda _: seen.append(gc.isenabled()))
    assert readers[0].has_arrived.wait(30)
    readers[0].gate.set()
    first.result(30)
    joined.result(30)
    eventually(lambda: len(seen) == 2)
    assert seen == [is_on, is_on]


def test_a_child_that_was_forked_amid_a_pause_collects_as_its_parent_did(is_on: bool) -> None:
    with no_collections:
        child = os.fork()
        if not child:
            with no_collections:
                pass
            os._exit(gc.isenabled() != is_on)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
