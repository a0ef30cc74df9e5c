"""Host memory for staging: private pages, absent in forked children, and all present before the first use."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gpu_cache.device.modes import plain_tensors

POPULATE_READ, POPULATE_WRITE = 22, 23  # MADV_POPULATE_*, Linux 5.14 and later; Python's mmap has no names for them
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def host_memory(nbytes: int) -> tuple[torch.Tensor, memoryview]:
    """Allocate zeroed, page-aligned host memory as a tensor and as a memoryview of the same bytes.

    The pages live as long as the tensor, the view or anything made from either. There is nothing to close: to unmap
    them under a living tensor would be a segmentation fault.

    Args:
        nbytes: At least 1. Whole pages are taken; tensor and view have exactly this many bytes.
    Returns:
        `(nbytes,)` uint8 on the host, and its bytes, writable.
    Raises:
        OSError: The host has not that much.
    """
    if nbytes < 1:
        raise ValueError(f"cannot allocate {nbytes:,} bytes of host memory; ask for at least 1")
    # Private. Python's default is shared: a forked worker could write into bytes that a copy is reading.
    pages = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A pinned page shared copy-on-write after a fork may move in the parent, behind the device's back.
    pages.madvise(mmap.MADV_DONTFORK)
    _touch(pages)
    # The tensor refers to this memoryview, which keeps `pages` mapped; one of its own, as callers may release theirs.
    with plain_tensors():
        tensor = torch.frombuffer(memoryview(pages)[:nbytes], dtype=torch.uint8)
    return tensor, memoryview(pages)[:nbytes]


def host_storage(nbytes: int) -> torch.UntypedStorage:
    """Ordinary host memory as a bare storage: unlike `torch.empty`, deterministic mode does not fill it.

    Raises:
        torch.OutOfMemoryError: The host has not that much; torch itself has no type for it there.
    """
    try:
        return torch.UntypedStorage(nbytes, device="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def host_tensor(nbytes: int) -> torch.Tensor:
    """Ordinary host memory as a tensor, `(nbytes,)` uint8, whatever modes are active in this thread.

    Raises:
        torch.OutOfMemoryError: As for `host_storage`.
    """
    storage = host_storage(nbytes)
    with plain_tensors():
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def mapped(descriptor: int, nbytes: int, *, is_writable: bool) -> Any:
    """Map a file that several processes share, as `(nbytes,)` uint8; a forked child does not get it.

    It stays mapped for as long as any alias lives. Unlike Python's own, the mapping keeps no descriptor. A write into
    one that is not writable ends the process.

    Raises:
        OSError: The system refuses.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, _FAILED):
        raise OSError(code := ctypes.get_errno(), f"{os.strerror(code)}: mapping {nbytes:,} bytes")
    pages: Any = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(pages, _unmap, address, nbytes, os.getpid()).atexit = False
    advise(address, nbytes, mmap.MADV_DONTFORK)
    return np.frombuffer(pages, dtype=np.uint8)


def copy_on_host(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy between ranges of host memory (to, from), and give the GIL away once for all of them.

    Beside a busy Python thread each time costs up to 5 ms, until that thread gives it back.
    """
    if pairs:
        torch._foreach_copy_([dst for dst, _ in pairs], [src for _, src in pairs])


def advise(address: int, nbytes: int, advice: int) -> int:
    """`madvise`, without the GIL; 0, or the error's number."""
    return ctypes.get_errno() if _libc.madvise(address, nbytes, advice) else 0


def _unmap(address: int, nbytes: int, pid: int) -> None:
    if os.getpid() == pid:  # in a forked child something else may be there
        _libc.munmap(address, nbytes)


def _touch(pages: mmap.mmap) -> None:
    """Make every page present, so that neither pinning nor the first receive pays for page faults."""
    try:
        pages.madvise(POPULATE_WRITE)
    except OSError:  # an older kernel
        pages_view = memoryview(pages)
        pages_view[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)
