"""What torch's CUDA module lacks or offers raw: pinning, sticky errors, captures in other threads, its streams.

Everything here gets torch's CUDA module as an argument, and is called with the device already current.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

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


def nvml_uuid(properties: Any) -> str:
    """The UUID in a device's properties with NVML's prefix, which tells a slice of a GPU (MIG) from a whole one."""
    uuid = str(properties.uuid)
    if uuid.startswith(("GPU-", "MIG-")):
        return uuid
    return f"{'MIG' if ' MIG ' in properties.name else 'GPU'}-{uuid}"


def pci_address(properties: Any) -> str:
    """The PCI address in a device's properties, as NVML writes it; "" where torch does not tell."""
    parts = [getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    return "{:08X}:{:02X}:{:02X}.0".format(*parts) if any(parts) else ""
