"""Devices over the fake `torch.cuda`, and threads to use them in."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.cudart import CudaRuntime
from tests.support.fake_cuda import FakeCuda

CUDA_1 = torch.device("cuda:1")
RUNTIME = "/opt/lib/libcudart-d0da41ae.so.12"


def cuda_device(cuda: FakeCuda, tmp_path: Path, *paths: str, index: int = 1) -> CudaDevice:
    """A device on the second GPU of the fake, while the current one is the first; `paths` are the mapped libraries."""
    maps = tmp_path / "maps"
    lines = [f"7f00-7f01 r-xp 00000000 08:01 42    {path}\n" for path in ("/lib/libc.so.6", *(paths or [RUNTIME]))]
    maps.write_text("".join(lines) + "7f02-7f03 rw-p 00000000 00:00 0\n")
    load = [lambda path: cuda.library] * 2
    return CudaDevice(index, cuda, cuda.empty, CudaRuntime(cuda, str(maps), *load, cuda.current_raw_stream))


def checked_device(cuda: FakeCuda, tmp_path: Path) -> Iterator[CudaDevice]:
    """The same for a fixture: says at the end what a GPU would not have reported at the call."""
    device = cuda_device(cuda, tmp_path)
    yield device
    assert not cuda.violations
    assert cuda.contexts <= {1}, "made a context on a device that is not the cache's"
    assert (cuda.thread.device, cuda.thread.capture_mode) == (0, 0), "left the thread changed"


def in_thread(function: Callable[[], Any]) -> Any:
    """The result of a function in a thread that never chose a device."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            traceback.print_exc()
            errors.append(error.with_traceback(None))  # the frames would keep tensors alive

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if errors:
        raise errors[0]
    return results[0]
