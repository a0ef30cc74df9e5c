"""A device whose streams run when an adversary says so, and which sees every race and every wrong byte."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from gpu_cache.device.modes import plain_tensors
from gpu_cache.device.protocol import Arena, DeviceIdentity, Pinned
from gpu_cache.source import LentMemory
from tests.support.sim_clock import HOST, POISON, Region, Touch, join
from tests.support.sim_host import SimHost
from tests.support.sim_streams import Adversary, SimEvent, SimStream, Work

_NOTHING = torch.empty(0, dtype=torch.uint8)
_NUM_POOLED = 3  # streams, besides the default one, that a fence of all streams covers


class SimDevice(SimHost):
    """A `Device` in host memory with explicit queues; copies read their source when they run.

    Its findings are in `faults`. One kind is two accesses of one granule, at least one a write, that nothing orders
    (enqueuing, a stream's own order, record and wait, `query` that said yes, `synchronize`). Another is a kernel that
    reads other bytes than it should. The host is one actor, whatever the thread: locks order its threads anyway, and
    races between them are not looked for. Also work on a stream
    while a graph is captured there, and queries, records and waits of a thread whose current stream is captured.

    Args:
        seed: The adversary's.
    Thread-safety: any thread; one lock.
    """

    torch_device = torch.device("cpu")
    hard_limit = ""
    stages = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.adversary = Adversary(seed)
        self.num_refused = 0
        self.captured: SimStream | None = None  # where a graph is being captured
        # Guarded by the lock, as are the streams and events.
        self._refusals: dict[str, int] = {}
        self._names = itertools.count()
        self._streams: list[SimStream] = []
        self._current = threading.local()
        self.pooled = [self.new_stream() for _ in range(1 + _NUM_POOLED)]

    def __repr__(self) -> str:
        return f"SimDevice({self._streams}, {len(self.faults)} faults)"

    # Memory.

    def arena(self, nbytes: int, *, private: bool = True) -> Arena:
        self._refuse("arena", torch.OutOfMemoryError)
        storage = torch.UntypedStorage(nbytes, device="cpu")
        with plain_tensors(), self._lock:
            tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._add_region("arena", tensor)
            return Arena(tensor)

    def release_arena(self, arena: Arena) -> None:
        self._release(arena.tensor)
        arena.tensor = _NOTHING

    def pinned(self, nbytes: int) -> Pinned:
        self._refuse("slot", OSError)
        memory = np.empty(nbytes, dtype=np.uint8)
        with plain_tensors(), self._lock:
            tensor = torch.from_numpy(memory)
            self._add_region("slot", tensor)
            return Pinned(tensor, memoryview(memory), is_pinned=True)

    def release_pinned(self, pinned: Pinned) -> None:
        self._release(pinned.tensor)
        pinned.tensor, pinned.view = _NOTHING, memoryview(b"")

    def reads(self, memory: LentMemory) -> bool:
        with self._lock:
            if self not in memory.readers:
                self._add_region("lent", memory.tensor, poisons=False)
                memory.readers[self] = True
            return memory.readers[self]

    def memory_info(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def num_shortages(self) -> int:
        return 0

    def identity(self) -> DeviceIdentity:
        return DeviceIdentity("simulated")

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arenas that were not released."""
        with self._lock:
            return sum(len(one.memory) for one in self._regions if one.name.startswith("arena") and not one.is_released)

    def refuse(self, what: str, times: int) -> None:
        """Fail the next few calls of a kind: "arena", "slot" (a pinned one) or "copy"."""
        with self._lock:
            self._refusals[what] = times

    # Streams and events.

    def new_stream(self) -> SimStream:
        with self._lock:
            self._streams.append(SimStream(f"stream{next(self._names)}"))
            return self._streams[-1]

    def current_stream(self) -> SimStream:
        return getattr(self._current, "stream", self.pooled[0])

    @contextlib.contextmanager
    def stream(self, stream: SimStream) -> Iterator[None]:
        """Make a stream the calling thread's current one."""
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def fence_streams(self) -> Sequence[SimStream]:
        return self.pooled

    def is_capturing(self) -> bool:
        return self.is_any_capturing([self.current_stream()])

    def record(self, stream: SimStream, *, timing: bool = False) -> SimEvent:
        event = SimEvent(stream, timing)

        def mark(at: SimStream) -> None:
            event.clock = dict(at.clock)

        self._enqueue(stream, mark)
        return event

    def record_all(self, streams: Sequence[SimStream]) -> list[SimEvent]:
        return [self.record(stream) for stream in streams]

    def discard(self, events: Sequence[SimEvent]) -> None:
        pass

    def is_any_capturing(self, streams: Sequence[SimStream]) -> bool:
        return any(self.captured is stream for stream in streams)

    def wait(self, stream: SimStream, event: SimEvent) -> None:
        self._enqueue(stream, lambda at: join(at.clock, event.clock or {}), event)

    def query(self, event: SimEvent) -> bool:
        self._refuse_capture()
        with self._lock:
            self.adversary.drift(self._streams)
            return self._see(event)

    def synchronize(self, event: SimEvent) -> None:
        self._refuse_capture()
        with self._lock:
            self.adversary.drift(self._streams)
            event.stream.reach(event)
            assert self._see(event)

    def elapsed_s(self, start: SimEvent, end: SimEvent) -> float:
        with self._lock:
            if not (start.is_timed and end.is_timed and start.clock and end.clock):
                self.faults.append("elapsed_s of events that are not both timed and done")
        return 1e-6

    def synchronize_all(self) -> None:
        """Run everything, and see it done."""
        for stream in list(self._streams):
            self.synchronize(self.record(stream))

    def finish(self) -> None:
        """Run everything that is queued."""
        with self._lock:
            self.adversary.finish(self._streams)

    # Work.

    def _copy(self, dst: torch.Tensor, src: torch.Tensor, stream: SimStream) -> None:
        assert dst.numel() == src.numel()
        self._refuse("copy", RuntimeError)
        with self._lock:
            if not self.knows(src):  # pageable: read before this returns
                self._add_region("pageable", src.clone(), poisons=False)
                src = torch.from_numpy(self._regions[-1].memory)
        (to, to_at), (source, source_at), nbytes = self._find(dst), self._find(src), dst.numel()

        def copy(at: SimStream) -> None:
            touch = Touch(at.name, at.clock[at.name], f"a copy from {source.name}+{source_at}")
            self._note(source.read(source_at, nbytes, touch, at.clock))
            self._note(to.write(to_at, nbytes, touch, at.clock))
            to.memory[to_at : to_at + nbytes] = source.memory[source_at : source_at + nbytes]

        self._enqueue(stream, copy)

    def copy_all(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], stream: SimStream) -> None:
        for dst, src in pairs:
            self._copy(dst, src, stream)

    def write(self, stream: SimStream, tensor: torch.Tensor, values: np.ndarray) -> None:
        """Enqueue a kernel that writes into a contiguous tensor in place, which torch counts at once."""
        tensor.add_(0)
        region, begin = self._find(tensor)

        def write(at: SimStream) -> None:
            touch = Touch(at.name, at.clock[at.name], "a write in place")
            self._note(region.write(begin, len(values), touch, at.clock))
            region.memory[begin : begin + len(values)] = values

        self._enqueue(stream, write)

    def kernel(self, stream: SimStream, tensor: torch.Tensor, expected: np.ndarray, what: str = "a kernel") -> None:
        """Enqueue a read of a contiguous tensor, whose bytes must be `expected` when it runs; keeps no alias of it."""
        nbytes = tensor.numel() * tensor.element_size()
        assert nbytes == len(expected)
        if not nbytes:
            return
        region, begin = self._find(tensor)

        def read(at: SimStream) -> None:
            self._note(region.read(begin, nbytes, Touch(at.name, at.clock[at.name], what), at.clock))
            if not np.array_equal(region.memory[begin : begin + nbytes], expected):
                found = region.memory[begin : begin + min(nbytes, 8)].tolist()
                self._note(f"wrong bytes: {what} of {at.name} read {found}... at {region.name}+{begin}")

        self._enqueue(stream, read)

    def _enqueue(self, stream: SimStream, run: Callable[[SimStream], None], blocker: SimEvent | None = None) -> None:
        self._refuse_capture(stream)
        with self._lock:
            stream.queue.append(Work(dict(self._host), run, blocker))
            self._host[HOST] += 1  # the host's later work is not before it
            self.adversary.drift(self._streams)

    def _refuse_capture(self, *used: SimStream) -> None:
        """Note a fault if a stream that is used, or the thread's current one, is being captured."""
        if self.is_any_capturing([self.current_stream(), *used]):
            self._note(f"use under capture: of {self.captured}")

    def _refuse(self, what: str, error: type[Exception]) -> None:
        with self._lock:
            self.adversary.moment()
            if self._refusals.get(what):
                self._refusals[what] -= 1
                self.num_refused += 1
                raise error(f"the simulated device refuses: {what}")

    def _see(self, event: SimEvent) -> bool:
        if event.clock is None:
            return False
        join(self._host, event.clock)
        return True

    def _release(self, tensor: torch.Tensor) -> None:
        with self._lock:
            self.adversary.moment()
            region, begin = self._find(tensor)
            self._poison(region, begin, tensor.numel(), "the release")
            region.is_released = True

    def _add_region(self, kind: str, tensor: torch.Tensor, *, poisons: bool = True) -> None:
        memory = tensor.numpy()
        if poisons:
            memory[:] = POISON
        self._regions.append(Region(f"{kind}{len(self._regions)}", memory))
