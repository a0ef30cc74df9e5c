"""Ctrl-C at each step of a call in the main thread, and while it waits: nothing is lost, and the next call works."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch

from gpu_cache import CacheConfig, ShardReader, TensorCache, TensorReader, process
from gpu_cache.device.host import HostDevice
from gpu_cache.process import InterruptPause
from gpu_cache.transfer import fetch
from tests.support.interleave_actors import in_background
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, gated, same_bytes, some_tensors

CONFIG = CacheConfig(device="cpu", slab_bytes="1MiB", pool_bytes="4MiB", stats=False)
SHARDS: dict[Hashable, torch.Tensor] = {name: torch.arange(100 + number) for number, name in enumerate("abcd")}
STRIDE = 29  # steps from one that is interrupted to the next; a prime
NUM_OFFSETS = 4  # calls of this test, each with other steps


class TwoNodes:
    """Two readers, each for some of the keys."""

    def open(self, keys: Sequence[Hashable], timeout_s: float) -> Iterable[ShardReader]:
        for node, own in (("node-a:1", keys[::2]), ("node-b:1", keys[1::2])):
            if own:
                yield TensorReader(node, own, lambda own=own: [SHARDS[key] for key in own])  # type: ignore[misc]


def use(cache: TensorCache) -> None:
    for _ in range(2):  # it fetches, then it hits
        cache.get_many(list(SHARDS), TwoNodes())
    cache.clear(["a", "b"])
    cache.put("own", SHARDS["a"])
    with cache.scope("step"):
        cache.get_many(["a"], TwoNodes())
    cache.prefetch(["b"], TwoNodes())
    cache.get_many(["b"], TwoNodes())  # waits for it; the wait of a future itself does not bear Ctrl-C at each step
    cache.clear()


class CtrlC:
    """Interrupts this thread at a step where Python would: as a function begins, or a call of C returns."""

    def __init__(self, at: int) -> None:
        self._at, self.num_steps = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename != __file__:
            self.num_steps += 1
            if self.num_steps == self._at:
                signal.raise_signal(signal.SIGINT)

    def during(self, work: Callable[[], None]) -> bool:
        """Whether it was raised."""
        sys.setprofile(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False


def check(cache: TensorCache) -> None:
    """Another thread gets the bytes, and nothing is left after its clear."""
    assert all(map(torch.equal, cache.get_many(list(SHARDS), TwoNodes(), timeout_s=30), SHARDS.values()))
    eventually(lambda: is_empty(cache))
    cache.close()


def is_empty(cache: TensorCache) -> bool:
    """Whether a clear leaves nothing."""
    assert cache._engine is not None
    cache.clear()
    cache.synchronize()
    accounts = cache._engine.pool.accounts()
    return not cache._tasks and accounts["free"] == accounts["reserved"] and cache._index.is_empty


def interrupted(ctrl_c: CtrlC) -> bool:
    """Whether Ctrl-C was raised in a use of a cache, which has been used before, and works afterwards."""
    cache = TensorCache(CONFIG)
    cache.get_many(["a"], TwoNodes())
    cache.clear()
    is_raised = ctrl_c.during(lambda: use(cache))
    in_background(lambda: check(cache)).result(60)
    return is_raised


@pytest.mark.parametrize("offset", range(1, NUM_OFFSETS + 1))
def test_ctrl_c_at_any_step_leaves_a_cache_that_works(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # some steps are those of weak references' callbacks
    never = CtrlC(0)
    assert not interrupted(never)
    steps = range(offset * STRIDE // NUM_OFFSETS, never.num_steps, STRIDE)
    assert sum(interrupted(CtrlC(step)) for step in steps) > 10


@pytest.mark.parametrize("stages", [False, True], ids=["direct", "staged"])
def test_a_call_that_is_interrupted_cuts_its_reads(stages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits. The next call does not wait for them, and one that did asks for itself."""
    cache = TensorCache(CONFIG, device=HostDevice(stages=stages))
    shards, ctrl_c, waits, all_done = some_tensors(1), threading.Event(), list[int](), fetch._all_done
    (key,), slow, own = shards, DictSource(shards), DictSource(shards)
    readers = gated(slow)

    def waiting(futures: Sequence[Future[object]], deadline: float) -> bool:
        waits.append(threading.get_ident())
        if len(waits) == 1:
            assert ctrl_c.wait(30)
            raise KeyboardInterrupt
        return all_done(futures, deadline)

    monkeypatch.setattr(fetch, "_all_done", waiting)
    interrupted = in_background(lambda: cache.get_many([key], slow))
    eventually(lambda: bool(waits and readers) and readers[0].has_arrived.is_set())
    joining = in_background(lambda: cache.get_many([key], own))
    eventually(lambda: cache.buffer_stats()["joined"] == 1)
    ctrl_c.set()
    assert isinstance(interrupted.exception(30), KeyboardInterrupt)
    assert readers[0].is_cancelled
    assert same_bytes(joining.result(30)[0], shards[key])
    assert own.asked == [[key]]
    readers[0].gate.set()
    del joining
    eventually(lambda: is_empty(cache))
    cache.close()


def in_pauses(signals: Sequence[int], steps: list[str]) -> None:
    with process.no_interrupts:
        with process.no_interrupts:
            for number in signals:
                signal.raise_signal(number)
            steps.append("inner")
        steps.append("outer")


@pytest.mark.parametrize(("num_signals", "expected"), [(1, ["inner", "outer"]), (2, [])])
def test_the_first_ctrl_c_in_a_pause_raises_at_its_end_and_the_second_at_once(
    num_signals: int, expected: list[str]
) -> None:
    steps: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        in_pauses([signal.SIGINT] * num_signals, steps)
    assert steps == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    in_pauses([], steps)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_another_signal_that_raises_as_a_pause_ends_keeps_neither_ctrl_c_nor_its_handler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class RaisingOnce:
        getsignal = staticmethod(signal.getsignal)
        calls: ClassVar[list[object]] = []

        def signal(self, number: int, handler: Any) -> object:
            self.calls.append(handler)
            if len(self.calls) == 2:
                raise SystemExit(143)
            return signal.signal(number, handler)

    monkeypatch.setattr(process, "_signal", RaisingOnce())
    with pytest.raises(KeyboardInterrupt) as caught:
        in_pauses([signal.SIGINT], [])
    assert isinstance(caught.value.__context__, SystemExit)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_pause_in_another_thread_changes_nothing() -> None:
    pause = InterruptPause()

    def handler() -> object:
        with pause:
            return signal.getsignal(signal.SIGINT)

    assert in_background(handler).result(30) is signal.default_int_handler


def test_a_pause_leaves_an_ignored_signal_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with process.no_interrupts:
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_that_another_thread_forks_amid_a_pause_gets_its_signal_back() -> None:
    def forked() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(0 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with process.no_interrupts:
        assert in_background(forked).result(30) == 0
