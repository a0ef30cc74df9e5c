"""Scenes under torch's CUDA sanitizer, each as it is and with one wait taken out: prints what the sanitizer reports.

Run as a module of its own: the sanitizer watches a whole process. It knows nothing of `query`, so the scenes keep
streams busy: then every wait is one that it sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch.cuda import _sanitizer

from gpu_cache import FetchError, TensorCache, reaper
from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.cudart import CudaRuntime
from gpu_cache.pool.completion import Completion
from tests.support.gpu_race import late_reader
from tests.support.gpu_scene import GPU, allocate, fence_off, fetch, keep_busy, small_cache


def main() -> None:
    """Print `scene: verdict` for each scene, then for the scene without its wait."""
    reaper.PERIOD_S = 3600.0  # its queries are not seen
    torch.cuda.init()
    _sanitizer.enable_cuda_sanitizer()
    with _copies_seen():
        for name, scene, fault in _SCENES:
            print(f"{name}: {_verdict(scene)}", flush=True)
            with fault():
                print(f"{name}, no wait: {_verdict(scene)}", flush=True)
    _sanitizer.cuda_sanitizer.disable()


def _read_on_the_stream(cache: TensorCache) -> None:
    allocate(cache)
    keep_busy(cache._lazy.open().transfer.stream)
    fetch(cache, "a", 3, ready="stream").sum()


def _read_anywhere(cache: TensorCache) -> None:
    tensor = fetch(cache, "a", 3, ready="host")
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        tensor.sum()


def _read_late(cache: TensorCache) -> None:
    late_reader(cache, torch.cuda.Stream(GPU))


def _without(method: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(Completion, method, return_value=None)


_SCENES: list[tuple[str, Callable[[TensorCache], None], Callable[[], AbstractContextManager[Any]]]] = [
    ("ready=stream", _read_on_the_stream, _without("wait_on")),
    ("ready=host", _read_anywhere, _without("wait_host")),
    ("reuse", _read_late, fence_off),
]


def _verdict(scene: Callable[[TensorCache], None]) -> str:
    cache = small_cache()
    try:
        scene(cache)
    except _sanitizer.CUDASanitizerErrors:
        return "race"
    except FetchError as error:
        return "race" if isinstance(error.__cause__, _sanitizer.CUDASanitizerErrors) else repr(error)
    finally:
        torch.cuda.synchronize(GPU)
        cache.close()
    return "clean"


@contextlib.contextmanager
def _copies_seen() -> Iterator[None]:
    """Show the sanitizer the copies too: it watches threads one by one, and a fetch has one of its own.

    It sees torch's events and copies only, so that the cache uses these.
    """
    copy_all = CudaDevice.copy_all

    def seen(device: CudaDevice, *arguments: Any) -> None:
        with _sanitizer.cuda_sanitizer.dispatch:
            copy_all(device, *arguments)

    with mock.patch.object(CudaDevice, "copy_all", seen), mock.patch.object(CudaRuntime, "raw", None):
        yield


if __name__ == "__main__":
    main()
