"""Caches and the life of their process: exit, fork, import."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_cache
from gpu_cache import CacheConfig, TensorCache
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.host import HostDevice
from gpu_cache.device.placement import Placement
from gpu_cache.index.entry import Entry
from gpu_cache.index.index import ShardIndex
from gpu_cache.pool.block import Copy
from gpu_cache.pool.fence import StreamFence
from gpu_cache.pool.lease import Husks
from gpu_cache.reaper import Reaper
from gpu_cache.transfer.engine import LazyEngine
from tests.support.cuda_devices import cuda_device
from tests.support.fake_cuda import FakeCuda
from tests.support.sources import DictSource

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """The output of a fresh interpreter; it must end well and say nothing else."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_importing_the_package_does_not_import_torch() -> None:
    code = (
        "import sys, gpu_cache; print('torch' in sys.modules, gpu_cache.__version__, 'TensorCache' in dir(gpu_cache))"
    )
    assert run_python(code) == "False 0.1.0 True\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = gpu_cache.Nothing


def test_every_public_name_loads_and_neither_that_nor_caching_initialises_cuda() -> None:
    code = """
import sys
import gpu_cache
print(all(getattr(gpu_cache, name) is not None for name in gpu_cache.__all__))
import torch
print(torch.cuda.is_initialized())
cache = gpu_cache.TensorCache()
cache.put("a", torch.ones(3))
print(cache.device_name, torch.cuda.is_initialized(), "torch._dynamo" in sys.modules)
"""
    assert run_python(code) == "True\nFalse\ncpu False False\n", "nor imports the compiler, which takes seconds"


FORK = """
import contextlib, os, torch
from gpu_cache import CacheClosedError, TensorCache

def in_child(clear):
    try:
        cache.get("a")
    except CacheClosedError:
        fresh = TensorCache()
        fresh.put("a", kept + 1)
        print("child", clear(), fresh.get("a").tolist(), kept.tolist(), flush=True)

def fork(lock, clear):
    with lock:
        child = os.fork()
        if child == 0:
            in_child(clear)
            os._exit(0)
    print(os.waitpid(child, 0)[1], cache.get("a").tolist(), flush=True)

cache = TensorCache()
cache.put("a", torch.arange(5))
kept = cache.get("a")
fork(contextlib.nullcontext(), cache.clear)
fork(cache._index._lock, lambda: 0)
"""


def test_a_forked_child_cannot_use_its_parents_cache_and_does_not_hang_if_its_locks_were_held() -> None:
    assert run_python(FORK) == 2 * "child 0 [1, 2, 3, 4, 5] [0, 1, 2, 3, 4]\n0 [0, 1, 2, 3, 4]\n"


def test_exit_with_a_prefetch_under_way_does_not_wait_for_it() -> None:
    code = """
import threading, torch
from gpu_cache import TensorCache, TensorReader
cut = threading.Event()
class Stuck:
    def open(self, keys, timeout_s):
        def load():
            cut.wait(100)
            raise ConnectionAbortedError
        return [TensorReader("n", keys, load, cut.set)]
cache = TensorCache()
cache.prefetch(["a"], Stuck())
print("end")
"""
    began = time.monotonic()
    assert run_python(code) == "end\n"
    assert time.monotonic() - began < 60


def test_exit_waits_for_memory_that_a_dropped_cache_gives_back() -> None:
    """A thread that the interpreter ends amid torch's code aborts the process; 1,500 shards did in every other run."""
    code = """
import time, torch
from gpu_cache import CacheConfig, TensorCache
from gpu_cache.transfer.engine import Engine
finish = Engine.finish
def slow(engine):
    time.sleep(0.3)
    finish(engine)
    print("given back", flush=True)
Engine.finish = slow
TensorCache(CacheConfig(device="cpu", stats=False)).put("a", torch.ones(4))
"""
    assert run_python(code) == "given back\n"


