"""CUDA under torch where it has traps: pinning, sticky errors, captures in other threads, memory pools, pooled streams.

Everything here gets torch's CUDA module as an argument, and is called with the device already current.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context, not only the registering thread's
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal

_log = logging.getLogger(__name__)


class CudaRuntime:
    """The CUDA runtime library that torch uses.

    Args:
        cuda: Torch's CUDA module.
        maps: Names the files mapped into this process, one a line.
        load: Opens a library by path. PyDLL keeps the GIL, which costs up to 5 ms to get back from a busy thread;
            the calls take less than a microsecond.
    Thread-safety: any thread; sticky errors and capture modes are the calling thread's.
    """

    def __init__(self, cuda: Any, maps: str = "/proc/self/maps", load: Callable[[str], Any] = ctypes.PyDLL) -> None:
        self._cuda, self._maps, self._load = cuda, maps, load
        self._has_warned = False

    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock host memory; False, with one warning, where the system refuses."""
        code = self._checked(self._cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
        if code and not self._has_warned:
            self._has_warned = True
            _log.warning(
                f"cannot pin a staging buffer of {nbytes:,} bytes (cudaHostRegister: error {code}); copies to the "
                "device will be slow. Raise the limit on locked memory (ulimit -l, for a container --ulimit "
                "memlock=-1), or lower staging_slots or staging_slot_bytes"
            )
        return not code

    def unpin(self, address: int) -> None:
        """Undo a `pin` that returned True."""
        self._checked(self._cuda.cudart().cudaHostUnregister(address))

    @contextlib.contextmanager
    def beside_captures(self) -> Iterator[None]:
        """Keep what this thread does inside from breaking a CUDA graph capture in another thread.

        By default a capture fails when *any* thread allocates, pins, or queries an event meanwhile. In thread-local
        mode this thread is held to its own captures only.
        Source: torch's ProcessGroupNCCL, whose watchdog queries events the same way (pytorch#148594).
        """
        mode = ctypes.c_int(_THREAD_LOCAL)
        has_changed = self._exchange is not None and self._exchange(ctypes.byref(mode)) == 0
        try:
            yield
        finally:
            if has_changed:
                self._exchange(ctypes.byref(mode))  # which holds the mode before

    def _checked(self, status: Any) -> int:
        """The code of a status. An error is sticky: left alone, the next kernel launch would report it as its own."""
        code = int(status)
        if code:
            bound = getattr(self._cuda.cudart(), "cudaGetLastError", None)  # only in newer torch
            for clear in [bound] if bound else self._symbols("cudaGetLastError"):
                clear()
        return code

    @functools.cached_property
    def _exchange(self) -> Any:
        return next(iter(self._symbols("cudaThreadExchangeStreamCaptureMode")), None)

    def _symbols(self, name: str) -> list[Any]:
        """The function of that name in each runtime library; several may be mapped, each with errors of its own."""
        return [getattr(library, name) for library in self._libraries if hasattr(library, name)]

    @functools.cached_property
    def _libraries(self) -> list[Any]:
        """What is mapped already, opened again: a further copy would have other errors than torch's."""
        libraries = []
        for path in _mapped(self._maps, "libcudart"):
            with contextlib.suppress(OSError):  # replaced on disk since
                libraries.append(self._load(path))
        return libraries


def _mapped(maps: str, prefix: str) -> list[str]:
    """Paths of mapped files whose name begins with `prefix`; some wheels put a hash between that and `.so`."""
    with open(maps) as lines:
        fields = [line.split(maxsplit=5) for line in lines]
    paths = dict.fromkeys(field[5].strip().removesuffix(" (deleted)") for field in fields if len(field) == 6)
    return [path for path in paths if os.path.basename(path).startswith(prefix)]


class PrivatePools:
    """Device memory in memory pools of one allocation each, which goes back to the driver when it is released.

    A pool gives its memory back only when it is destroyed, and destroying one while a capture is under way, or while
    any thread has a pool entered, ends the process. So pools die nowhere but in here, under one lock for the process.

    Args:
        cuda: Torch's CUDA module.
        empty: `torch.empty`.
        is_capture_underway: Whether some stream of the device is being captured, by whatever thread.
    Thread-safety: any thread.
    Source: torch's CUDACachingAllocator, `release_cached_blocks` and `synchronize_and_free_events`.
    """

    # Guards the process's list of entered pools; also _pools and _retired. To allocate under it is its purpose.
    _lock = threading.Lock()

    def __init__(self, cuda: Any, empty: Any, is_capture_underway: Callable[[], bool]) -> None:
        self._cuda, self._empty, self._is_capture_underway = cuda, empty, is_capture_underway
        self._pools: dict[object, Any] = {}  # by a token: outside of this class nothing refers to a pool
        self._retired: list[Any] = []  # released, to be destroyed as soon as nothing is being captured

    def allocate(self, nbytes: int, device: torch.device, *, private: bool) -> tuple[torch.Tensor, object]:
        """Raw bytes on the device, and a token for their pool; None: they are from the ordinary allocator."""
        with self._lock, _tracking_off(), _raw_memory():
            self._destroy_retired_locked()
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
            del pool  # else the traceback would hold it, and destroy it who knows when
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
    # `disable` enters a throw-away pool. Ours is entered inside it and prevails; in torch 2.9 the outer one does, and
    # the memory goes back to the driver only with the next `empty_cache()` (pytorch#161193).
    return saver.disable() if hasattr(saver, "disable") else contextlib.nullcontext()


@contextlib.contextmanager
def _raw_memory() -> Iterator[None]:
    """Allocate as if deterministic filling, inference mode and dispatch modes were off. One thread at a time."""
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        with torch.inference_mode(False), _disable_current_modes():
            yield
    finally:
        settings.fill_uninitialized_memory = was_filling


def pooled_streams(cuda: Any, device: torch.device) -> list[Any]:
    """The default stream, then every stream that torch deals out: 32 for each priority, in turn."""
    found = {0: cuda.default_stream(device)}
    least, greatest = getattr(cuda.Stream, "priority_range", lambda: (0, -1))()
    for priority in range(greatest, least + 1):
        num_known = -1
        # Whole rounds leave everybody else's turn as it was; a round without news shows that none was missed.
        while num_known < len(found):
            num_known = len(found)
            dealt = [cuda.Stream(device=device, priority=priority) for _ in range(32)]
            found |= {stream.cuda_stream: stream for stream in dealt}
    return list(found.values())


def has_context(index: int) -> bool:
    """Whether this process already has a context on a CUDA device; asking makes none."""
    return bool(torch._C._cuda_hasPrimaryContext(index))  # type: ignore[attr-defined]


def pci_address(properties: Any) -> str:
    """The PCI address in a device's properties, as NVML writes it; "" where torch does not tell."""
    parts = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    return "{:08X}:{:02X}:{:02X}.0".format(*parts) if any(parts) else ""
