from __future__ import annotations

import fcntl
import logging
import os
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.cudart import CudaRuntime
from gpu_cache.device.hostmem import host_memory
from gpu_cache.device.protocol import Arena
from gpu_cache.source import LentMemory
from tests.support.cuda_devices import CUDA_1, RUNTIME, cuda_device, in_thread
from tests.support.fake_cuda import MIB, FakeCuda
from tests.support.threads import run_threads

# Streams.


def test_the_fence_has_every_stream_and_leaves_the_turns_as_they_were(gpu: CudaDevice, cuda: FakeCuda) -> None:
    with cuda.device(CUDA_1):
        theirs = [cuda.Stream(device=CUDA_1, priority=-(number % 4)) for number in range(20)]
    turns = dict(cuda.turns)

    fence = gpu.fence_streams()
    assert len(fence) == 1 + 4 * 32
    assert set(theirs) < set(fence)
    assert cuda.turns == turns


def test_the_fence_misses_nothing_when_others_take_streams_meanwhile(
    gpu: CudaDevice, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    deal = type(cuda.Stream).__call__
    asked = 0

    def interfered(self: Any, **arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        for _ in range(7 if asked % 50 == 10 else 0):
            deal(self, **arguments)
        return deal(self, **arguments)

    monkeypatch.setattr(type(cuda.Stream), "__call__", interfered)
    assert len(gpu.fence_streams()) == 1 + 4 * 32


def test_a_torch_that_does_not_tell_its_priorities_has_two(
    gpu: CudaDevice, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(cuda.Stream), "priority_range")

    assert len(gpu.fence_streams()) == 1 + 2 * 32


# Captures.


def test_a_thread_that_captures_can_neither_allocate_nor_release(gpu: CudaDevice, cuda: FakeCuda) -> None:
    arena = gpu.arena(MIB)
    with cuda.capture(gpu.new_stream()):
        assert gpu.is_capturing()
        with pytest.raises(RuntimeError, match="cannot release an arena on cuda:1: this thread is capturing"):
            gpu.release_arena(arena)
        with pytest.raises(RuntimeError, match="cannot allocate an arena on cuda:1: this thread is capturing"):
            gpu.arena(MIB)

    assert arena.nbytes == MIB
    gpu.release_arena(arena)
    assert cuda.reserved(1) == 0


def test_a_captured_stream_takes_no_copy(gpu: CudaDevice, cuda: FakeCuda) -> None:
    stream = gpu.new_stream()
    arena, pinned = gpu.arena(512), gpu.pinned(512)
    fence = gpu.fence_streams()
    with cuda.capture(stream):
        assert gpu.is_any_capturing([stream])
        assert gpu.fence_streams() == fence
        assert not in_thread(gpu.is_capturing)
        with pytest.raises(RuntimeError, match="a part of that graph"):
            in_thread(lambda: gpu.copy_all([(arena.tensor, pinned.tensor)], stream))

    assert gpu.fence_streams() == fence
    gpu.release_arena(arena)


def test_a_capture_in_another_thread_survives_us_and_puts_releases_off(gpu: CudaDevice, cuda: FakeCuda) -> None:
    first = gpu.arena(MIB)
    event = gpu.record(gpu.new_stream())

    def use() -> Arena:
        gpu.release_arena(first)
        second = gpu.arena(2 * MIB)
        ordinary = gpu.arena(3 * MIB, private=False)
        gpu.query(event)
        gpu.synchronize(event)
        gpu.release_pinned(gpu.pinned(4096))
        gpu.release_arena(ordinary)
        return second

    with cuda.capture(gpu.new_stream()):
        second = in_thread(use)
    assert cuda.reserved(1) == 6 * MIB, "the first pool waits for the end of the capture"
    gpu.release_arena(second)
    assert cuda.reserved(1) == 3 * MIB, "which torch keeps"


def test_without_the_runtime_library_captures_are_not_guarded(cuda: FakeCuda, tmp_path: Path) -> None:
    gpu = cuda_device(cuda, tmp_path, "/lib/libother.so")
    event = gpu.record(gpu.new_stream())
    with cuda.capture(gpu.new_stream()), pytest.raises(RuntimeError, match="ends the capture"):
        in_thread(lambda: gpu.query(event))


def test_a_capture_mode_that_cannot_be_changed_is_not_changed_back(cuda: FakeCuda, tmp_path: Path) -> None:
    calls = []
    library = SimpleNamespace(cudaThreadExchangeStreamCaptureMode=lambda mode: calls.append(mode) or 3)
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 42 {RUNTIME}\n")
    with CudaRuntime(cuda, str(maps), lambda path: library).beside_captures():
        assert len(calls) == 1
    assert len(calls) == 1


# Pinning.


def test_pinned_memory_is_registered_and_unregistered_once(gpu: CudaDevice, cuda: FakeCuda) -> None:
    pinned = gpu.pinned(5000)
    assert pinned.is_pinned
    assert cuda.pinned == {pinned.tensor.data_ptr(): 5000}

    gpu.release_pinned(pinned)
    gpu.release_pinned(pinned)
    assert (cuda.pinned, len(cuda.unpinned)) == ({}, 1)
    cuda.check_last_error()


@pytest.mark.parametrize("binds_last_error", [True, False])
def test_a_failed_registration_degrades_and_warns_once(
    binds_last_error: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda(pin_limit_bytes=4096, binds_last_error=binds_last_error)
    gpu = cuda_device(cuda, tmp_path)
    with caplog.at_level(logging.WARNING, "gpu_cache"):
        buffers = [gpu.pinned(4096), gpu.pinned(8192), gpu.pinned(8192)]

    assert [buffer.is_pinned for buffer in buffers] == [True, False, False]
    (warning,) = caplog.messages
    for part in ("8,192 bytes", "error 2", "ulimit -l", "--ulimit memlock=-1", "staging_slots"):
        assert part in warning
    arena = gpu.arena(8192)
    buffers[1].tensor.fill_(4)
    gpu.copy_all([(arena.tensor, buffers[1].tensor)], gpu.new_stream())  # would stumble over a sticky error
    assert int(arena.tensor.sum()) == 4 * 8192
    registered = [buffers[0].tensor.data_ptr()]
    for buffer in buffers:
        gpu.release_pinned(buffer)
    assert cuda.unpinned == registered
    gpu.release_arena(arena)


def test_a_failed_unregistration_leaves_no_error(gpu: CudaDevice, cuda: FakeCuda) -> None:
    pinned = gpu.pinned(4096)
    cuda.pinned.clear()
    gpu.release_pinned(pinned)

    cuda.check_last_error()


def lent_memory(nbytes: int = 8192) -> LentMemory:
    return LentMemory(host_memory(nbytes)[0])


def test_lent_memory_is_registered_for_reading_once_and_until_it_is_unmapped(gpu: CudaDevice, cuda: FakeCuda) -> None:
    lent = lent_memory()
    assert gpu.reads(lent)
    assert gpu.reads(lent)
    assert cuda.register_flags == [9], "portable, and read-only"
    arena = gpu.arena(8192)
    lent.tensor.fill_(3)
    gpu.copy_all([(arena.tensor, lent.tensor)], gpu.new_stream())
    assert int(arena.tensor.sum()) == 3 * 8192
    gpu.release_arena(arena)
    for end in lent.endings:
        end()
    assert cuda.pinned == {}


def test_two_devices_of_a_process_register_lent_memory_once(gpu: CudaDevice, cuda: FakeCuda, tmp_path: Path) -> None:
    lent, other = lent_memory(), cuda_device(cuda, tmp_path)
    assert gpu.reads(lent)
    assert other.reads(lent)
    assert cuda.register_flags == [9]
    for end in lent.endings[::-1]:
        end()
    assert cuda.unpinned == [lent.tensor.data_ptr()]


def test_threads_that_meet_new_lent_memory_register_it_once(gpu: CudaDevice, cuda: FakeCuda) -> None:
    lent = lent_memory()
    run_threads([partial(gpu.reads, lent)] * 4)
    assert cuda.register_flags == [9]


def test_lent_memory_that_the_system_does_not_register_is_staged_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = FakeCuda(pin_limit_bytes=0)
    gpu = cuda_device(cuda, tmp_path)
    with caplog.at_level(logging.INFO, "gpu_cache"):
        assert not any(gpu.reads(lent) for lent in (lent_memory(), lent_memory()))
    (line,) = caplog.messages
    assert "shards in shared memory are staged" in line
    cuda.check_last_error()


def test_processes_register_lent_memory_one_at_a_time(gpu: CudaDevice, cuda: FakeCuda, tmp_path: Path) -> None:
    turn = tmp_path / "turn"
    runtime = CudaRuntime(cuda, turn_file=str(turn))
    held = os.open(turn, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    released: list[bool] = []

    def release() -> None:
        released.append(True)
        os.close(held)

    timer = threading.Timer(0.05, release)
    lent = lent_memory()
    timer.start()
    with cuda.device(CUDA_1):
        assert runtime.pin_shared(lent.tensor.data_ptr(), 8192)
    assert released
    timer.join()


def test_every_mapped_runtime_library_is_cleared_and_nothing_else_opened(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)  # else the library of that version is the first
    cuda = FakeCuda(pin_limit_bytes=0, binds_last_error=False)
    maps = tmp_path / "maps"
    names = ["/a/libcudart.so.12", "/b/libcudart-d0da41ae.so.12 (deleted)", "/c/libcudart.so.13", "/d/xlibcudart.so"]
    maps.write_text("".join(f"7f00-7f01 r-xp 0 08:01 42   {name}\n" * 2 for name in names))
    opened, cleared = [], []

    def load(path: str) -> Any:
        opened.append(path)
        if path == "/c/libcudart.so.13":
            raise OSError("no such file")
        return SimpleNamespace(cudaGetLastError=lambda: cleared.append(path))

    with cuda.device(CUDA_1):
        assert not CudaRuntime(cuda, str(maps), load).pin(4096, 4096)
    assert opened == ["/a/libcudart.so.12", "/b/libcudart-d0da41ae.so.12", "/c/libcudart.so.13"]
    assert cleared == opened[:2]


def test_a_process_without_the_runtime_library_has_none(cuda: FakeCuda) -> None:
    if torch.version.cuda is None:
        with CudaRuntime(cuda).beside_captures():
            assert cuda.thread.capture_mode == 0