def test_the_reaper_frees_blocks_that_die_between_calls() -> None:
    cache = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="1MiB"), device=HostDevice())
    (tensor,) = cache.get_many(["a"], DictSource({"a": torch.ones(10)}))
    cache.clear()
    del tensor
    deadline = time.monotonic() + 30
    while cache.buffer_stats()["device_bytes"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Counted:
    """Something to drain that is busy for so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.drained, self.finished = rounds, threading.Semaphore(0), threading.Event()

    @property
    def is_busy(self) -> bool:
        return self.rounds > 0

    def drain(self) -> None:
        self.rounds -= 1
        self.drained.release()
        if self.rounds == 1:
            raise RuntimeError("a failure must not end the reaper")

    def finish(self) -> None:
        self.finished.set()


def test_the_reaper_goes_on_while_there_is_something_and_can_be_woken_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Counted(rounds=3)
    reaper = Reaper(pool, Husks(), period_s=0.001)
    reaper.wake()
    assert all(pool.drained.acquire(timeout=30) for _ in range(3))
    assert "draining freed shards failed" in caplog.text
    pool.rounds = 2
    reaper.wake()
    assert all(pool.drained.acquire(timeout=30) for _ in range(2))
    reaper.retire()
    reaper.retire()
    assert pool.finished.wait(30)
    reaper.wake()


def test_a_fence_covers_every_stream_once(tmp_path: Path) -> None:
    cuda = FakeCuda()
    device = cuda_device(cuda, tmp_path)
    own = device.new_stream()
    everything = StreamFence(device, "all")
    everything.note(own)
    everything.note(device.fence_streams()[2])
    noted = StreamFence(device, "noted")
    noted.note(own)
    pooled = list(device.fence_streams())
    assert sum(map(len, everything.record() or ())) == len({*pooled, own})
    assert sum(map(len, noted.record() or ())) == 2
    with cuda.capture(own):
        assert noted.record() is None, "work from before the capture may still run"


def test_a_host_choice_made_before_cuda_is_made_again_while_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda()
    gpu: CudaDevice = cuda_device(cuda, tmp_path)
    placements, made = [Placement(HostDevice(), "no CUDA yet", is_final=False)], list[CudaDevice]()
    monkeypatch.setattr("gpu_cache.transfer.engine.choose_device", lambda setting: placements[0])
    monkeypatch.setattr("gpu_cache.transfer.engine.torch_cuda", SimpleNamespace(is_initialized=lambda: len(made) > 0))
    cache = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="4MiB", prealloc_bytes=0))
    source = DictSource({"a": torch.ones(10)})
    (early,) = cache.get_many(["a"], source)
    assert cache.device_name == "cpu"
    placements[0] = Placement(gpu, "CUDA is there")
    cache.get_many(["a"], source)
    assert not caplog.records, "CUDA is not looked for before it is initialised"
    made.append(gpu)
    for _ in range(2):
        cache.get_many(["a"], source)
        assert cache.device_name == "cpu", "something is cached"
    assert caplog.text.count("shards stay on cpu, where they were cached before CUDA was initialised") == 1
    cache.clear()
    cache.get_many(["a"], source)
    assert cache.device_name == "cuda:1"
    assert early.tolist() == [1.0] * 10, "what was handed out before stays valid"
    cache.close()


def test_a_put_goes_to_the_device_that_is_chosen_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu: CudaDevice = cuda_device(FakeCuda(), tmp_path)
    placements = [Placement(HostDevice(), "no CUDA yet", is_final=False)]
    monkeypatch.setattr("gpu_cache.transfer.engine.choose_device", lambda setting: placements[0])
    monkeypatch.setattr(
        "gpu_cache.transfer.engine.torch_cuda", SimpleNamespace(is_initialized=lambda: placements[0].is_final)
    )
    cache = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="4MiB", prealloc_bytes=0))
    reserve = cache._index.reserve

    def reserve_late(key: Hashable, deadline: float) -> Entry | None:
        placements[0] = Placement(gpu, "CUDA is there")
        cache._lazy.open()  # as another thread does
        return reserve(key, deadline)

    monkeypatch.setattr(cache._index, "reserve", reserve_late)
    assert cache.put("a", torch.ones(10))
    assert cache.device_name == "cuda:1"
    assert cache.buffer_stats()["device_bytes"] > 0
    cache.close()


def test_a_second_cache_on_one_gpu_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = cuda_device(FakeCuda(), tmp_path)
    config = CacheConfig(slab_bytes="1MiB", pool_bytes="2MiB", prealloc_bytes=0)
    caches = [TensorCache(config, device=device) for _ in range(2)]
    caches[0].put("a", torch.ones(1))
    assert not caplog.records
    caches[1].put("a", torch.ones(1))
    assert "2 caches on cuda:1 in one process" in caplog.text
    for cache in caches:
        cache.close()


def test_an_engine_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = LazyEngine(CacheConfig(), HostDevice(), ShardIndex(lambda base, num_loans: False))
    assert lazy.current is None
    assert lazy.open() is lazy.open() is lazy.current
    lazy.close()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_blocks_that_outlive_their_cache_are_freed_when_they_die(how: str) -> None:
    cache = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="1MiB"), device=HostDevice())
    (tensor,) = cache.get_many(["a"], DictSource({"a": torch.arange(10)}))
    engine = cache._engine
    assert engine is not None
    if how == "closed":
        cache.close()
    del cache
    gc.collect()
    assert tensor.tolist() == list(range(10))
    assert engine.pool.accounts()["held"] == 512
    del tensor
    deadline = time.monotonic() + 30
    while engine.pool.accounts()["reserved"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_shard_that_lands_in_a_closed_cache_stays_with_its_caller() -> None:
    cache = TensorCache(CacheConfig(slab_bytes="1MiB", pool_bytes="1MiB"), device=HostDevice())
    cache.put("warm", torch.ones(1))
    reserved = cache._index.reserve("late")
    assert reserved is not None
    cache._index.close()
    cache._index.publish([(reserved, Copy("late", torch.ones(1), None, 4))], "", None)
    assert len(cache) == 0
    assert cache._index.is_empty
