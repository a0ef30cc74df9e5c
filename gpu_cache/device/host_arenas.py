"""Pinned host memory as the arenas of a pool."""

from __future__ import annotations

import torch

from gpu_cache.device.host import HostDevice
from gpu_cache.device.protocol import Arena, Device, Event, Pinned

_ON_THE_HOST = HostDevice()


class HostArenas:
    """`Memory` of pinned host buffers, which a device copies to and from.

    Args:
        device: Pins the memory; the events are its own.
    """

    torch_device = torch.device("cpu")
    hard_limit = ""

    def __init__(self, device: Device) -> None:
        self._device = device

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        """Allocate pinned memory; ordinary memory if it is not `private`, or if the device is the host."""
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

    def query(self, event: Event) -> bool:
        return self._device.query(event)

    def synchronize(self, event: Event) -> None:
        self._device.synchronize(event)

    def is_capturing(self) -> bool:
        return self._device.is_capturing()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the host."""
        return _ON_THE_HOST.memory_info()

    def num_shortages(self) -> int:
        return 0
