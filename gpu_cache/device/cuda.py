"""A CUDA device. The only file that names `torch.cuda`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from gpu_cache.device.cudart import CudaRuntime, nvml_uuid, pci_address, pooled_streams
from gpu_cache.device.events import Events, RawEvents, TorchEvents
from gpu_cache.device.hostmem import host_memory
from gpu_cache.device.private_pools import PrivatePools
from gpu_cache.device.protocol import NO_BYTES, Arena, DeviceIdentity, Event, Pinned, Stream
from gpu_cache.source import LentMemory

torch_cuda: Any = torch.cuda  # for modules that take it as an argument


class CudaDevice:
    """One CUDA device, by its index among the visible ones. Makes no CUDA call before a method is called.

    The other arguments are its parts: `torch.cuda`, `torch.empty`, and the CUDA runtime library.
    """

    hard_limit = ""
    stages = True

    def __init__(
        self, index: int, cuda: Any = torch_cuda, empty: Any = torch.empty, runtime: CudaRuntime | None = None
    ) -> None:
        self.torch_device = torch.device("cuda", index)
        self._cuda, self._runtime = cuda, runtime or CudaRuntime(cuda)
        self._pools = PrivatePools(cuda, empty, lambda: self.is_any_capturing(self._streams))
        self._stream_of: dict[int, Stream] = {}  # by handle: streams that were current when asked
        self._copyable: set[int] = set()  # addresses of arenas and pinned buffers: raw calls never wait for these

    def __repr__(self) -> str:
        return f"CudaDevice({self.torch_device})"

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        self._refuse_capture("allocate an arena")
        default = self._cuda.default_stream(self.torch_device)
        with self._here(), self._cuda.stream(default):
            arena = Arena(*self._pools.allocate(nbytes, self.torch_device, private=private))
            if arena.owner is None:
                # Torch reuses a freed block in the order of its stream: work enqueued before may still read it. A
                # private pool's first block comes straight from the driver, where nothing can be pending on it.
                default.synchronize()
        self._copyable.add(arena.tensor.data_ptr())
        return arena

    def release_arena(self, arena: Arena) -> None:
        self._refuse_capture("release an arena")
        self._copyable.discard(arena.tensor.data_ptr())
        arena.let_go()
        token, arena.owner = arena.owner, None
        with self._here():
            self._pools.release(token)

    def pinned(self, nbytes: int) -> Pinned:
        tensor, view = host_memory(nbytes)
        with self._here():
            is_pinned = self._runtime.pin(tensor.data_ptr(), nbytes)
        if is_pinned:
            self._copyable.add(tensor.data_ptr())
        return Pinned(tensor, view, is_pinned=is_pinned)

    def release_pinned(self, pinned: Pinned) -> None:
        if pinned.is_pinned:
            self._copyable.discard(pinned.tensor.data_ptr())
            with self._here():
                self._runtime.unpin(pinned.tensor.data_ptr())
        pinned.tensor, pinned.view, pinned.is_pinned = NO_BYTES, memoryview(b""), False

    def reads(self, memory: LentMemory) -> bool:
        if (known := memory.readers.get(self)) is None:
            with memory.turn:  # registered twice, it would be refused
                if (known := memory.readers.get(self)) is None:
                    known = memory.readers[self] = self._register(memory)
        return known

    def new_stream(self) -> Stream:
        # Torch deals out the streams of priority 0 to all callers in turn. A shared one would queue copies behind a
        # collective, or put them into a trainer's graph. A copy runs no sooner for its stream's priority.
        with self._here():
            return self._cuda.Stream(device=self.torch_device, priority=-2)

    def current_stream(self) -> Stream:
        handle = self._runtime.current_stream(self.torch_device)
        if (found := self._stream_of.get(handle)) is None:
            found = self._stream_of[handle] = self._cuda.current_stream(self.torch_device)
        return found

    def fence_streams(self) -> Sequence[Stream]:
        return self._streams

    def copy_all(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: Stream) -> None:
        raw = self._runtime.raw
        with self._here():
            if self._events.is_capturing([stream]):
                raise RuntimeError(f"{stream} is being captured: the copy would become a part of that graph")
            if raw is not None and all(map(self._is_copyable, itertools.chain.from_iterable(pairs))):
                raw.copy([(dst.data_ptr(), src.data_ptr(), dst.numel()) for dst, src in pairs], stream.cuda_stream)
                return
            with self._cuda.stream(stream):
                for dst, src in pairs:
                    dst.copy_(src, non_blocking=True)

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        with self._here():
            return self._events.record(stream, timing=timing)

    def record_all(self, streams: Sequence[Stream]) -> list[Event]:
        with self._here():
            return self._events.record_all(streams)

    def discard(self, events: Sequence[Event]) -> None:
        self._events.discard(events)

    def wait(self, stream: Stream, event: Event) -> None:
        with self._here():
            self._events.wait(stream, event)

    def query(self, event: Event) -> bool:
        if self._events.has_seen(event):
            return True
        with self._here():
            return self._events.query(event)

    def synchronize(self, event: Event) -> None:
        with self._here():
            self._events.synchronize(event)

    def elapsed_s(self, start: Event, end: Event) -> float:
        with self._here():
            return self._events.elapsed_s(start, end)

    def is_capturing(self) -> bool:
        current = self.current_stream()
        return bool(current.cuda_stream) and self.is_any_capturing([current])  # the default stream cannot be captured

    def is_any_capturing(self, streams: Sequence[Stream]) -> bool:
        with self._here():
            return self._events.is_capturing(streams)

    def memory_info(self) -> tuple[int, int]:
        with self._here():
            free, total = self._cuda.mem_get_info(self.torch_device)
            return int(free), int(total)

    def num_shortages(self) -> int:
        stats = self._cuda.memory_stats_as_nested_dict(self.torch_device)
        return int(stats.get("num_alloc_retries", 0)) + int(stats.get("num_ooms", 0))

    def identity(self) -> DeviceIdentity:
        found = self._cuda.get_device_properties(self.torch_device)
        return DeviceIdentity(found.name, nvml_uuid(found), pci_address(found))

    @functools.cached_property
    def _events(self) -> Events:
        return TorchEvents(self._cuda) if self._runtime.raw is None else RawEvents(self._runtime.raw)

    def _register(self, memory: LentMemory) -> bool:
        """Register it, unless another device of this process has: one registration serves all devices."""
        address, nbytes = memory.tensor.data_ptr(), memory.tensor.numel()
        is_first = not any(memory.readers.values())
        if is_first:
            with self._here():
                if not self._runtime.pin_shared(address, nbytes):
                    return False
            memory.endings.append(functools.partial(self._unregister, address))
        self._copyable.add(address)
        memory.endings.append(functools.partial(self._copyable.discard, address))
        return True

    def _unregister(self, address: int) -> None:
        with self._here():
            self._runtime.unpin(address)

    def _is_copyable(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._copyable

    @functools.cached_property
    def _streams(self) -> list[Stream]:
        with self._here():
            return pooled_streams(self._cuda, self.torch_device)

    def _here(self) -> _Here:
        """Leave captures in other threads intact, and make no context, half a GiB, on device 0 in a new thread."""
        return _Here(self._cuda.device(self.torch_device), self._runtime.beside_captures())

    def _refuse_capture(self, action: str) -> None:
        if self.is_capturing():
            raise RuntimeError(f"cannot {action} on {self.torch_device}: this thread is capturing a CUDA graph")


class _Here:
    """Two contexts, one inside the other."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        try:
            self._inner.__enter__()
        except BaseException:  # an interrupt, too, leaves this thread its own device
            self._outer.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._inner.__exit__(*error)
        finally:
            self._outer.__exit__(*error)
