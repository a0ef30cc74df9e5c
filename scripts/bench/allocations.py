"""Memory that was taken and given back while a path ran: in a steady state none is."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_cache.device.cuda import CudaDevice
from gpu_cache.device.host import HostDevice

# Of torch's allocator: blocks handed out so far, and bytes handed out now and at the most.
_NUM_BLOCKS = "allocation.all.allocated"
_BYTES, _PEAK_BYTES = "allocated_bytes.all.current", "allocated_bytes.all.peak"
# Of the device seam: calls that take or give back a slab, or a staging buffer.
_COUNTED = ("arena", "release_arena", "pinned")


@dataclass(frozen=True, slots=True)
class Allocated:
    """During one call.

    Attributes:
        count: Slabs (on a GPU all blocks of torch's allocator, slabs included) and staging buffers that were taken.
        device_bytes: By how much the device's memory grew at the most, beyond what the cache had; None on the host.
        num_slabs: Slabs that the caches took from the device, and those that they gave back, together.
        page_faults: Of this process, minor and major.
    """

    count: int = 0
    device_bytes: int | None = None
    num_slabs: int = 0
    page_faults: int = 0


class MemoryTraffic:
    """Counts what all caches of this process take from their devices and give back, while it is entered.

    Attributes:
        calls: How often each method of the device seam was called.
    """

    def __init__(self) -> None:
        self.calls = dict.fromkeys(_COUNTED, 0)
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> MemoryTraffic:
        for kind in (HostDevice, CudaDevice):
            for name in _COUNTED:
                original = getattr(kind, name)
                self._originals.append((kind, name, original))
                setattr(kind, name, self._counted(name, original))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    @property
    def num_slabs(self) -> int:
        """Slabs taken and slabs given back so far."""
        return self.calls["arena"] + self.calls["release_arena"]

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(*arguments: Any, **more: Any) -> Any:
            self.calls[name] += 1
            return original(*arguments, **more)

        return counted


class AllocationWatch:
    """Looks before and after a call.

    Args:
        traffic: Of the caches.
        device: Where they cache.
        accelerator: `torch.accelerator`, or something with its functions.
    """

    def __init__(self, traffic: MemoryTraffic, device: str, accelerator: Any = torch.accelerator) -> None:
        self._traffic, self._device, self._accelerator = traffic, torch.device(device), accelerator
        self._is_host = self._device.type == "cpu"

    def begin(self) -> None:
        """A call is about to start."""
        if not self._is_host:
            self._accelerator.reset_peak_memory_stats(self._device)
        self._before = self._look()

    def end(self) -> Allocated:
        """It has ended."""
        before, after = self._before, self._look()
        grown = {name: after[name] - before[name] for name in ("slabs", "blocks", "pinned", "faults")}
        return Allocated(
            grown["blocks"] + grown["pinned"],
            None if self._is_host else after["peak"] - before["bytes"],
            grown["slabs"],
            grown["faults"],
        )

    def _look(self) -> dict[str, int]:
        used, calls = resource.getrusage(resource.RUSAGE_SELF), self._traffic.calls
        found = {
            "slabs": self._traffic.num_slabs,
            "blocks": calls["arena"],
            "pinned": calls["pinned"],
            "faults": used.ru_minflt + used.ru_majflt,
        }
        if not self._is_host:
            stats = self._accelerator.memory_stats(self._device)
            found.update(blocks=stats[_NUM_BLOCKS], bytes=stats[_BYTES], peak=stats[_PEAK_BYTES])
        return found
