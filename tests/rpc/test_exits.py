"""A process ends as Python would end it, whatever the threads of the cache are at."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch

from gpu_cache import CacheClosedError, CacheConfig, TensorCache, process
from gpu_cache import cache as cache_module
from gpu_cache.device.host import HostDevice
from gpu_cache.process import OwnThread
from gpu_cache.report import publish
from tests.support.exit_states import ENDS, STATES, is_as_python_would
from tests.support.interleave_stage import eventually
from tests.support.sources import DictSource, gated

pytestmark = pytest.mark.scripts  # whole processes, some seconds each

ROOT = Path(__file__).parents[2]
LONG_S = 60.0


def strange_ends(count: int, endings: Sequence[str]) -> list[tuple[str, str, int, str]]:
    """Bring processes into states and end them; what was not as it should be."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.support.exit_states", str(count)]
    done = subprocess.run([*command, *endings], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.stderr == ""
    results = json.loads(done.stdout)
    assert len(results) == count * len(endings)
    return [(state, end, *how) for state, end, *how in results if not is_as_python_would(end, *how)]


def test_a_process_ends_as_it_would_without_us() -> None:
    ends = cycle(ENDS)
    assert strange_ends(1, [f"{state}/{end}" for state in STATES for end in islice(ends, 2)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("end", ENDS)
def test_fifty_processes_end_as_they_would_without_us(state: str, end: str) -> None:
    assert strange_ends(50, [f"{state}/{end}"]) == []


FRESH = """
import sys, threading, torch
from gpu_cache import CacheConfig, TensorCache
from gpu_cache.process import OwnThread
from tests.support.sources import DictSource
def work():
    left = torch.ones(192, 192)
    begun.set()
    while True:
        left @ left
def drain():
    source = DictSource({"a": torch.ones(3)})
    source.wrap = lambda reader: setattr(reader, "ends_in_time", True) or reader
    cache = TensorCache(CacheConfig(device="cpu", stats=False))
    cache.get_many(["a"], source)
    work()
begun = threading.Event()
KIND.start()
begun.wait()
import atexit
atexit.register(print, "others' handlers run")
sys.exit(7)
"""


@pytest.mark.parametrize("kind", ['OwnThread(work, "ours")', "threading.Thread(target=drain, daemon=True)"])
def test_a_thread_that_never_leaves_torch_costs_neither_status_nor_output(kind: str) -> None:
    program = FRESH.replace("KIND", kind)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (7, "others' handlers run\n", "")


def our_threads() -> list[OwnThread]:
    return process._own_threads()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> TensorCache:
    monkeypatch.setattr(cache_module, "_CLOSE_WAIT_S", LONG_S)
    return TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="4MiB"), device=HostDevice(stages=True))


def begun_prefetch(cache: TensorCache) -> tuple[Future[int], Callable[[], None]]:
    """A prefetch whose bytes wait until they are let go."""
    source = DictSource({"a": torch.ones(10)})
    readers = gated(source)
    future = cache.prefetch(["a"], source)
    eventually(lambda: readers and readers[0].has_arrived.is_set())
    return future, readers[0].gate.set


def test_closing_waits_for_callbacks_on_the_thread_that_fetched(cache: TensorCache) -> None:
    future, let_go = begun_prefetch(cache)
    is_running, may_end, log = threading.Event(), threading.Event(), list[str]()

    def callback(_: object) -> None:
        is_running.set()
        assert may_end.wait(LONG_S)
        log.append("callback")

    future.add_done_callback(callback)
    let_go()
    assert is_running.wait(LONG_S)
    threading.Timer(0.05, may_end.set).start()
    cache.close()
    log.append("closed")
    assert log == ["callback", "closed"]
    eventually(lambda: our_threads() == [])


def test_a_callback_of_a_prefetch_may_close_the_cache(cache: TensorCache) -> None:
    future, let_go = begun_prefetch(cache)
    closed: Future[None] = Future()

    def close(_: object) -> None:
        cache.close()
        closed.set_result(None)

    future.add_done_callback(close)
    let_go()
    closed.result(LONG_S / 2)
    with pytest.raises(CacheClosedError):
        cache.get("a")


def test_a_reader_may_close_the_cache_that_it_reads_for(cache: TensorCache) -> None:
    source = DictSource({"a": torch.ones(10)})
    load = source._load

    def closing(key: object) -> torch.Tensor | Exception:
        cache.close()
        return load(key)

    source._load = closing  # type: ignore[method-assign]
    with pytest.raises(CacheClosedError):
        cache.get_many(["a"], source, timeout_s=LONG_S / 2)


def test_a_closed_cache_looks_at_the_device_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: TensorCache
) -> None:
    monkeypatch.setenv("GPU_CACHE_STATS_DIR", str(tmp_path / "stats"))
    monkeypatch.setattr(publish, "PERIOD_S", 0.001)
    looking = TensorCache(CacheConfig(stats=True), device=HostDevice(stages=True))
    looks: list[bool] = []
    looking._lazy.open().gather = lambda: looks.append(looking._index.is_closed)  # type: ignore[method-assign]
    eventually(lambda: len(looks) > 3)
    looking.close()
    num_looks = len(looks)
    assert [thread.name for thread in our_threads() if thread.name == "gpu-cache-publish"] == []
    assert len(looks) == num_looks


def test_at_exit_the_reaper_looks_once_more_and_leaves_held_blocks(cache: TensorCache) -> None:
    (held,) = cache.get_many(["a"], DictSource({"a": torch.ones(10)}))
    cache.close()
    assert [thread.name for thread in our_threads()] == ["gpu-cache-reaper"], "it waits for the tensor"
    process._end_threads(our_threads(), LONG_S)
    assert our_threads() == []
    assert held.tolist() == [1.0] * 10


def test_a_thread_does_not_wait_for_itself() -> None:
    ended = threading.Event()
    thread = OwnThread(lambda: (thread.wait(float("inf")), ended.set()), "gpu-cache-test")
    thread.start()
    assert ended.wait(LONG_S)
    thread.join(LONG_S)
