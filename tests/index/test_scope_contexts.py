"""Scopes of tasks, threads and forked children: who belongs to which."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading

import pytest

from gpu_cache import TensorCache
from tests.support.scoped import device_bytes, fetch, names
from tests.support.sources import DictSource, some_tensors
from tests.support.threads import run_threads


def test_tasks_inherit_a_scope_and_threads_need_the_context(plain: TensorCache) -> None:
    async def scenario() -> None:
        with plain.scope("step") as step:
            await asyncio.gather(*(asyncio.to_thread(fetch, plain, name) for name in "abc"))
            await asyncio.create_task(asyncio.to_thread(fetch, plain, "d"))
            thread = threading.Thread(target=fetch, args=(plain, "e"))
            thread.start()
            thread.join()
            thread = threading.Thread(target=contextvars.copy_context().run, args=(fetch, plain, "f"))
            thread.start()
            thread.join()
            assert names(step.keys()) == "abcdf"

    asyncio.run(scenario())
    assert names(plain.keys()) == "e"


def test_tasks_side_by_side_have_scopes_of_their_own(plain: TensorCache) -> None:
    async def step(name: str, others: asyncio.Barrier) -> None:
        with plain.scope(name) as own:
            fetch(plain, name)
            await others.wait()
            assert own.keys() == [name]
            if name != "a":
                await asyncio.sleep(0)
        assert name not in plain

    async def scenario() -> None:
        await asyncio.gather(*(step(name, barrier) for barrier in [asyncio.Barrier(3)] for name in "abc"))

    asyncio.run(scenario())
    assert len(plain) == 0


def test_a_task_that_outlives_its_scope_fetches_into_the_enclosing_one(plain: TensorCache) -> None:
    async def late(may_go: asyncio.Event, keys: str) -> None:
        await may_go.wait()
        fetch(plain, keys)
        with plain.scope("of its own"):
            fetch(plain, "h")

    async def scenario() -> None:
        may_go = asyncio.Event()
        with plain.scope("outer"):
            with plain.scope("inner"):
                task = asyncio.create_task(late(may_go, "a"))
                last = asyncio.create_task(late(is_over := asyncio.Event(), "b"))
            may_go.set()
            await task
            assert names(plain.keys()) == "a"
        assert len(plain) == 0, "the outer one had it"
        is_over.set()
        await last
        assert names(plain.keys()) == "b", "there was no scope any more"

    asyncio.run(scenario())


def test_a_long_task_keeps_no_ended_scopes(plain: TensorCache) -> None:
    async def late() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            with plain.scope("inner") as inner:
                assert inner._holding is not None
                assert inner._holding.outer is None

    async def scenario() -> None:
        with plain.scope("outer"):
            task = asyncio.create_task(late())
        await task

    asyncio.run(scenario())


def test_a_scope_left_in_another_context_drops_its_shards(plain: TensorCache) -> None:
    stack = contextlib.ExitStack()

    def enter() -> None:
        stack.enter_context(plain.scope("step"))
        fetch(plain, "ab")

    contextvars.copy_context().run(enter)
    stack.close()
    assert len(plain) == 0
    fetch(plain, "a")
    assert names(plain.keys()) == "a"


def test_threads_in_scopes_of_their_own_leave_nothing(plain: TensorCache) -> None:
    tensors = some_tensors(64)
    source, keys = DictSource(tensors), list(tensors)

    def steps(first: int) -> None:
        for number in range(25):
            with plain.scope(f"{first} {number}"):
                begin = (first * 7 + number * 5) % 40
                future = plain.prefetch(keys[begin + 8 : begin + 24], source)
                plain.get_many(keys[begin : begin + 16], source)
                if number % 2:
                    future.result(30)

    run_threads([lambda first=first: steps(first) for first in range(6)])
    while plain._tasks:
        threading.Event().wait(0.001)
    assert len(plain) == 0
    assert device_bytes(plain) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_leaves_a_scope_without_its_parents_locks(plain: TensorCache) -> None:
    with plain.scope("step") as step:
        fetch(plain, "a")
        stack = contextlib.ExitStack()
        stack.push(step)
        with plain._index._lock:  # as a thread may hold it when another forks
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                stack.close()
                os._exit(step.num_shards + 7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert step.num_shards == 1
