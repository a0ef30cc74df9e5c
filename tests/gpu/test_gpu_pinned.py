"""Staging buffers on a real GPU: page-locked where the system allows it, and harmless where it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_cache import TensorCache
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.hostmem import host_memory
from tests.support.gpu_scene import GPU, LONG_CYCLES, MIB, fetch, is_all, keep_busy, load_kernels, small_cache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("failures_stay_alone")]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def last_errors(device: CudaDevice) -> list[int]:
    """What each mapped runtime library holds against the next kernel of this thread."""
    with torch.cuda.device(GPU):
        return [peek() for peek in device._runtime._symbols("cudaPeekAtLastError")]


def staged_tensors(cache: TensorCache) -> list[torch.Tensor]:
    """The staging buffers that there are."""
    staging = cache._lazy.open().staging
    assert staging is not None
    return [slot.pinned.tensor for slot in staging._slots]


def test_staging_buffers_are_pinned_until_the_cache_is_closed() -> None:
    cache = small_cache()
    assert is_all(fetch(cache, "a", 5), 5)
    staged = staged_tensors(cache)
    assert staged
    assert all(tensor.is_pinned() for tensor in staged)
    stats = cache.buffer_stats()
    assert (stats["is_pinned"], stats["pinned_capacity_bytes"]) == (1, sum(tensor.numel() for tensor in staged))
    cache.close()
    assert not any(tensor.is_pinned() for tensor in staged)


def test_host_memory_is_not_pinned_by_itself(device: CudaDevice) -> None:
    assert not host_memory(MIB)[0].is_pinned()
    pinned = device.pinned(MIB)
    assert pinned.tensor.is_pinned()
    device.release_pinned(pinned)


def test_a_copy_from_a_pinned_buffer_does_not_wait_for_the_stream(device: CudaDevice) -> None:
    load_kernels()
    stream, arena, pinned = device.new_stream(), device.arena(4 * MIB), device.pinned(4 * MIB)
    pinned.tensor.fill_(3)
    keep_busy(stream, 2 * LONG_CYCLES)
    device.copy_all([(arena.tensor, pinned.tensor)], stream)
    assert not device.query(device.record(stream)), "it blocked until the copy was done"
    stream.synchronize()
    assert is_all(arena.tensor, 3)
    device.release_pinned(pinned)
    device.release_arena(arena)


def test_the_runtime_library_that_torch_uses_is_found(device: CudaDevice) -> None:
    assert last_errors(device)
    assert device._runtime._exchange is not None


def test_a_buffer_that_is_registered_twice_leaves_no_error(device: CudaDevice, caplog: Any) -> None:
    pinned = device.pinned(MIB)
    address = pinned.tensor.data_ptr()
    with device._here(), caplog.at_level(logging.WARNING, "gpu_cache"):
        assert [device._runtime.pin(address, MIB) for _ in range(2)] == [False, False]
        assert not any(last_errors(device))
    assert len(caplog.messages) == 1
    assert float(torch.ones(4, device=GPU).sum()) == 4
    assert pinned.tensor.is_pinned()
    device.release_pinned(pinned)
    assert not pinned.tensor.is_pinned()


def test_a_buffer_that_is_unregistered_twice_leaves_no_error(device: CudaDevice) -> None:
    pinned = device.pinned(MIB)
    kept = pinned.tensor
    device.release_pinned(pinned)
    with device._here():
        device._runtime.unpin(kept.data_ptr())
        assert not any(last_errors(device))
    assert float(torch.ones(4, device=GPU).sum()) == 4


def test_such_an_error_would_stay_if_it_were_not_cleared(device: CudaDevice) -> None:
    pinned = device.pinned(MIB)
    with torch.cuda.device(GPU):
        assert int(torch.cuda.cudart().cudaHostRegister(pinned.tensor.data_ptr(), MIB, 1))
        assert any(last_errors(device))
        codes = [clear() for clear in device._runtime._symbols("cudaGetLastError")]
        assert any(codes)
        assert not any(last_errors(device))
    device.release_pinned(pinned)


@pytest.fixture
def registered_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new staging buffer is registered already, so that CUDA refuses to do it."""
    torch.cuda.init()
    buffers: list[torch.Tensor] = []

    def taken(nbytes: int) -> tuple[torch.Tensor, memoryview]:
        tensor, view = host_memory(nbytes)
        assert int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, 1)) == 0
        buffers.append(tensor)
        return tensor, view

    monkeypatch.setattr("gpu_cache.device.cuda.host_memory", taken)
    yield
    torch.cuda.synchronize(GPU)
    for tensor in buffers:
        assert int(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())) == 0


@pytest.fixture
def out_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system pins nothing."""
    torch.cuda.init()
    real = torch.cuda.cudart()
    refusing = SimpleNamespace(
        cudaHostRegister=lambda *arguments: _OUT_OF_MEMORY,
        cudaHostUnregister=real.cudaHostUnregister,
        cudaMemGetInfo=real.cudaMemGetInfo,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)


@pytest.mark.parametrize("refusal", ["registered_before", "out_of_pages"])
def test_a_cache_that_may_not_pin_works_all_the_same_and_says_so_once(
    refusal: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    request.getfixturevalue(refusal)
    cache = small_cache(pool_bytes="64MiB", staging_slot_bytes="4MiB")
    with caplog.at_level(logging.WARNING, "gpu_cache"):
        shards = [fetch(cache, number, number, 5 * MIB) for number in range(4)]
        slots = [cache._lazy.open().device.pinned(MIB) for _ in range(2)]
    assert all(is_all(shard, number) for number, shard in enumerate(shards))
    assert cache.buffer_stats()["is_pinned"] == 0
    assert not any(slot.is_pinned for slot in slots)
    (warning,) = [message for message in caplog.messages if "cannot pin" in message]
    assert "ulimit -l" in warning
    assert float(torch.ones(4, device=GPU).sum()) == 4
    cache.close()
