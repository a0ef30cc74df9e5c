"""The objects of the fake `torch.cuda`: streams, events, tensors, memory pools. See `fake_cuda`."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

GLOBAL, THREAD_LOCAL = 0, 1  # capture modes
POOL_SIZE = 32
BASE = 0x5573_0000_0000  # handles of streams begin here: as on a GPU, longer than 32 bits


class Thread(threading.local):
    """The state that CUDA and torch keep for each thread."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Any] = {}
        self.capture_mode = GLOBAL
        self.sticky_error = 0


class FakeStream:
    """A handle to a queue; asking for the same stream twice gives two equal objects, as in torch."""

    def __init__(self, cuda: Any, device: int, handle: int, priority: int) -> None:
        self._cuda = cuda
        self.device = torch.device("cuda", device)
        self.cuda_stream = handle
        self.priority = priority

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and (self.cuda_stream, self.device) == (other.cuda_stream, other.device)

    def __hash__(self) -> int:
        return hash((self.cuda_stream, self.device))

    def __repr__(self) -> str:
        return f"<stream {self.cuda_stream:#x} of {self.device}>"

    def wait_event(self, event: FakeEvent) -> None:
        assert event.stream is not None, "waited for an event that was never recorded: a no-op on a GPU"
        self._cuda.refuse_capture_of(self, "wait for an outside event")
        self._cuda.contexts.add(self.device.index)
        self._cuda.queue(self).append(("wait", event))

    def synchronize(self) -> None:
        self._cuda.driver_call(self.device)
        self._cuda.synchronized.append(self)
        self._cuda.advance(self)


class FakeEvent:
    def __init__(self, cuda: Any, enable_timing: bool) -> None:
        self._cuda, self.enable_timing = cuda, enable_timing
        self.stream: FakeStream | None = None
        self.done_at_ms: float | None = None

    def record(self, stream: FakeStream) -> None:
        assert self.stream is None, "recorded again: waiters for the first record are betrayed"
        self._cuda.refuse_capture_of(stream, "record an outside event")
        self._cuda.contexts.add(stream.device.index)
        self.stream = stream
        self._cuda.queue(stream).append(("event", self))

    def query(self) -> bool:
        assert self.stream is not None, "queried before it was recorded: true on a GPU, and wrong"
        self._cuda.driver_call(self.stream.device)
        return self.done_at_ms is not None

    def synchronize(self) -> None:
        assert self.stream is not None, "synchronized before it was recorded"
        self._cuda.driver_call(self.stream.device)
        self._cuda.advance()
        assert self.done_at_ms is not None, "synchronized an event that can never be done: a deadlock"

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.stream is not None
        self._cuda.driver_call(self.stream.device)
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("both events must be created with enable_timing=True")
        if self.done_at_ms is None or end.done_at_ms is None:
            raise RuntimeError("device not ready")
        return end.done_at_ms - self.done_at_ms


class FakeTensor(torch.Tensor):
    """Device memory. Tells the fake of every copy into it or from it, also through slices."""

    fake: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        fake = next(one.fake for one in tree_leaves(args) if isinstance(one, FakeTensor))
        if isinstance(result, FakeTensor):
            result.fake = fake
        if func is torch.Tensor.copy_:
            fake.on_copy(args[0], args[1], **(kwargs or {}))
        return result


class Block(bytearray):
    """Bytes that a tensor's storage keeps alive, so that its death tells when the allocator gets them back."""


class FakePool:
    """One `MemPool`: belongs to the device that is current when it is made, and frees its bytes when it dies."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.device = cuda.thread.device
        self.num_allocated = 0
        self.live: set[int] = set()
        self.reserved_bytes = 0
        cuda.num_pools += 1

    def __del__(self) -> None:
        cuda = self._cuda
        cuda.num_pools -= 1
        if self.live:
            cuda.violations.append("a pool died before its tensor: its memory stays with the allocator")
        elif cuda.captures or cuda.entered:
            cuda.violations.append("a pool died during a capture or inside another pool: the process ends")
        elif cuda.thread.device != self.device or cuda.thread.capture_mode != THREAD_LOCAL:
            cuda.violations.append("a pool died outside of `_here`")
        else:
            cuda.free_bytes[self.device] += self.reserved_bytes


class StreamType:
    """`torch.cuda.Stream`: deals out 32 streams for each priority, in turn."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda

    def __call__(self, *, device: torch.device, priority: int = 0) -> FakeStream:
        cuda = self._cuda
        cuda.driver_call(device)
        level = min(max(-priority, 0), cuda.num_priorities - 1)
        turn = cuda.turns[device.index, level] = (cuda.turns.get((device.index, level), -1) + 1) % POOL_SIZE
        return FakeStream(cuda, device.index, BASE + (device.index << 20) + (level << 12) + turn, -level)

    def priority_range(self) -> tuple[int, int]:
        self._cuda.driver_call()
        return 0, 1 - self._cuda.num_priorities


class UntouchableCuda:
    """`torch.cuda` of a process that has not initialised CUDA: anything but asking for that fails."""

    def is_initialized(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"touched torch.cuda.{name}, which may initialise CUDA")
