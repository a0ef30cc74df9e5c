"""What was allocated while a path ran, on the device and pinned: in a steady state nothing is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Of torch's allocator: blocks handed out so far, and bytes handed out now and at the most.
_NUM_BLOCKS = "allocation.all.allocated"
_BYTES, _PEAK_BYTES = "allocated_bytes.all.current", "allocated_bytes.all.peak"
# Of the cache: its slabs and its staging buffers.
_GAUGES = "device_reserved_bytes", "pinned_capacity_bytes"


@dataclass(frozen=True, slots=True)
class Allocated:
    """During one call.

    Attributes:
        count: Blocks of torch's allocator on the device, slabs included; and one each if the cache took more slabs
            or more staging buffers.
        device_bytes: By how much the device's memory grew at the most, beyond what the cache had; None on the host.
    """

    count: int = 0
    device_bytes: int | None = None


class AllocationWatch:
    """Looks before and after.

    Args:
        cache_stats: Figures of the cache.
        device: Where it caches.
        accelerator: `torch.accelerator`, or something with its functions.
    """

    def __init__(
        self, cache_stats: Callable[[], Mapping[str, Any]], device: str, accelerator: Any = torch.accelerator
    ) -> None:
        self._cache_stats, self._device, self._accelerator = cache_stats, torch.device(device), accelerator
        self._is_host = self._device.type == "cpu"

    def begin(self) -> None:
        """A call is about to start."""
        if not self._is_host:
            self._accelerator.reset_peak_memory_stats(self._device)
        self._before = self._look()

    def end(self) -> Allocated:
        """It has ended."""
        before, after = self._before, self._look()
        num_grown = sum(after[gauge] > before[gauge] for gauge in _GAUGES)
        if self._is_host:
            return Allocated(num_grown)
        return Allocated(num_grown + after[_NUM_BLOCKS] - before[_NUM_BLOCKS], after[_PEAK_BYTES] - before[_BYTES])

    def _look(self) -> dict[str, Any]:
        return {**self._cache_stats(), **({} if self._is_host else self._accelerator.memory_stats(self._device))}
