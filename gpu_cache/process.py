"""The live caches of this process: closed at exit, cut off in a forked child. Module-level state of `gpu_cache`."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import time
import weakref
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


class LiveCache(Protocol):
    @property
    def device_name(self) -> str:
        """Where it caches, "" while undecided."""

    def close(self) -> None:
        """Give everything back."""

    def disown(self) -> object:
        """Refuse every further call and return what must never be freed in this process."""


class Settling(Protocol):
    def settle(self, timeout_s: float) -> None:
        """Wait for what is under way in torch's code and would not survive the interpreter's end."""


_SETTLE_S = 2.0  # at exit, for all caches together
_caches: weakref.WeakSet[LiveCache] = weakref.WeakSet()
_settling: weakref.WeakSet[Settling] = weakref.WeakSet()


def register(cache: LiveCache) -> None:
    """Close `cache` at exit, and cut it off in a forked child."""
    _caches.add(cache)


def register_settling(one: Settling) -> None:
    """Wait for it at exit, as it may outlive its cache."""
    _settling.add(one)


def unregister(cache: LiveCache) -> None:
    """It was closed."""
    _caches.discard(cache)


def warn_if_shared(device: torch.device) -> None:
    """Warn of several live caches on one CUDA device: each takes its own share of the memory."""
    count = sum(cache.device_name == str(device) for cache in list(_caches))
    if device.type == "cuda" and count > 1:
        logger.warning("%d caches on %s in one process; each takes up to its own pool_bytes", count, device)


def _close_all() -> None:
    for cache in list(_caches):
        try:
            cache.close()
        except Exception:
            logger.exception("closing %r at exit failed", cache)
    deadline = time.monotonic() + _SETTLE_S
    for one in list(_settling):
        one.settle(max(0.0, deadline - time.monotonic()))


def _disown_all() -> None:
    """In a child, where locks may be held by threads that do not exist here: takes none."""
    for cache in list(_caches):
        # Arenas, events and pinned buffers of the parent: freeing them here, be it when the interpreter ends and clears
        # its modules, would call a CUDA context that did not survive the fork.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(cache.disown()))
    _caches.clear()
    _settling.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_disown_all)
