from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpu_cache.device.cuda import CudaDevice, _Here
from gpu_cache.device.cudart import has_context
from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Device
from tests.support.cuda_devices import CUDA_1, checked_device, cuda_device, in_thread
from tests.support.fake_cuda import MIB, FakeCuda
from tests.support.fake_cuda_objects import UntouchableCuda
from tests.support.gpu_scene import SLACK_BYTES, is_about


@pytest.fixture
def torchs(tmp_path: Path) -> Iterator[CudaDevice]:
    """A device whose runtime library lacks a function, so that it uses torch's own events and copies."""
    yield from checked_device(FakeCuda(missing=("cudaEventRecord",)), tmp_path)


@pytest.fixture(params=["host", "staged host", "gpu", "torchs", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param in ("gpu", "torchs"):
        return request.getfixturevalue(request.param)
    if request.param == "real":
        return CudaDevice(0)
    return HostDevice(stages=request.param == "staged host")


# The contract of every device.


def test_stages_says_whether_the_host_can_write_into_an_arena(device: Device) -> None:
    if not device.stages:
        assert device.torch_device.type == "cpu"


def test_an_arena_is_plain_bytes_until_it_is_released(device: Device) -> None:
    for private in (True, False):
        arena = device.arena(3 * MIB, private=private)
        assert (arena.nbytes, arena.tensor.dtype, arena.tensor.dim()) == (3 * MIB, torch.uint8, 1)
        assert arena.tensor.untyped_storage().nbytes() == 3 * MIB
        arena.tensor.fill_(7)

        device.release_arena(arena)
        assert arena.nbytes == 0
        device.release_arena(arena)


def test_an_arena_is_untouched_by_the_modes_it_is_made_in(device: Device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), FakeTensorMode():
            arena = device.arena(MIB)
    finally:
        torch.use_deterministic_algorithms(False)

    assert not arena.tensor.is_inference()
    assert not bool((arena.tensor == 255).all()), "filled"
    assert torch.utils.deterministic.fill_uninitialized_memory
    device.release_arena(arena)


def test_a_staging_buffer_is_the_same_bytes_twice_until_it_is_released(device: Device) -> None:
    pinned = device.pinned(5000)
    pinned.view[:4] = b"abcd"
    assert bytes(pinned.tensor[:4].tolist()) == b"abcd"
    assert pinned.tensor.device.type == "cpu"
    assert (pinned.tensor.numel(), len(pinned.view)) == (5000, 5000)

    device.release_pinned(pinned)
    assert (pinned.tensor.numel(), len(pinned.view), pinned.is_pinned) == (0, 0, False)
    device.release_pinned(pinned)


def test_a_copy_arrives_byte_for_byte_and_spares_its_neighbours(device: Device) -> None:
    arena, pinned, stream = device.arena(4096), device.pinned(1024), device.new_stream()
    arena.tensor.fill_(0xEE)
    pinned.view[:] = bytes(range(256)) * 4
    event = device.record(device.current_stream())
    device.wait(stream, event)
    device.copy_all([(arena.tensor[512:1024], pinned.tensor[256:768])], stream)
    device.synchronize(device.record(stream))

    arrived = bytes(arena.tensor.tolist())
    assert arrived[512:1024] == bytes(range(256)) * 2
    assert arrived[:512] == bytes([0xEE]) * 512
    assert arrived[1024:] == bytes([0xEE]) * 3072


def test_a_synchronized_event_is_done_and_tells_the_time(device: Device) -> None:
    stream = device.new_stream()
    start, end = device.record(stream, timing=True), device.record(stream, timing=True)
    device.synchronize(end)

    assert device.query(start)
    assert device.query(end)
    assert 0 <= device.elapsed_s(start, end) < 60


def test_the_fence_names_each_stream_once_the_default_one_first(device: Device) -> None:
    fence = device.fence_streams()

    assert len(set(fence)) == len(fence)
    assert fence[0] == device.current_stream()
    assert device.new_stream() in fence
    assert device.fence_streams() == fence


def test_nothing_is_being_captured(device: Device) -> None:
    assert not device.is_capturing()
    assert not device.is_any_capturing(device.fence_streams())


def test_memory_and_identity_are_told(device: Device) -> None:
    free, total = device.memory_info()

    assert 0 < free <= total
    assert device.identity().name
    assert device.identity() == device.identity()


def test_every_call_works_in_a_thread_that_never_chose_a_device(device: Device) -> None:
    def use() -> bytes:
        arena, pinned, stream = device.arena(512), device.pinned(512), device.new_stream()
        pinned.tensor.fill_(3)
        device.copy_all([(arena.tensor, pinned.tensor)], stream)
        done = device.record(stream)
        device.wait(device.current_stream(), done)
        device.synchronize(done)
        assert device.query(done)
        assert device.fence_streams()
        assert device.memory_info()
        arrived = bytes(arena.tensor.tolist())
        device.release_pinned(pinned)
        device.release_arena(arena)
        return arrived

    assert in_thread(use) == bytes([3]) * 512


# CUDA, on the strict fake.


def test_making_a_device_makes_no_call() -> None:
    untouchable: Any = UntouchableCuda()
    device = CudaDevice(3, untouchable)

    assert (device.torch_device, device.stages) == (torch.device("cuda:3"), True)
    assert repr(device) == "CudaDevice(cuda:3)"


def test_events_are_done_when_the_device_is(gpu: CudaDevice, cuda: FakeCuda) -> None:
    first, second = gpu.new_stream(), gpu.new_stream()
    before = gpu.record(first)
    gpu.wait(second, before)
    after = gpu.record(second)
    cuda.advance(second)
    assert not gpu.query(after), "it waits for the other stream"

    cuda.advance(first)
    assert gpu.query(before)
    assert not gpu.query(after)
    cuda.advance(second)
    assert gpu.query(after)


def test_elapsed_time_is_in_seconds(gpu: CudaDevice, cuda: FakeCuda) -> None:
    stream = gpu.new_stream()
    start, end = gpu.record(stream, timing=True), gpu.record(stream, timing=True)
    with pytest.raises(RuntimeError, match="CUDA error 600"):
        gpu.elapsed_s(start, end)
    cuda.advance()

    assert gpu.elapsed_s(start, end) == pytest.approx(1e-3)


def test_a_copy_runs_on_the_stream_it_names(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arena, pinned, stream = gpu.arena(512), gpu.pinned(512), gpu.new_stream()
    gpu.copy_all([(arena.tensor, pinned.tensor)], stream)

    assert cuda.copies == [stream]
    assert gpu.current_stream() == cuda.default_stream(CUDA_1)
    gpu.release_arena(arena)


def test_streams_of_our_own_are_not_among_those_that_torch_deals_out_by_default(
    gpu: CudaDevice, cuda: FakeCuda
) -> None:
    ours = {gpu.new_stream() for _ in range(40)}
    with cuda.device(CUDA_1):
        theirs = {cuda.Stream(device=CUDA_1) for _ in range(40)}

    assert len(theirs) == 32
    assert not ours & theirs


def test_identity_is_nvmls_name_of_the_device(gpu: CudaDevice, tmp_path: Path) -> None:
    assert gpu.identity().uuid == "GPU-0000-1"
    assert gpu.identity().pci_bus_id == "00000000:3C:00.0"
    assert cuda_device(FakeCuda(binds_last_error=False), tmp_path).identity().pci_bus_id == ""


# Real CUDA.


@pytest.fixture
def real() -> CudaDevice:
    torch.cuda.init()
    return CudaDevice(torch.cuda.current_device())


@pytest.mark.gpu
def test_real_arena_gives_its_memory_back_and_leaves_torch_its_cache(real: CudaDevice) -> None:
    gc.collect()  # devices of other tests, whose pools go back to the driver when they die
    cached = torch.empty(64 * MIB, dtype=torch.uint8, device=real.torch_device)
    del cached
    kept = torch.cuda.memory_reserved(real.torch_device)
    free, _ = real.memory_info()
    arenas = [real.arena(256 * MIB), real.arena(256 * MIB)]
    for number, arena in enumerate(arenas, 1):
        arena.tensor.fill_(number)
    assert real.memory_info()[0] <= free - 512 * MIB + SLACK_BYTES

    torch.cuda.synchronize(real.torch_device)
    for number, arena in enumerate(arenas, 1):
        real.release_arena(arena)
        assert real.memory_info()[0] >= free - (2 - number) * 256 * MIB - SLACK_BYTES
    # About: devices of other tests may die meanwhile, and take 2 MiB with them, torch's smallest segment.
    assert is_about(torch.cuda.memory_reserved(real.torch_device), kept)


@pytest.mark.parametrize("step", ["enter", "exit"])
def test_an_interrupted_call_leaves_the_thread_its_own_device(step: str) -> None:
    noted = MagicMock()

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        if step == "enter":
            raise KeyboardInterrupt
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), _Here(noted, interrupted()):
        pass
    noted.__exit__.assert_called_once()


@pytest.mark.gpu
def test_real_fence_contains_the_streams_that_torch_deals_out(real: CudaDevice) -> None:
    fence = real.fence_streams()

    assert fence[0] == torch.cuda.default_stream(real.torch_device)
    for priority in (0, -1, -2, -3, -9):
        assert torch.cuda.Stream(real.torch_device, priority=priority) in fence


@pytest.mark.gpu
def test_real_pinned_memory_is_pinned_until_it_is_released(real: CudaDevice) -> None:
    pinned = real.pinned(3 * MIB + 5)
    assert pinned.is_pinned
    assert pinned.tensor.is_pinned()
    again = pinned.tensor
    real.release_pinned(pinned)

    assert not again.is_pinned()


@pytest.mark.gpu
def test_real_failed_registration_leaves_no_error(real: CudaDevice) -> None:
    with real._here():
        assert not real._runtime.pin(0, 0)

    assert float(torch.ones(4, device=real.torch_device).sum()) == 4


@pytest.mark.gpu
def test_real_capture_survives_another_threads_calls(real: CudaDevice) -> None:
    event, arena = real.record(real.new_stream()), real.arena(4 * MIB)
    data = torch.zeros(4, device=real.torch_device)
    graph = torch.cuda.CUDAGraph()

    def use() -> None:
        assert real.query(event) in (True, False)
        real.synchronize(event)
        real.release_arena(arena)
        real.release_pinned(real.pinned(4096))
        real.release_arena(real.arena(4 * MIB))

    torch.cuda.synchronize(real.torch_device)
    with torch.cuda.graph(graph):
        data.add_(1)
        in_thread(use)
    graph.replay()

    assert data.tolist() == [1.0] * 4
    assert has_context(real.torch_device.index)
