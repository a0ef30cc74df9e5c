"""Host memory for staging: private pages that a forked child does not get, all present before the first use."""

from __future__ import annotations

import mmap

import torch

from gpu_cache.device.modes import plain_tensors

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14 and later; Python's mmap has no name for it


def host_memory(nbytes: int) -> tuple[torch.Tensor, memoryview]:
    """Allocate zeroed, page-aligned host memory as a tensor and as a memoryview of the same bytes.

    The pages live as long as the tensor, the view or anything made from either does. There is nothing to close:
    unmapping under a living tensor would be a segmentation fault.

    Args:
        nbytes: At least 1. Whole pages are taken; tensor and view have exactly this many bytes.
    Returns:
        `(nbytes,)` uint8 on the host, and its bytes, writable.
    Raises:
        OSError: The host has not that much.
    """
    if nbytes < 1:
        raise ValueError(f"cannot allocate {nbytes:,} bytes of host memory; ask for at least 1")
    # Private and not Python's default, which is shared: a forked worker could write into what a copy is reading.
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


def _touch(pages: mmap.mmap) -> None:
    """Make every page present, so that neither pinning nor the first receive pays for page faults."""
    try:
        pages.madvise(_POPULATE_WRITE)
    except OSError:  # an older kernel
        pages_view = memoryview(pages)
        pages_view[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)
