"""A strict stand-in for `torch.cuda`: what `CudaDevice` uses of it, and an error wherever a GPU would misbehave.

It has no attribute that `CudaDevice` should not use. Device memory is host memory, so that copies really happen;
events become done when a test calls `advance`, or when they are synchronized. Faults that a GPU would not report at
the call (a pool destroyed at the wrong time, a context made on a foreign device) are noted, for tests to look at.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.fake_cuda_objects import (
    BASE,
    GLOBAL,
    POOL_SIZE,
    Block,
    FakeEvent,
    FakePool,
    FakeStream,
    FakeTensor,
    StreamType,
    Thread,
)
from tests.support.fake_cudart import FakeLibrary

MIB = 1 << 20
ALIGNMENT = 512  # torch's allocator aligns blocks so


class FakeCuda:
    """The module. The keyword arguments say what machine and what torch it plays.

    Args:
        num_devices: Visible devices.
        device_bytes: Memory of each.
        pin_limit_bytes: Pinning more than this in all fails, as under a low `ulimit -l`.
        backend: Name of torch's allocator.
        binds_last_error: Whether `cudart()` offers `cudaGetLastError`, as newer torch does.
        library: More arguments of the runtime library, see `FakeLibrary`.
    """

    def __init__(
        self,
        num_devices: int = 2,
        device_bytes: int = 64 * MIB,
        pin_limit_bytes: int = 64 * MIB,
        backend: str = "native",
        binds_last_error: bool = True,
        **library: Any,
    ) -> None:
        self.free_bytes = [device_bytes] * num_devices
        self.pinned: dict[int, int] = {}
        self.register_flags: list[int] = []
        self.unpinned: list[int] = []
        self.contexts: set[int] = set()  # devices that have one
        self.captures: dict[FakeStream, int] = {}  # and the thread that is capturing each
        self.entered: list[FakePool] = []
        self.violations: list[str] = []
        self.copies: list[FakeStream] = []  # the stream of each copy
        self.synchronized: list[FakeStream] = []
        self.num_pools = self.num_alloc_retries = self.num_ooms = 0
        self.has_memory_stats = True
        self.num_priorities = 4
        self.turns: dict[tuple[int, int], int] = {}
        self.implicit_capture = False  # a stream that the default one would wait for is being captured
        self.calls: Counter[str] = Counter()  # calls of this module that lead to some of the runtime
        self.thread = Thread()
        self.Stream = StreamType(self)
        self._device_bytes, self._pin_limit_bytes, self._backend = device_bytes, pin_limit_bytes, backend
        self._binds_last_error, self._clock_ms = binds_last_error, 0.0
        self._queues: dict[FakeStream, list[tuple[str, FakeEvent]]] = {}
        self._cached: list[int] = [0] * num_devices  # bytes that the ordinary allocator keeps
        self._blocks: dict[int, int] = {}  # addresses and lengths of device memory
        self.library = FakeLibrary(self, **library)

    # A test's controls of the device.

    def advance(self, *streams: FakeStream) -> None:
        """Let the streams (none named: all) run as far as the events they wait for allow."""
        progressing = True
        while progressing:
            progressing = sum(self._step(stream) for stream in streams or list(self._queues)) > 0

    def _step(self, stream: FakeStream) -> bool:
        queue = self.queue(stream)
        if not queue or (queue[0][0] == "wait" and queue[0][1].done_at_ms is None):
            return False
        kind, event = queue.pop(0)
        if kind == "event":
            self._clock_ms += 1.0
            event.done_at_ms = self._clock_ms
        return True

    @contextlib.contextmanager
    def capture(self, stream: FakeStream) -> Iterator[None]:
        """Capture a graph on a stream, from this thread, in the default (global) mode."""
        assert stream.cuda_stream, "the default stream cannot be captured"
        self.captures[stream] = threading.get_ident()
        try:
            with self.device(stream.device), self.stream(stream):
                yield
        finally:
            del self.captures[stream]

    def reserved(self, index: int) -> int:
        """Bytes of a device that are not free to other processes."""
        return self._device_bytes - self.free_bytes[index]

    # Answers to the parts above.

    def queue(self, stream: FakeStream) -> list[tuple[str, FakeEvent]]:
        return self._queues.setdefault(stream, [])

    def driver_call(self, device: torch.device | None = None) -> None:
        """A call that goes to the current device, and that a capture in another thread may forbid."""
        if device is not None:
            assert device.index == self.thread.device, f"{device} used while device {self.thread.device} is current"
        self.contexts.add(self.thread.device)
        if self.thread.capture_mode == GLOBAL and self.captures:
            raise RuntimeError("operation not permitted: it ends the capture in another thread")
        self.refuse_capture("call the driver")

    def is_forbidden_by_capture(self) -> bool:
        """Whether a call that waits for the device would end a capture."""
        is_own = threading.get_ident() in self.captures.values()
        return is_own or (self.thread.capture_mode == GLOBAL and bool(self.captures))

    def stream_of(self, handle: int, device: int) -> FakeStream | None:
        """The stream of a handle on a device; None: there is none."""
        if not handle:
            return FakeStream(self, device, 0, 0)
        level, turn = (handle - BASE) >> 12, handle & 0xFFF
        is_there = 0 <= turn < POOL_SIZE and level >> 8 == device and 0 <= level & 0xFF < self.num_priorities
        return FakeStream(self, device, handle, -(level & 0xFF)) if is_there else None

    def is_known(self, address: int, nbytes: int) -> bool:
        """Whether memory is on the device, or pinned."""
        return any(
            start <= address and address + nbytes <= start + length
            for start, length in [*self._blocks.items(), *self.pinned.items()]
        )

    def refuse_capture(self, action: str) -> None:
        if threading.get_ident() in self.captures.values():
            raise RuntimeError(f"operation not permitted when stream is capturing: {action}")

    def refuse_capture_of(self, stream: FakeStream, action: str) -> None:
        if stream in self.captures:
            raise RuntimeError(f"operation not permitted when stream is capturing: {action}")

    def on_copy(self, dst: torch.Tensor, src: torch.Tensor, *, non_blocking: bool = False) -> None:
        self.check_last_error()
        assert non_blocking, "a blocking copy"
        assert dst.shape == src.shape
        self.driver_call()
        self.calls["copy_"] += 1
        stream = self.current(torch.device("cuda", self.thread.device))
        assert stream not in self.captures, "copied into a graph"
        self.copies.append(stream)

    def check_last_error(self) -> None:
        """The effect of every kernel launch."""
        if self.thread.sticky_error:
            raise RuntimeError(f"CUDA error {self.thread.sticky_error}, of some earlier call")

    # The names of `torch`.

    def empty(self, nbytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert dtype == torch.uint8
        self.driver_call(device)
        self.check_last_error()
        self.refuse_capture("allocate")
        assert not torch.is_inference_mode_enabled()
        assert torch._C._len_torch_dispatch_stack() == 0
        assert not torch.utils.deterministic.fill_uninitialized_memory
        self._take(nbytes, device.index)
        block = Block(nbytes + ALIGNMENT)
        weakref.finalize(block, self._put_back, nbytes, device.index, self._note_in_pool(block, nbytes))
        skipped = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % ALIGNMENT
        tensor = torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=skipped).as_subclass(FakeTensor)
        tensor.fake = self
        self._blocks[tensor.data_ptr()] = nbytes
        weakref.finalize(block, self._blocks.pop, tensor.data_ptr(), None)
        return tensor

    def _take(self, nbytes: int, index: int) -> None:
        if not self.entered:  # torch looks into its cache first, but not when a pool is entered
            reused = min(nbytes, self._cached[index])
            self._cached[index] -= reused
            nbytes -= reused
        if nbytes > self.free_bytes[index]:
            self.num_ooms += 1
            for number in range(len(self.entered)):  # names no pool, which the traceback would keep alive
                self.entered[number].num_allocated += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes")
        self.free_bytes[index] -= nbytes

    def _note_in_pool(self, block: Block, nbytes: int) -> tuple[weakref.ref[FakePool], int] | None:
        if not self.entered:
            return None
        pool = self.entered[-1]
        pool.num_allocated += 1
        pool.live.add(id(block))
        pool.reserved_bytes += nbytes
        return weakref.ref(pool), id(block)

    def _put_back(self, nbytes: int, index: int, pooled: tuple[weakref.ref[FakePool], int] | None) -> None:
        if pooled is None:
            self._cached[index] += nbytes
        elif (pool := pooled[0]()) is not None:
            pool.live.discard(pooled[1])

    # The names of `torch.cuda`.

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(self.free_bytes)

    def device_count(self) -> int:
        return len(self.free_bytes)

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.calls["device"] += 1
        before, self.thread.device = self.thread.device, device.index
        self.contexts.add(device.index)
        try:
            yield
        finally:
            self.thread.device = before

    @contextlib.contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        self.calls["stream"] += 1
        assert stream.device.index == self.thread.device, "leaving it would make a context on the device before"
        before = self.current(stream.device)
        self.thread.streams[stream.device.index] = stream
        try:
            yield
        finally:
            self.thread.streams[stream.device.index] = before

    def current_stream(self, device: torch.device) -> FakeStream:
        self.calls["current_stream"] += 1
        return self.current(device)

    def current_raw_stream(self, index: int) -> int:
        """The answer of `torch._C._cuda_getCurrentRawStream`."""
        return self.current(torch.device("cuda", index)).cuda_stream

    def current(self, device: torch.device) -> FakeStream:
        return self.thread.streams.get(device.index) or self.default_stream(device)

    def default_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, device.index, 0, 0)

    def is_current_stream_capturing(self) -> bool:
        self.calls["is_current_stream_capturing"] += 1
        return self.current(torch.device("cuda", self.thread.device)) in self.captures

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802
        self.calls["Event"] += 1
        return FakeEvent(self, enable_timing)

    def MemPool(self) -> FakePool:  # noqa: N802
        assert self._backend == "native", "this allocator has no pools"
        self.driver_call()
        self.refuse_capture("make a memory pool")
        return FakePool(self)

    @contextlib.contextmanager
    def use_mem_pool(self, pool: FakePool, device: torch.device) -> Iterator[None]:
        assert pool.device == device.index, "entered on another device than it was made on"
        assert pool.num_allocated == 0, "entered twice"
        self.refuse_capture("enter a memory pool")
        self.entered.append(pool)
        try:
            yield
        finally:
            self.entered.remove(pool)
        assert pool.num_allocated == 1, "a pool is entered for exactly one allocation"

    def get_allocator_backend(self) -> str:
        return self._backend

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.driver_call(device)
        return self.free_bytes[device.index], self._device_bytes

    def memory_stats_as_nested_dict(self, device: torch.device) -> dict[str, Any]:
        return {"num_alloc_retries": self.num_alloc_retries, "num_ooms": self.num_ooms} if self.has_memory_stats else {}

    def get_device_properties(self, device: torch.device) -> Any:
        properties = SimpleNamespace(name="Fake GPU", uuid=f"0000-{device.index}")
        if self._binds_last_error:
            properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id = 0, 0x3B + device.index, 0
        return properties

    def cudart(self) -> Any:
        module = SimpleNamespace(cudaHostRegister=self._host_register, cudaHostUnregister=self._host_unregister)
        if self._binds_last_error:
            module.cudaGetLastError = self._get_last_error
        return module

    # The names of `libcudart`; see `FakeLibrary`.

    def _exchange_capture_mode(self, argument: Any) -> int:
        self.contexts.add(self.thread.device)
        mode = ctypes.c_int.from_address(argument)
        mode.value, self.thread.capture_mode = self.thread.capture_mode, mode.value
        return 0

    def _host_register(self, address: int, nbytes: int, flags: int) -> Any:
        self.driver_call()
        assert flags & 1, "not portable"
        self.register_flags.append(flags)
        assert address % 4096 == 0
        if address in self.pinned:
            return self._fail(712)
        if sum(self.pinned.values()) + nbytes > self._pin_limit_bytes:
            return self._fail(2)
        self.pinned[address] = nbytes
        return 0

    def _host_unregister(self, address: int) -> Any:
        self.driver_call()
        self.unpinned.append(address)
        return 0 if self.pinned.pop(address, None) else self._fail(713)

    def _fail(self, code: int) -> int:
        self.thread.sticky_error = code
        return code

    def _get_last_error(self) -> int:
        code, self.thread.sticky_error = self.thread.sticky_error, 0
        return code
