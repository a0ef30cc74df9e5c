"""Pinned host memory as the arenas of a pool."""

from __future__ import annotations

from typing import Any

import torch

from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena, Device, Pinned

_ON_THE_HOST = HostDevice()


class HostArenas:
    """A `Device` whose arenas are pinned host memory; its streams and events are those of the one that copies there.

    Args:
        device: Pins the memory, and copies to and from it.
    """

    torch_device = torch.device("cpu")
    stages = False

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        """Pinned; ordinary host memory if it is not to be `private`, or if the device is the host."""
        if not (private and self._device.stages):
            return _ON_THE_HOST.arena(nbytes)
        try:
            pinned = self._device.pinned(nbytes)
        except OSError as error:
            raise torch.OutOfMemoryError(str(error)) from error
        return Arena(pinned.tensor, owner=pinned)

    def release_arena(self, arena: Arena) -> None:
        """Unpin it; no copy reads or writes it any more."""
        if isinstance(pinned := arena.owner, Pinned):
            self._device.release_pinned(pinned)
        _ON_THE_HOST.release_arena(arena)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the host."""
        return _ON_THE_HOST.memory_info()
