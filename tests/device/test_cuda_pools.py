from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_cache.device.cuda import CudaDevice
from tests.support.cuda_devices import CUDA_1, cuda_device
from tests.support.fake_cuda import MIB, FakeCuda


def test_a_private_arena_goes_back_to_the_driver_an_ordinary_one_to_torch(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arenas = [gpu.arena(4 * MIB), gpu.arena(8 * MIB)]
    assert cuda.reserved(1) == 12 * MIB
    gpu.release_arena(arenas.pop())
    assert cuda.reserved(1) == 4 * MIB
    gpu.release_arena(arenas.pop())
    assert (cuda.reserved(1), cuda.num_pools) == (0, 0)

    ordinary = gpu.arena(MIB, private=False)
    gpu.release_arena(ordinary)
    assert (cuda.reserved(1), cuda.num_pools) == (MIB, 0)


def test_only_memory_that_torch_may_have_recycled_needs_the_default_stream_synchronized(
    gpu: CudaDevice, cuda: FakeCuda
) -> None:
    private = gpu.arena(MIB)
    assert not cuda.synchronized
    ordinary = gpu.arena(MIB, private=False)
    assert cuda.synchronized == [cuda.default_stream(CUDA_1)]
    gpu.release_arena(private)
    gpu.release_arena(ordinary)


def test_an_allocator_without_pools_serves_private_arenas_too(tmp_path: Path) -> None:
    cuda = FakeCuda(backend="cudaMallocAsync")
    gpu = cuda_device(cuda, tmp_path)
    arena = gpu.arena(MIB)

    assert arena.nbytes == MIB
    assert cuda.synchronized == [cuda.default_stream(CUDA_1)]
    gpu.release_arena(arena)
    assert cuda.reserved(1) == MIB


def test_running_out_of_memory_destroys_no_pool_behind_our_back(gpu: CudaDevice, cuda: FakeCuda) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        gpu.arena(65 * MIB)
    assert cuda.num_pools == 1, "it dies under the lock, with the next call"

    arena = gpu.arena(64 * MIB)
    assert cuda.num_pools == 1
    assert caught.value.__traceback__ is not None
    gpu.release_arena(arena)
    assert (cuda.reserved(1), cuda.num_pools) == (0, 0)


def test_a_private_arena_does_not_use_torchs_cached_memory(gpu: CudaDevice) -> None:
    gpu.release_arena(gpu.arena(40 * MIB, private=False))

    with pytest.raises(torch.OutOfMemoryError):
        gpu.arena(40 * MIB)
    assert gpu.arena(40 * MIB, private=False).nbytes == 40 * MIB


def test_an_arena_that_is_dropped_unreleased_destroys_no_pool(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arena = gpu.arena(MIB)
    cycle: list[Any] = [arena]
    cycle.append(cycle)
    del arena, cycle
    with cuda.capture(gpu.new_stream()):
        gc.collect()

    assert (cuda.num_pools, cuda.violations) == (1, [])


def test_threads_never_destroy_a_pool_while_another_is_entered(gpu: CudaDevice, cuda: FakeCuda) -> None:
    start = threading.Barrier(4)
    other = CudaDevice(1, cuda, cuda.empty, gpu._runtime)

    def churn(device: CudaDevice) -> None:
        start.wait()
        for _ in range(30):
            device.release_arena(device.arena(4096))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=churn, args=[device]) for device in (gpu, other, gpu, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert (cuda.num_pools, cuda.reserved(1), cuda.violations) == (0, 0, [])


# torch_memory_saver.


class Saver:
    """Notes whether memory was allocated while tracking was off; has a pool of its own entered meanwhile."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self.untracked_bytes = cuda, 0

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        before = self._cuda.reserved(1)
        self._cuda.entered.append(self._cuda.MemPool())
        try:
            yield
        finally:
            self._cuda.entered.pop()
        self.untracked_bytes += self._cuda.reserved(1) - before


@pytest.mark.parametrize(("setting", "untracked"), [("1", MIB), ("0", 0), (None, 0)])
def test_arenas_are_kept_from_torch_memory_saver(
    setting: str | None, untracked: int, gpu: CudaDevice, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(cuda)
    monkeypatch.setitem(sys.modules, "torch_memory_saver", SimpleNamespace(torch_memory_saver=saver))
    monkeypatch.delenv("TMS_INIT_ENABLE", raising=False)
    if setting is not None:
        monkeypatch.setenv("TMS_INIT_ENABLE", setting)
    with pytest.raises(torch.OutOfMemoryError):  # leaves a pool to destroy, but not while another is entered
        gpu.arena(65 * MIB)
    saver.untracked_bytes = 0
    gpu.release_arena(gpu.arena(MIB))

    assert saver.untracked_bytes == untracked


@pytest.mark.parametrize("module", [None, SimpleNamespace(), SimpleNamespace(torch_memory_saver=object())])
def test_a_torch_memory_saver_that_cannot_be_asked_is_left_alone(
    module: Any, gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_memory_saver", module)
    monkeypatch.setenv("TMS_INIT_ENABLE", "1")
    arena = gpu.arena(MIB)

    assert arena.nbytes == MIB
    gpu.release_arena(arena)
