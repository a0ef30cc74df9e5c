"""The device seam: memory, streams and events of one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.source import LentMemory

Stream = Any
Event = Any

with plain_tensors():  # it may be imported within a mode
    NO_BYTES = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Names of a device that hold whatever CUDA_VISIBLE_DEVICES says; empty strings where unknown."""

    name: str
    uuid: str = ""
    pci_bus_id: str = ""


@dataclass(slots=True, eq=False)
class Arena:
    """One device allocation, for one slab. `owner` stands for the memory pool that goes back with it."""

    tensor: torch.Tensor  # (nbytes,) uint8 on the device
    owner: object = None
    _view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """Its bytes, writable, if they are host memory; kept, as slices of a tensor give the GIL away."""
        if self._view is None:
            self._view = memoryview(cast(Any, self.tensor.numpy()))
        return self._view

    def let_go(self) -> None:
        """Refer to its bytes no more."""
        self.tensor, self._view = NO_BYTES, None

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()


@dataclass(slots=True, eq=False)
class Pinned:
    """One host buffer that copies to the device pass through."""

    tensor: torch.Tensor  # (nbytes,) uint8 on the host
    view: memoryview  # the same bytes, writable
    is_pinned: bool  # False: pageable, copies are slower and block the caller


class Memory(Protocol):
    """The memory that a pool's arenas are in.

    Thread-safety: any thread.
    """

    @property
    def torch_device(self) -> torch.device:
        """Where arenas live."""

    @property
    def hard_limit(self) -> str:
        """The option that bounds it, for messages: no run goes outside such a pool. "": the pool's setting does."""

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        """Allocate memory that nothing pending touches.

        Args:
            nbytes: Bytes to allocate.
            private: From a memory pool of its own, which gives the memory back to the driver when released;
                False: from torch's ordinary allocator.
        Raises:
            torch.OutOfMemoryError: There is not that much. For a private arena torch does not empty its cache.
            RuntimeError: The calling thread is capturing a CUDA graph.
        """

    def release_arena(self, arena: Arena) -> None:
        """Give memory back that no work and no alias uses any more. Raises while this thread is capturing."""

    def query(self, event: Event) -> bool:
        """Whether the host can see that `event` is done."""

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until `event` is done."""

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the calling thread's current stream."""

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes."""

    def num_shortages(self) -> int:
        """How often torch's allocator found too little memory so far. Makes no call to the device."""


class Device(Memory, Protocol):
    """The calls that a cache makes to a device.

    Thread-safety: any thread; no call depends on, or changes, the thread's current device.
    """

    @property
    def stages(self) -> bool:
        """Whether bytes reach an arena through pinned staging buffers; False: sources write into it directly."""

    def pinned(self, nbytes: int) -> Pinned:
        """Allocate a staging buffer; pageable, with one warning, where pinning fails."""

    def release_pinned(self, pinned: Pinned) -> None:
        """Unpin and free a staging buffer. The caller has made sure that no copy reads it."""

    def reads(self, memory: LentMemory) -> bool:
        """Whether copies read this memory without staging; registers it if need be, until it is unmapped."""

    def new_stream(self) -> Stream:
        """A stream of the cache's own."""

    def current_stream(self) -> Stream:
        """The calling thread's current stream on this device."""

    def fence_streams(self) -> Sequence[Stream]:
        """Every stream on which a reader may have enqueued work: the default one, then the pooled ones."""

    def copy_all(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        """Enqueue copies of contiguous uint8 ranges (to, from), in any order; the ranges do not overlap.

        The device may read a pageable source before this returns.

        Raises:
            RuntimeError: One was refused; others may be under way.
        """

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        """A new event behind everything enqueued on `stream` so far."""

    def record_all(self, streams: Sequence[Stream]) -> list[Event]:
        """New events behind everything enqueued on `streams` so far; each may stand for several streams."""

    def discard(self, events: Sequence[Event]) -> None:
        """Never look again at these events, which a capture may have taken in."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Make later work on `stream` wait for `event`; the host goes on."""

    def elapsed_s(self, start: Event, end: Event) -> float:
        """Seconds between two events recorded with `timing` and both done."""

    def is_any_capturing(self, streams: Sequence[Stream]) -> bool:
        """Whether a CUDA graph is being captured on one of `streams`."""

    def identity(self) -> DeviceIdentity:
        """Which device this is."""
