"""What writing reports for `gpu-cache-smi` costs the process that writes them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.exactness import BenchError
from gpu_cache import CacheConfig, TensorCache

NUM_ENTRIES = 3072  # as many as the workload rollout has
_SHARED = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where reports go by default
_THREAD = "gpu-cache-publish"
_STEP_S = 10.0  # a clear each: one more report, soon after it


def percent_of_a_core(seconds: float, device: str) -> float:
    """Processor time of the publishing thread, in percent of the wall's, while steps of ten seconds go by.

    Raises:
        BenchError: The kernel does not tell, or no report was written.
    """
    with tempfile.TemporaryDirectory(dir=_SHARED) as folder, _reporting_into(folder):
        cache = TensorCache(CacheConfig(device=device, stats=True, role="bench", pool_bytes=64 << 20, prealloc_bytes=0))
        with contextlib.closing(cache):
            _fill(cache)
            before, began = _thread_ns(), time.monotonic()
            while time.monotonic() < began + seconds:
                cache.clear()
                _fill(cache)
                time.sleep(_STEP_S)
            used_s, elapsed_s = (_thread_ns() - before) / 1e9, time.monotonic() - began
            if not list(Path(folder).glob("*.json")):
                raise BenchError("no report was written")
            return 100 * used_s / elapsed_s


def _fill(cache: TensorCache) -> None:
    for number in range(NUM_ENTRIES):
        cache.put(number, torch.zeros(16))


def _thread_ns() -> int:
    """Nanoseconds that the publishing thread has run so far."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            try:
                return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
            except OSError as error:
                raise BenchError(f"the kernel does not tell the time of a thread: {error}") from error
    raise BenchError(f"there is no thread {_THREAD}")


@contextlib.contextmanager
def _reporting_into(folder: str) -> Iterator[None]:
    name = "GPU_CACHE_STATS_DIR"
    before = os.environ.get(name)
    os.environ[name] = folder
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
