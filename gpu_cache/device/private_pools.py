"""Arenas from private memory pools, which go back to the driver when they are released."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gpu_cache.device.modes import plain_tensors


class PrivatePools:
    """Device memory in memory pools of one allocation each, which goes back to the driver when it is released.

    A pool gives its memory back only when it is destroyed. To destroy one during a capture, or while any thread has a
    pool entered, ends the process. So pools are destroyed in here, under one lock for the process. This object must
    outlive the tensors.

    Args:
        cuda: Torch's CUDA module.
        empty: `torch.empty`.
        is_capture_underway: Whether some stream of the device is being captured, by whatever thread.
    Thread-safety: any thread.
    Source: torch's CUDACachingAllocator, `release_cached_blocks` and `synchronize_and_free_events`.
    """

    # Guards the process's list of entered pools, _pools and _retired. Its purpose is that one thread allocates.
    _lock = threading.Lock()

    def __init__(self, cuda: Any, empty: Any, is_capture_underway: Callable[[], bool]) -> None:
        self._cuda, self._empty, self._is_capture_underway = cuda, empty, is_capture_underway
        self._pools: dict[object, Any] = {}  # by a token: nothing outside of this class refers to a pool
        self._retired: list[Any] = []  # released, to be destroyed as soon as nothing is being captured

    def allocate(self, nbytes: int, device: torch.device, *, private: bool) -> tuple[torch.Tensor, object]:
        """Raw bytes on the device, and a token for their pool; None: they are from the ordinary allocator."""
        with self._lock:
            self._destroy_retired_locked()  # before `_tracking_off`, which enters a pool
            with _tracking_off(), _raw_memory():
                if private and self._cuda.get_allocator_backend() == "native":  # no other has pools
                    return self._allocate_in_pool_locked(nbytes, device)
                return self._empty(nbytes, dtype=torch.uint8, device=device), None

    def release(self, token: object) -> None:
        """Give a pool's memory back, after its tensor is gone; while something is captured, with a later call."""
        with self._lock:
            if token is not None:
                self._retired.append(self._pools.pop(token))
            self._destroy_retired_locked()

    def _allocate_in_pool_locked(self, nbytes: int, device: torch.device) -> tuple[torch.Tensor, object]:
        pool = self._cuda.MemPool()
        try:
            with self._cuda.use_mem_pool(pool, device):
                tensor = self._empty(nbytes, dtype=torch.uint8, device=device)
        except BaseException:
            self._retired.append(pool)
            del pool  # else the traceback would hold it, and destroy it at any time
            raise
        token = object()
        self._pools[token] = pool
        return tensor, token

    def _destroy_retired_locked(self) -> None:
        if self._retired and not self._is_capture_underway():
            self._retired.clear()


def is_memory_tracked(environ: Mapping[str, str]) -> bool:
    """Whether torch_memory_saver tracks, and may unmap at any time, what this process allocates on the device."""
    return environ.get("TMS_INIT_ENABLE", "").lower() in ("1", "true", "yes")


def _tracking_off() -> contextlib.AbstractContextManager[Any]:
    """Allocate memory that torch_memory_saver will not unmap under us."""
    saver: Any = None
    if is_memory_tracked(os.environ):
        with contextlib.suppress(ImportError):
            saver = getattr(importlib.import_module("torch_memory_saver"), "torch_memory_saver", None)
    # `disable` enters a throw-away pool. Ours is entered inside it and prevails. In torch 2.9 the outer one prevails:
    # the memory goes back to the driver with the next `empty_cache()` only (pytorch#161193).
    return saver.disable() if hasattr(saver, "disable") else contextlib.nullcontext()


@contextlib.contextmanager
def _raw_memory() -> Iterator[None]:
    """Allocate as if deterministic filling, inference mode and dispatch modes were off. One thread at a time."""
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        with plain_tensors():
            yield
    finally:
        settings.fill_uninitialized_memory = was_filling
