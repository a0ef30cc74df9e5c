"""Every test ends with nothing pending, every byte accounted for, no thread left; fixtures of several folders."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("GPU_CACHE_NATIVE", "0")  # `make native` runs the tests of blocks and hits with what it built

from gpu_cache import process, reaper
from gpu_cache.cache import TensorCache
from gpu_cache.config import says_yes
from tests.support.clocks import Clock
from tests.support.fake_cuda import FakeCuda

_OUR_THREADS = ("gpu-cache-", "areal-")
_PATIENCE_S = 0.1  # most end by themselves; a collection takes as long
reaper.PERIOD_S = 0.02  # so that no test waits a second for a thread to end
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
os.environ["GPU_CACHE_STATS"] = "0"  # but in the tests of reports, which have a directory of their own


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A gpu test skips without CUDA, with a reason; where a GPU is promised, that is an error. So for others."""
    if item.get_closest_marker("areal") is not None and not _has_areal():
        pytest.skip("needs AReaL and the wheel in this interpreter: make areal")
    if item.get_closest_marker("ray") is not None and importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray in this interpreter: make ray")
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if says_yes("GPU_CACHE_REQUIRE_GPU", default=False):
        pytest.fail("GPU_CACHE_REQUIRE_GPU is set, but this torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


def _has_areal() -> bool:
    """Whether both are installed; the checkout's packages are not what such a test is about."""
    purelib = sysconfig.get_path("purelib")
    found = {one.metadata["Name"] for one in importlib.metadata.distributions(path=[purelib])}
    return {"areal", "rtensor-data-plane"} <= found and Path(purelib, "gpu_cache_areal.pth").exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long variants run only when a marker expression asks for them."""
    if config.option.markexpr:
        return
    for item in items:
        for name in ("slow", "scripts"):
            if item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=f"long; run with -m {name}"))


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Let collections look only at what a module's tests make: all of torch takes a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def no_reaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the reaper from giving memory back between two looks of a test."""
    monkeypatch.setattr(reaper, "PERIOD_S", 3600.0)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Look at every cache that a test made, close it, and see that no thread of ours goes on."""
    yield
    for cache in list(process._caches):
        assert isinstance(cache, TensorCache)
        check_accounts(cache)
        cache.close()
    _forget_runtime()
    began = time.monotonic()
    collect_at = began + _PATIENCE_S
    while left := [t.name for t in threading.enumerate() if t.name.startswith(_OUR_THREADS)]:
        if (now := time.monotonic()) >= collect_at:
            gc.collect()  # a test's own cycles, such as of an error that it caught
            collect_at = time.monotonic() + _PATIENCE_S
        assert now < began + 30, f"threads left: {left}"
        time.sleep(0.001)


def check_accounts(cache: TensorCache) -> None:
    """No key is pending, no byte is lost, no slot is out."""
    engine = cache._engine
    if engine is None or cache._index.is_closed:
        return
    _settled(lambda: not cache._tasks)
    assert len(cache._index) == sum(map(len, cache._index._levels.tables)), "an entry is still PENDING"
    for pool in engine.pools:
        accounts = pool.accounts()
        reserved = accounts.pop("reserved")
        assert accounts["pending"] == 0, pool
        assert sum(accounts.values()) == reserved, pool
    assert engine.transfer.inflight.stats()["inflight_bytes"] == 0, engine.transfer.inflight
    if engine.staging is not None:
        assert engine.staging.stats()["pinned_bytes"] == 0, engine.staging
    stats = cache.buffer_stats()
    assert stats["requested"] == stats["hits"] + stats["host_hits"] + stats["joined"] + stats["misses"]


def _settled(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "a fetch did not end"
        time.sleep(0.001)


def _forget_runtime() -> None:
    """The next test makes its own."""
    runtime = sys.modules.get("gpu_cache.rpc.runtime")
    if runtime is not None and runtime._current is not None:
        runtime._current.close()
        runtime._current = None
